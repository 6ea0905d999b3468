"""The Parquet schema of token shards, its version, and how schemas differ (docs/data-format.md)."""

import numpy as np
import pyarrow as pa

from ursa.artifacts import SCHEMA_VERSION

SMALL_CODEBOOK = 1 << 16
"""Ids of codebooks up to this size are stored in 16 bits, larger ones in 32."""


_WHAT_TO_DO = (
    "read it with the release of ursa that wrote it, or let this one make the data again in an "
    "empty root"
)


def schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    """Say how the schema of a file differs from the one that it must have.

    Args:
        found: Of the file.
        expected: What this release reads.

    Returns:
        The differences and what to do; "" if there is none. Columns must be the same in name, order
        and type, and so must the metadata.
    """
    if found.equals(expected, check_metadata=True):
        return ""
    here, there = found.metadata or {}, expected.metadata or {}
    parts = [
        f"{key.decode(errors='replace')} is {_shown(here.get(key))}, expected "
        f"{_shown(there.get(key))}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    parts += [f"column {name} is missing" for name in expected.names if name not in found.names]
    parts += [f"column {name} is unknown" for name in found.names if name not in expected.names]
    parts += [
        f"column {field.name} is {_kind(found.field(field.name))}, expected {_kind(field)}"
        for field in expected
        if found.names.count(field.name) == 1 and not found.field(field.name).equals(field)
    ]
    if not parts:
        parts = [f"columns stand as {', '.join(found.names)}, expected {', '.join(expected.names)}"]
    return f"{'; '.join(parts)}; {_WHAT_TO_DO}"


def _shown(value: bytes | None) -> str:
    return "missing" if value is None else value.decode(errors="replace")[:80]


def _kind(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


def id_type(codebook_size: int) -> type[np.unsignedinteger]:
    """Return the narrowest type of ids.

    Args:
        codebook_size: Number of codes V.
    """
    return np.uint16 if codebook_size <= SMALL_CODEBOOK else np.uint32


def token_schema(codebook_size: int) -> pa.Schema:
    """Return the schema of a token shard.

    Args:
        codebook_size: Number of codes V; decides the width of the ids.
    """
    id_field = pa.field("element", pa.from_numpy_dtype(id_type(codebook_size)), nullable=False)
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("clip_id", pa.string(), nullable=False),
            pa.field("source_sha256", pa.string(), nullable=False),
            pa.field("media_sha256", pa.string(), nullable=False),
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("variant", pa.int32(), nullable=False),
            pa.field("fps", pa.float64(), nullable=False),
            pa.field("num_latent_frames", pa.int32(), nullable=False),
            pa.field("num_rows", pa.int32(), nullable=False),
            pa.field("num_columns", pa.int32(), nullable=False),
            pa.field("visual_ids", pa.list_(id_field), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("motion_px_per_s", pa.float64(), nullable=True),
        ],
        metadata={
            b"ursa.schema_version": str(SCHEMA_VERSION).encode(),
            b"ursa.codebook_size": str(codebook_size).encode(),
        },
    )
