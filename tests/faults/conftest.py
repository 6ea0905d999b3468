"""What makes thousands of runs a matter of seconds: the results of pure functions are kept."""

import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.s3_server import s3_environment, s3_prefix, s3_server

__all__ = ["s3_environment", "s3_prefix", "s3_server"]
_ParquetFile, _write_table = pq.ParquetFile, pq.write_table


class _OpenedOnce:
    """A Parquet file of which nothing is parsed again."""

    def __init__(self, data: bytes) -> None:
        self._file = _ParquetFile(pa.BufferReader(data))
        self._tables: dict[tuple[str, ...] | None, pa.Table] = {}
        self.schema_arrow, self.metadata = self._file.schema_arrow, self._file.metadata

    def read(self, columns: Sequence[str] | None = None, *, use_threads: bool = False) -> pa.Table:
        key = None if columns is None else tuple(columns)
        if key not in self._tables:
            self._tables[key] = self._file.read(columns, use_threads=use_threads)
        return self._tables[key]

    def iter_batches(self, batch_size: int, *, use_threads: bool) -> list[pa.RecordBatch]:
        return self.read(use_threads=use_threads).to_batches(max_chunksize=batch_size)


@pytest.fixture
def fast_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same Parquet bytes are parsed once, the same table is encoded once; scratch is memory."""
    opened: dict[bytes, _OpenedOnce] = {}
    files: dict[bytes, bytes] = {}

    def open_file(file: pa.BufferReader) -> _OpenedOnce:
        data = file.read()
        if data not in opened:
            opened[data] = _OpenedOnce(data)
        return opened[data]

    def write(table: pa.Table, file: BinaryIO, *, compression: str) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        key = sink.getvalue().to_pybytes()
        if key not in files:
            buffer = io.BytesIO()
            _write_table(table, buffer, compression=compression)
            files[key] = buffer.getvalue()
        file.write(files[key])

    monkeypatch.setattr(pq, "ParquetFile", open_file)
    monkeypatch.setattr(pq, "write_table", write)
    memory = Path("/dev/shm")
    if memory.is_dir():
        monkeypatch.setattr(tempfile, "tempdir", str(memory))
    # thousands of lines about damage that was meant to be
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
