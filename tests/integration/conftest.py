"""Fixtures of the tests that cross a process or network boundary."""

from tests.s3_server import s3_environment, s3_prefix, s3_server

__all__ = ["s3_environment", "s3_prefix", "s3_server"]
