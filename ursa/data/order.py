"""The order of samples: a pure function of seed, epoch and the shards that a manifest lists.

Shards are shuffled and joined to blocks of about `BLOCK_BYTES`; samples are shuffled within their
block. A reader holds blocks, not data sets, and any position of any epoch is found by arithmetic.
A data set that fits into one block is shuffled as a whole: there the division into shards does not
count.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ursa.artifacts import ShardInfo, TokenDataset
from ursa.data.schema import id_type
from ursa.errors import DataExhaustedError

BLOCK_BYTES = 256 << 20
"""Size of a block in memory. It decides the order of larger data sets, so a change of it is one of
the schema version. No setting: a block of thousands of samples out of shuffled shards mixes well
enough, and two of them a process are little beside a model."""
_TEXT_BYTES = 512
"""Name and caption of a sample, about; what counts for images, whose ids are few."""


class Block(NamedTuple):
    """Samples that are shuffled together.

    Attributes:
        shards: Positions of its shards, ascending.
        start: Position of its first sample in the epoch.
        num_samples: How many samples it has.
    """

    shards: tuple[int, ...]
    start: int
    num_samples: int


def shards_by_content(dataset: TokenDataset) -> tuple[ShardInfo, ...]:
    """Return the shards that hold samples, by hash: neither their place nor their order counts.

    Args:
        dataset: The committed data set.

    Raises:
        DataExhaustedError: If there is no sample.
    """
    shards = [shard for shard in dataset.shards if shard.num_samples]
    if not shards:
        raise DataExhaustedError(
            f"{dataset.manifest_uri}: no {dataset.split} {dataset.modality} samples; loosen the "
            "selection, shorten tokenization.num_frames or add videos"
        )
    return tuple(sorted(shards, key=lambda shard: shard.sha256))


def block_samples(dataset: TokenDataset, block_bytes: int = BLOCK_BYTES) -> int:
    """Return how many samples a block has at most, unless a single shard has more.

    Args:
        dataset: The committed data set; the size of a sample matters.
        block_bytes: Size of a block in memory.
    """
    id_bytes = np.dtype(id_type(dataset.codebook_size)).itemsize
    num_ids = math.prod(dataset.latent_shape)
    return max(1, block_bytes // (id_bytes * num_ids + _TEXT_BYTES))


class SampleOrder:
    """Where each position of the endless stream of epochs is found.

    Attributes:
        num_samples: Samples an epoch.
    """

    def __init__(self, shard_sizes: Sequence[int], *, block_samples: int, seed: int) -> None:
        """Note the sizes; nothing is computed here.

        Args:
            shard_sizes: Samples of each shard, each at least 1.
            block_samples: A block has no more samples, unless it is a single shard.
            seed: Decides the order, together with the epoch.
        """
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes)
        self._limit = block_samples
        self._seed = seed
        self.blocks = lru_cache(maxsize=4)(self._blocks)
        self.places = lru_cache(maxsize=4)(self._places)

    def find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, number of the block, place among the block's shuffled samples).

        Args:
            position: Place in the stream from 0: epochs joined end to end.
        """
        epoch, offset = divmod(position, self.num_samples)
        blocks = self.blocks(epoch)
        number = int(np.searchsorted([block.start for block in blocks], offset, side="right")) - 1
        return epoch, number, offset - blocks[number].start

    def _blocks(self, epoch: int) -> tuple[Block, ...]:
        """Return the blocks of an epoch in their order."""
        if self.num_samples <= self._limit:
            return (Block(tuple(range(len(self._sizes))), 0, self.num_samples),)
        blocks, start, count = [], 0, 0
        members: list[int] = []
        for shard in np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes)):
            size = int(self._sizes[shard])
            if members and count + size > self._limit:
                blocks.append(Block(tuple(sorted(members)), start, count))
                members, start, count = [], start + count, 0
            members.append(int(shard))
            count += size
        return (*blocks, Block(tuple(sorted(members)), start, count))

    def _places(self, epoch: int, number: int) -> np.ndarray:
        """Return the permutation of a block's samples, shape (samples of the block,), int64."""
        blocks = self.blocks(epoch)
        # the permutation of shards has the address without a block
        address = [epoch] if len(blocks) == 1 else [epoch, 1 + number]
        size = blocks[number].num_samples
        return np.random.default_rng([self._seed, *address]).permutation(size)
