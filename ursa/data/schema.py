"""The Parquet schema of token shards and its version. Documented in docs/data-format.md."""

import numpy as np
import pyarrow as pa

from ursa.artifacts import SCHEMA_VERSION

SMALL_CODEBOOK = 1 << 16
"""Ids of codebooks up to this size are stored in 16 bits, larger ones in 32."""


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
