"""What makes thousands of runs a matter of seconds: the results of pure functions are kept."""

import io
import logging
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.s3_server import s3_environment, s3_prefix, s3_server

__all__ = ["s3_environment", "s3_prefix", "s3_server"]
_read_table, _write_table = pq.read_table, pq.write_table


@pytest.fixture
def fast_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same Parquet bytes are parsed once, the same table is encoded once; scratch is memory."""
    tables: dict[bytes, pa.Table] = {}
    files: dict[bytes, bytes] = {}

    def read(file: io.BytesIO) -> pa.Table:
        data = file.getvalue()
        if data not in tables:
            tables[data] = _read_table(file, use_threads=False)
        return tables[data]

    def write(table: pa.Table, file: io.BytesIO, *, compression: str) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        key = sink.getvalue().to_pybytes()
        if key not in files:
            buffer = io.BytesIO()
            _write_table(table, buffer, compression=compression)
            files[key] = buffer.getvalue()
        file.write(files[key])

    monkeypatch.setattr(pq, "read_table", read)
    monkeypatch.setattr(pq, "write_table", write)
    memory = Path("/dev/shm")
    if memory.is_dir():
        monkeypatch.setattr(tempfile, "tempdir", str(memory))
    # thousands of lines about damage that was meant to be
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
