"""Write, read and verify token shards: Parquet files that are put whole and never change."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, ShardInfo
from ursa.data.schema import token_schema
from ursa.errors import ShardFormatError

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
    table = pa.Table.from_pylist(list(rows), schema=token_schema(codebook_size))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_shard(shard: ShardInfo, *, codebook_size: int) -> pa.Table:
    """Read a shard after checking its hash, schema and number of rows.

    Args:
        shard: Where it is, and its hash and number of rows.
        codebook_size: Number of codes of the visual tokenizer.

    Returns:
        A table of `token_schema`.

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
        table = pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise ShardFormatError(f"{shard.uri}: no Parquet file ({error})") from error
    expected = token_schema(codebook_size)
    if not table.schema.equals(expected, check_metadata=True):
        raise ShardFormatError(
            f"{shard.uri}: schema differs from version {SCHEMA_VERSION} with {codebook_size} codes"
        )
    if table.num_rows != shard.num_samples:
        raise ShardFormatError(f"{shard.uri}: {table.num_rows} rows, expected {shard.num_samples}")
    return table


def read_shards(shards: Iterable[ShardInfo], *, codebook_size: int) -> pa.Table:
    """Read shards into one table, in their order.

    Args:
        shards: Where they are, and their hashes and numbers of rows.
        codebook_size: Number of codes of the visual tokenizer.

    Returns:
        A table of `token_schema`, without rows if there are no shards.

    Raises:
        ShardFormatError: If a shard is missing, damaged or of another schema.
        StorageError: If the store refuses or does not answer.
    """
    tables = [read_shard(shard, codebook_size=codebook_size) for shard in shards]
    return pa.concat_tables(tables) if tables else token_schema(codebook_size).empty_table()
