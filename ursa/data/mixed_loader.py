"""Batches from several data sets: buckets of one stage, and images among videos.

Each batch is of one data set, so of one latent shape. Which data set a step takes is a pure
function of the sizes and the step; inside each, every sample comes once an epoch and epochs are
joined end to end (`ursa.data.loader`), so no sample is left out, also of a bucket with fewer
samples than a batch.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from ursa.artifacts import TokenDataset
from ursa.config import bucket_batch_size
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenBatch
from ursa.data.loader import TokenLoader
from ursa.data.order import BLOCK_BYTES
from ursa.data.shards import READ_THREADS
from ursa.errors import DataExhaustedError


class Part(NamedTuple):
    """One of the data sets that steps are taken from.

    Attributes:
        dataset: The committed data set.
        batch_size: Samples a step over all workers.
        share: Share of all steps, in (0, 1].
    """

    dataset: TokenDataset
    batch_size: int
    share: float


def plan_parts(
    videos_or_images: Sequence[TokenDataset],
    images: Sequence[TokenDataset] = (),
    *,
    batch_size: int,
    image_share: float = 0.0,
    known: Collection[TokenDataset] = (),
    new_share: float | None = None,
) -> list[Part]:
    """Return the data sets that have samples, with the batch size and share of steps of each.

    A batch of another size has about as many tokens as one of the main size: a multiple of its
    samples, or a whole part of them. Buckets have as many steps as they have batches, so that all
    come to the end of an epoch together.

    Args:
        videos_or_images: Data sets of the stage by bucket; the first is of the main size.
        images: Data sets of images that a stage on videos sees as well.
        batch_size: Samples a step of the main size.
        image_share: Share of steps on `images`, in [0, 1); 0 without any.
        known: Data sets that the weights were trained on before.
        new_share: Share of the other steps on shards of none of these, in (0, 1]; None, or where
            all shards are new or none is, treats all alike.

    Returns:
        At least one part; the shares add up to 1.

    Raises:
        DataExhaustedError: If there is no sample, or no image though some are wanted.
    """
    own = _with_samples(videos_or_images, batch_size)
    if image_share == 0:
        return _split_shared(own, 1.0, known, new_share)
    # as many images a step as there are samples: an image has fewer tokens than a video
    others = [(dataset, batch_size) for dataset in images if dataset.num_samples]
    if not others:
        raise DataExhaustedError(
            f"{videos_or_images[0].manifest_uri}: no image samples, though image_fraction is "
            f"{image_share:g}; set it to 0 or add videos"
        )
    return [
        *_split_shared(own, 1 - image_share, known, new_share),
        *_shared(others, image_share),
    ]


def _with_samples(
    datasets: Sequence[TokenDataset], batch_size: int
) -> list[tuple[TokenDataset, int]]:
    main = math.prod(datasets[0].latent_shape)
    found = [
        (dataset, bucket_batch_size(batch_size, main, math.prod(dataset.latent_shape)))
        for dataset in datasets
        if dataset.num_samples
    ]
    if not found:
        first = datasets[0]
        raise DataExhaustedError(
            f"{first.manifest_uri}: no {first.split} {first.modality} samples; loosen the "
            "selection, shorten tokenization.num_frames or add videos"
        )
    return found


def _split_shared(
    parts: Sequence[tuple[TokenDataset, int]],
    share: float,
    known: Collection[TokenDataset],
    new_share: float | None,
) -> list[Part]:
    """Share steps among the parts, new shards apart from those that are replayed."""
    seen = {shard.sha256 for dataset in known for shard in dataset.shards}
    if new_share is None or not seen:
        return _shared(parts, share)
    fresh: list[tuple[TokenDataset, int]] = []
    replayed: list[tuple[TokenDataset, int]] = []
    for dataset, size in parts:
        for half, is_known in ((fresh, False), (replayed, True)):
            own = [shard for shard in dataset.shards if (shard.sha256 in seen) == is_known]
            if own:
                half.append((dataset.with_shards(own), size))
    if not fresh or not replayed:
        return _shared(parts, share)
    if new_share == 1:
        return _shared(fresh, share)
    return [*_shared(fresh, share * new_share), *_shared(replayed, share * (1 - new_share))]


def _shared(parts: Sequence[tuple[TokenDataset, int]], share: float) -> list[Part]:
    batches = [dataset.num_samples / size for dataset, size in parts]
    return [
        Part(dataset, size, share * count / sum(batches))
        for (dataset, size), count in zip(parts, batches, strict=True)
    ]


def step_parts(shares: Sequence[float], num_steps: int) -> np.ndarray:
    """Return which part each step takes: one step of each first, then evenly spread.

    The first steps leave out no part, however small its share. Fewer steps are the beginning of
    more.

    Args:
        shares: Share of steps of each part, positive, adding up to 1.
        num_steps: How many steps.

    Returns:
        Numbers of parts, shape (num_steps,), int64. After n steps each part has been taken its
        share of n times, to within the number of parts.
    """
    taken = np.zeros(len(shares))
    wanted = np.asarray(shares, float)
    parts = np.zeros(num_steps, np.int64)
    if len(shares) == 1:
        return parts
    for step in range(num_steps):
        # after one of each, the one that is furthest behind; of several the first
        behind = np.round(wanted * (step + 1) - taken, 9)
        part = step if step < len(shares) else int(np.argmax(behind))
        taken[part] += 1
        parts[step] = part
    return parts


class MixedLoader:
    """Batches of several token data sets, one data set a step; see `TokenLoader`.

    Attributes:
        num_main_tokens: Tokens of a sample of the main size.
        batch_sizes: Samples a step that there are, rising.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        num_main_tokens: int,
        num_steps: int,
        seed: int,
        block_bytes: int = BLOCK_BYTES,
        num_threads: int = READ_THREADS,
    ) -> None:
        """Plan the order; nothing is read here.

        Args:
            parts: Result of `plan_parts`.
            num_main_tokens: Tokens of a sample of the main size.
            num_steps: Nothing is read ahead for steps from this one on.
            seed: Decides the order, together with the epoch.
            block_bytes: Size of a block in memory; decides the order of larger data sets.
            num_threads: Shards of a data set read at the same time; does not matter to the order.
        """
        self.num_main_tokens = num_main_tokens
        self.batch_sizes = tuple(sorted({part.batch_size for part in parts}))
        self._parts = parts
        self._taken = step_parts([part.share for part in parts], num_steps)
        self._place = np.zeros(num_steps, np.int64)
        for number in range(len(parts)):
            own = self._taken == number
            self._place[own] = np.arange(own.sum())
        sizes = np.array([part.batch_size for part in parts])
        self._seen = np.concatenate([[0], np.cumsum(sizes[self._taken])])
        self._loaders = [
            TokenLoader(
                part.dataset,
                batch_size=part.batch_size,
                num_steps=int((self._taken == number).sum()),
                # alone, or the main size: the order of a stage without buckets
                seed=address_seed(seed, "part", number) if number else seed,
                block_bytes=block_bytes,
                num_threads=num_threads,
            )
            for number, part in enumerate(parts)
        ]

    def batch_size(self, step: int) -> int:
        """Return the number of samples of a step over all workers.

        Args:
            step: Step number from 0.
        """
        return self._parts[int(self._taken[step])].batch_size

    def samples_seen(self, num_steps: int) -> int:
        """Return the number of samples of the first steps.

        Args:
            num_steps: How many steps have been done.
        """
        return int(self._seen[num_steps])

    def batch(self, step: int, share: slice = slice(None)) -> TokenBatch:
        """Return the samples of a step; waits for shards that are not there yet.

        Args:
            step: Step number from 0, below the number of steps.
            share: This rank's part of the global batch.

        Raises:
            ShardFormatError: If a shard of this block or the next is missing or damaged.
            StorageError: If the store refuses or does not answer.
        """
        return self._loaders[int(self._taken[step])].batch(int(self._place[step]), share)

    def close(self) -> None:
        """Stop reading: what has not begun is dropped, what has is waited for."""
        for loader in self._loaders:
            loader.close()
