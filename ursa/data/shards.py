"""Write, read and verify token shards: Parquet files that are put whole and never change."""

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ursa import storage
from ursa.artifacts import ShardInfo
from ursa.data.schema import schema_difference, token_schema
from ursa.errors import ShardFormatError

READ_THREADS = 4
"""Shards read at the same time: a store that answers in 50 ms gives 80 of them a second."""
_REPAIR = "`ursa data repair` with the data root makes it again"


def write_shard(
    rows: Sequence[dict[str, Any]], uri_prefix: str, *, codebook_size: int
) -> ShardInfo:
    """Write rows as one shard whose name holds its content's hash.

    Args:
        rows: Values by the column names of `token_schema`.
        uri_prefix: The shard becomes `<uri_prefix>-<sha256[:16]>.parquet`.
        codebook_size: Number of codes of the visual tokenizer.

    Returns:
        Where the shard is, with its size and hash.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    data = shard_bytes(rows, codebook_size=codebook_size)
    digest = hashlib.sha256(data).hexdigest()
    uri = f"{uri_prefix}-{digest[:16]}.parquet"
    storage.put_named_by_hash(uri, data)
    return ShardInfo(uri=uri, num_samples=len(rows), num_bytes=len(data), sha256=digest)


def shard_bytes(rows: Sequence[dict[str, Any]], *, codebook_size: int) -> bytes:
    """Return rows as the bytes of a shard: the same rows give the same bytes.

    Args:
        rows: Values by the column names of `token_schema`.
        codebook_size: Number of codes of the visual tokenizer.
    """
    schema = token_schema(codebook_size)
    arrays = [
        _id_lists([row[field.name] for row in rows], field.type)
        if field.name == "visual_ids"
        else pa.array([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    buffer = io.BytesIO()
    # ids repeat: a dictionary of them before zstd is smaller than any encoding without one
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _id_lists(rows: Sequence[Any], kind: pa.ListType) -> pa.ListArray:
    """Return rows of ids as a column, without a Python number for each of them."""
    arrays = [np.asarray(row) for row in rows]
    offsets = np.cumsum([0, *(len(array) for array in arrays)])
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(flat, kind.value_type), type=kind
    )


def read_shard(
    shard: ShardInfo, *, codebook_size: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a shard after checking its hash, schema and number of rows.

    Args:
        shard: Where it is, and its hash and number of rows.
        codebook_size: Number of codes of the visual tokenizer.
        columns: Names of the columns that are wanted; None is all.

    Returns:
        A table of `token_schema`, or those columns of it.

    Raises:
        ShardFormatError: If the shard is missing, damaged or of another schema.
        StorageError: If the store refuses or does not answer.
    """
    try:
        data = storage.read_bytes(shard.uri)
    except FileNotFoundError as error:
        raise ShardFormatError(f"{shard.uri}: the shard is missing; {_REPAIR}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        raise ShardFormatError(
            f"{shard.uri}: sha256 is {digest[:16]}..., expected {shard.sha256[:16]}...; {_REPAIR}"
        )
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        # pyarrow decodes ids a third slower when columns are named; threads are the caller's
        named = columns if columns and "visual_ids" not in columns else None
        table = file.read(columns=named, use_threads=False)
    except pa.ArrowException as error:
        raise ShardFormatError(f"{shard.uri}: no Parquet file ({error})") from error
    difference = schema_difference(file.schema_arrow, token_schema(codebook_size))
    if difference:
        raise ShardFormatError(f"{shard.uri}: {difference}")
    if table.num_rows != shard.num_samples:
        raise ShardFormatError(f"{shard.uri}: {table.num_rows} rows, expected {shard.num_samples}")
    return table if columns is None else table.select(list(columns))


def iter_shards(
    shards: Iterable[ShardInfo], *, codebook_size: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Read shards one after another, a few ahead.

    Args:
        shards: Where they are, and their hashes and numbers of rows.
        codebook_size: Number of codes of the visual tokenizer.
        columns: Names of the columns that are wanted; None is all.

    Yields:
        One table a shard, in their order.

    Raises:
        ShardFormatError: If a shard is missing, damaged or of another schema.
        StorageError: If the store refuses or does not answer.
    """
    waiting: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="shards") as pool:
        try:
            for shard in shards:
                waiting.append(
                    pool.submit(read_shard, shard, codebook_size=codebook_size, columns=columns)
                )
                if len(waiting) > READ_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for read in waiting:
                read.cancel()
