"""An S3 server of this machine for the tests of a session."""

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.running_services import free_port

BUCKET = "ursa-test"


@contextlib.contextmanager
def running_s3_server(bucket=BUCKET):
    """Run a server process; its address, with one bucket in it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"{address}/{bucket}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server did not start"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def s3_server():
    with running_s3_server() as address:
        yield address


@pytest.fixture
def s3_environment(monkeypatch):
    import s3fs

    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # a client keeps the environment in which it was made
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_prefix(s3_server, s3_environment, monkeypatch):
    """A prefix of the bucket that no other test uses."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"
