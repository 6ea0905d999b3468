"""Batches of tokens in an order that is a pure function of (seed, stage, data, step).

There is no state to save: the batch of a step is computed from its number, and a rank takes its
slice of it. So a resumed run, or one on another number of workers, sees the same samples.

Dimensions: B = batch, T, H, W = latent frames, rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ursa.artifacts import TokenDataset
from ursa.data.shards import read_shards
from ursa.errors import DataExhaustedError


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


class TokenSamples:
    """All samples of a token data set, held in memory at 16 or 32 bits an id.

    Attributes:
        captions: One caption a sample.
        motion: Motion of the clip of each sample, px/s at 256 px width; None where not measured.
        sample_ids: Names of the samples, ascending.
        clip_ids: The clip of each sample.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        """Read and verify the shards.

        Args:
            dataset: The committed data set.

        Raises:
            ShardFormatError: If a shard is missing, damaged or of another schema.
            DataExhaustedError: If there is no sample.
            StorageError: If the store refuses or does not answer.
        """
        table = read_shards(dataset.shards, codebook_size=dataset.codebook_size)
        if not table.num_rows:
            raise DataExhaustedError(
                f"{dataset.manifest_uri}: no {dataset.split} {dataset.modality} samples; loosen "
                "the selection, shorten tokenization.num_frames or add videos"
            )
        # the order must depend neither on the division into shards nor on where they lie
        table = table.sort_by("sample_id")
        flat = table["visual_ids"].combine_chunks().flatten().to_numpy()
        self._ids = flat.reshape(table.num_rows, *dataset.latent_shape)
        self.captions: list[str] = table["caption"].to_pylist()
        self.motion: list[float | None] = table["motion_px_per_s"].to_pylist()
        self.sample_ids: list[str] = table["sample_id"].to_pylist()
        self.clip_ids: list[str] = table["clip_id"].to_pylist()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def spread(self, limit: int) -> list[int]:
        """Return at most `limit` positions, evenly spread, so that no clip fills them alone.

        Args:
            limit: Greatest number of positions.
        """
        return spread(len(self), limit)

    def code_counts(self, codebook_size: int) -> np.ndarray:
        """Return how often each code occurs.

        Args:
            codebook_size: V.

        Returns:
            Counts, shape (V,), int64.
        """
        return np.bincount(self._ids.ravel(), minlength=codebook_size)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the samples at the given positions as one batch.

        Args:
            indices: Positions in [0, number of samples), in any order.
        """
        return TokenBatch(
            visual_ids=torch.from_numpy(self._ids[list(indices)].astype(np.int64)),
            captions=tuple(self.captions[index] for index in indices),
            motion_px_per_s=tuple(self.motion[index] for index in indices),
            sample_ids=tuple(self.sample_ids[index] for index in indices),
        )


def step_indices(num_samples: int, *, step: int, batch_size: int, seed: int) -> list[int]:
    """Return the sample positions of a step: every sample once an epoch, epochs joined end to end.

    Args:
        num_samples: Size of the data set.
        step: Step number from 0.
        batch_size: Global batch size.
        seed: Decides the order, together with the epoch.
    """
    first = step * batch_size
    return [
        epoch_order(num_samples, position // num_samples, seed)[position % num_samples]
        for position in range(first, first + batch_size)
    ]


@lru_cache(maxsize=4)
def epoch_order(num_samples: int, epoch: int, seed: int) -> tuple[int, ...]:
    """Return the permutation of an epoch.

    Args:
        num_samples: Size of the data set.
        epoch: Epoch number from 0.
        seed: Decides the order, together with the epoch.

    Returns:
        Every sample position once.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    return tuple(int(index) for index in order)
