"""Samples of token data sets: batches of them, a few of them, counts over all of them.

Dimensions: B = batch, T, H, W = latent frames, rows and columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ursa.artifacts import ShardInfo, TokenDataset
from ursa.data.order import BLOCK_BYTES, block_samples, shards_by_content
from ursa.data.shards import iter_shards
from ursa.errors import ShardFormatError

BATCH_COLUMNS = ("sample_id", "caption", "motion_px_per_s")
"""What a batch holds beside the ids."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Samples of one latent shape.

    Attributes:
        visual_ids: Clean codes, shape (B, T, H, W), int64.
        captions: B captions.
        motion_px_per_s: B motion scores, None where not measured.
        sample_ids: B names.
    """

    visual_ids: Tensor
    captions: tuple[str, ...]
    motion_px_per_s: tuple[float | None, ...]
    sample_ids: tuple[str, ...]


def spread(length: int, limit: int) -> list[int]:
    """Return at most `limit` positions of a sequence, evenly spread.

    Args:
        length: Length of the sequence.
        limit: Greatest number of positions.
    """
    count = min(length, limit)
    return [index * length // count for index in range(count)]


def make_batch(ids: np.ndarray, columns: pa.Table, rows: Sequence[int] | np.ndarray) -> TokenBatch:
    """Return rows of samples in memory as one batch.

    Args:
        ids: Ids of all samples, shape (samples, T, H, W), any type of integers.
        columns: `BATCH_COLUMNS` of all samples.
        rows: Rows in [0, samples), in any order, at least one.
    """
    rows = np.asarray(rows)
    taken = columns.select(BATCH_COLUMNS).take(pa.array(rows)).to_pydict()
    return TokenBatch(
        visual_ids=torch.from_numpy(ids[rows].astype(np.int64)),
        captions=tuple(taken["caption"]),
        motion_px_per_s=tuple(taken["motion_px_per_s"]),
        sample_ids=tuple(taken["sample_id"]),
    )


def join_batches(parts: Sequence[TokenBatch]) -> TokenBatch:
    """Return the samples of several batches of one latent shape as one.

    Args:
        parts: At least one batch.
    """
    if len(parts) == 1:
        return parts[0]
    return TokenBatch(
        visual_ids=torch.cat([part.visual_ids for part in parts]),
        captions=tuple(caption for part in parts for caption in part.captions),
        motion_px_per_s=tuple(score for part in parts for score in part.motion_px_per_s),
        sample_ids=tuple(name for part in parts for name in part.sample_ids),
    )


def shard_ids(table: pa.Table, latent_shape: Sequence[int], uri: str) -> np.ndarray:
    """Return the ids of a shard as an array over its memory.

    Args:
        table: The shard.
        latent_shape: (T, H, W).
        uri: The shard's, for the message.

    Returns:
        Shape (rows, T, H, W), the stored type.

    Raises:
        ShardFormatError: If the rows are of another shape.
    """
    column = table["visual_ids"]
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    flat: np.ndarray = lists.flatten().to_numpy()
    size = math.prod(latent_shape)
    if set(np.diff(lists.offsets.to_numpy())) - {size}:
        raise ShardFormatError(
            f"{uri}: samples have other numbers of ids than the {size} of the data set's shape "
            f"{tuple(latent_shape)}; `ursa data verify` with the data root says which"
        )
    return flat.reshape(-1, *latent_shape)


def code_counts(dataset: TokenDataset) -> np.ndarray:
    """Return how often each code occurs; a few shards at a time are in memory.

    Args:
        dataset: The committed data set.

    Returns:
        Counts, shape (V,), int64.

    Raises:
        ShardFormatError: If a shard is missing, damaged or of another schema.
        DataExhaustedError: If there is no sample.
        StorageError: If the store refuses or does not answer.
    """
    size = dataset.codebook_size
    counts = np.zeros(size, np.int64)
    shards = shards_by_content(dataset)
    for table in iter_shards(shards, codebook_size=size, columns=["visual_ids"]):
        flat = table["visual_ids"].combine_chunks().flatten().to_numpy()
        counts += np.bincount(flat, minlength=size)
    return counts


def motion_scores(dataset: TokenDataset) -> list[float]:
    """Return the motion of all samples that have been measured, px/s at 256 px width.

    Args:
        dataset: The committed data set.

    Raises:
        ShardFormatError: If a shard is missing, damaged or of another schema.
        DataExhaustedError: If there is no sample.
        StorageError: If the store refuses or does not answer.
    """
    shards, name = shards_by_content(dataset), "motion_px_per_s"
    tables = iter_shards(shards, codebook_size=dataset.codebook_size, columns=[name])
    return [score for table in tables for score in table[name].drop_null().to_pylist()]


def source_ids(dataset: TokenDataset) -> set[str]:
    """Return the sha256 of all sources that a data set has samples of.

    Args:
        dataset: The committed data set.

    Raises:
        ShardFormatError: If a shard is missing, damaged or of another schema.
        StorageError: If the store refuses or does not answer.
    """
    name = "source_sha256"
    tables = iter_shards(dataset.shards, codebook_size=dataset.codebook_size, columns=[name])
    return {source for table in tables for source in pc.unique(table[name]).to_pylist()}


class TokenSamples:
    """Samples of a token data set, held in memory at 16 or 32 bits an id.

    Attributes:
        captions: One caption a sample.
        motion: Motion of the clip of each sample, px/s at 256 px width; None where not measured.
        sample_ids: Names of the samples, ascending in data sets of at most one block.
        clip_ids: The clip of each sample.
        source_ids: sha256 of the source of each sample.
        starts_s: Where each sample begins in its clip, seconds.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        max_samples: int | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Read and verify the shards; of a data set larger than a block those that are needed.

        Args:
            dataset: The committed data set.
            max_samples: Samples kept at most, evenly spread so that no clip fills them alone:
                over the names, in larger data sets over the shards. None is all.
            block_bytes: Larger data sets are not read as a whole.

        Raises:
            ShardFormatError: If a shard is missing, damaged or of another schema.
            DataExhaustedError: If there is no sample.
            StorageError: If the store refuses or does not answer.
        """
        shards = shards_by_content(dataset)
        count = sum(shard.num_samples for shard in shards)
        wanted = np.array(spread(count, count if max_samples is None else max_samples))
        if count <= block_samples(dataset, block_bytes):
            ids, columns = _read_rows(dataset, [(shard, None) for shard in shards])
            # the order must depend neither on the division into shards nor on where they lie
            rows = pc.sort_indices(columns["sample_id"]).to_numpy()[wanted]
            ids, columns = ids[rows], columns.take(pa.array(rows))
        else:
            ids, columns = _read_rows(dataset, list(_rows_by_shard(shards, wanted)))
        self._ids = ids
        self._columns = columns
        self.captions: list[str] = columns["caption"].to_pylist()
        self.motion: list[float | None] = columns["motion_px_per_s"].to_pylist()
        self.sample_ids: list[str] = columns["sample_id"].to_pylist()
        self.clip_ids: list[str] = columns["clip_id"].to_pylist()
        self.source_ids: list[str] = columns["source_sha256"].to_pylist()
        self.starts_s: list[float] = columns["start_s"].to_pylist()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the samples at the given positions as one batch.

        Args:
            indices: Positions in [0, number of samples), in any order.
        """
        return make_batch(self._ids, self._columns, indices)


def _rows_by_shard(
    shards: Sequence[ShardInfo], positions: np.ndarray
) -> Iterator[tuple[ShardInfo, np.ndarray]]:
    """Yield the shards in which positions of their rows, joined end to end, lie."""
    ends = np.cumsum([shard.num_samples for shard in shards])
    owners = np.searchsorted(ends, positions, side="right")
    for owner in np.unique(owners):
        shard = shards[owner]
        yield shard, positions[owners == owner] - (ends[owner] - shard.num_samples)


def _read_rows(
    dataset: TokenDataset, wanted: Sequence[tuple[ShardInfo, np.ndarray | None]]
) -> tuple[np.ndarray, pa.Table]:
    """Return ids and columns of rows of shards; None is all of them."""
    tables = iter_shards(
        [shard for shard, _ in wanted],
        codebook_size=dataset.codebook_size,
        columns=["visual_ids", "clip_id", "source_sha256", "start_s", *BATCH_COLUMNS],
    )
    ids, parts = [], []
    for (shard, rows), table in zip(wanted, tables, strict=True):
        grids = shard_ids(table, dataset.latent_shape, shard.uri)
        part = table.drop_columns("visual_ids")
        ids.append(grids if rows is None else grids[rows])
        parts.append(part if rows is None else part.take(pa.array(rows)))
    return np.concatenate(ids), pa.concat_tables(parts).combine_chunks()
