"""Training batches of any step, read ahead from shards that need not fit into memory.

There is no state to save: the batch of a step is computed from its number, and a rank takes its
slice of it. So a resumed run, or one on another number of workers, sees the same samples. Threads
read the next block of the order while the trainer learns from this one; they decide when a batch
is there, never what is in it.

Memory: two blocks, and the shards that are being read.
"""

import threading
from collections.abc import Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ursa.artifacts import TokenDataset
from ursa.data.dataset import (
    BATCH_COLUMNS,
    TokenBatch,
    join_batches,
    make_batch,
    shard_ids,
)
from ursa.data.order import BLOCK_BYTES, Block, SampleOrder, block_samples, shards_by_content
from ursa.data.schema import id_type
from ursa.data.shards import READ_THREADS, read_shard


@dataclass(frozen=True)
class _Held:
    """A block that is there or being read: the ids of each shard go to their place in one array."""

    ids: np.ndarray
    reads: list[Future[pa.Table]]

    @cached_property
    def columns(self) -> pa.Table:
        """All columns but the ids; waits for the shards."""
        return pa.concat_tables([read.result() for read in self.reads]).combine_chunks()

    @cached_property
    def by_name(self) -> np.ndarray:
        """Rows in the order of sample ids, which does not depend on the division into shards."""
        rows: np.ndarray = pc.sort_indices(self.columns["sample_id"]).to_numpy()
        return rows

    def raise_early(self) -> None:
        """Raise what a thread met, without waiting for the others."""
        for read in self.reads:
            if read.done():
                read.result()


class TokenLoader:
    """Batches of a token data set: every sample once an epoch, epochs joined end to end."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        block_bytes: int = BLOCK_BYTES,
        num_threads: int = READ_THREADS,
    ) -> None:
        """Plan the order; nothing is read here.

        Args:
            dataset: The committed data set.
            batch_size: Global batch size.
            num_steps: Nothing is read ahead for steps from this one on.
            seed: Decides the order, together with the epoch.
            block_bytes: Size of a block in memory; decides the order of larger data sets.
            num_threads: Shards read at the same time; does not matter to the order.

        Raises:
            DataExhaustedError: If there is no sample.
        """
        self._dataset = dataset
        self._shards = shards_by_content(dataset)
        self._batch_size = batch_size
        self._end = num_steps * batch_size
        self._order = SampleOrder(
            [shard.num_samples for shard in self._shards],
            block_samples=block_samples(dataset, block_bytes),
            seed=seed,
        )
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="shards")
        self._held: dict[tuple[int, ...], _Held] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int, share: slice = slice(None)) -> TokenBatch:
        """Return the samples of a step; waits for shards that are not there yet.

        Args:
            step: Step number from 0; steps in ascending order are read ahead, any other works too.
            share: This rank's part of the global batch.

        Raises:
            ShardFormatError: If a shard of this block or the next is missing or damaged.
            StorageError: If the store refuses or does not answer.
        """
        first = step * self._batch_size
        positions = range(first, first + self._batch_size)[share]
        with self._lock:
            try:
                return join_batches(list(self._parts(positions)))
            except BaseException:
                self._let_go(set())  # the next call reads again
                raise

    def close(self) -> None:
        """Stop reading: what has not begun is dropped, what has is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _parts(self, positions: range) -> Iterator[TokenBatch]:
        """Yield the samples at some positions, block by block."""
        while positions:
            epoch, number, place = self._order.find(positions[0])
            block = self._order.blocks(epoch)[number]
            count = min(len(positions), block.num_samples - place)
            held = self._hold(block, following=self._following(epoch, number))
            rows = held.by_name[self._order.places(epoch, number)[place : place + count]]
            yield make_batch(held.ids, held.columns, rows)
            positions = positions[count:]

    def _following(self, epoch: int, number: int) -> Block | None:
        """Return the block after a block; None if no step needs it."""
        block = self._order.blocks(epoch)[number]
        if epoch * self._order.num_samples + block.start + block.num_samples >= self._end:
            return None
        blocks = self._order.blocks(epoch)
        return blocks[number + 1] if number + 1 < len(blocks) else self._order.blocks(epoch + 1)[0]

    def _hold(self, block: Block, *, following: Block | None) -> _Held:
        """Return a block, and have the next one read; all others are let go."""
        wanted = [block] if following is None else [block, following]
        self._let_go({each.shards for each in wanted})
        for each in wanted:
            if each.shards in self._held:
                self._held[each.shards].raise_early()
            else:
                self._held[each.shards] = self._begin(each)
        return self._held[block.shards]

    def _let_go(self, wanted: Set[tuple[int, ...]]) -> None:
        """Forget all blocks but some."""
        for shards in self._held.keys() - wanted:
            for read in self._held.pop(shards).reads:
                read.cancel()

    def _begin(self, block: Block) -> _Held:
        """Let the threads read the shards of a block."""
        shape = (block.num_samples, *self._dataset.latent_shape)
        ids = np.empty(shape, id_type(self._dataset.codebook_size))
        reads, start = [], 0
        for shard in block.shards:
            end = start + self._shards[shard].num_samples
            reads.append(self._pool.submit(self._read, shard, ids[start:end]))
            start = end
        return _Held(ids, reads)

    def _read(self, shard: int, ids: np.ndarray) -> pa.Table:
        """Read one shard: its ids go to their place, the other columns are returned."""
        info = self._shards[shard]
        size = self._dataset.codebook_size
        table = read_shard(info, codebook_size=size, columns=["visual_ids", *BATCH_COLUMNS])
        ids[:] = shard_ids(table, self._dataset.latent_shape, info.uri)
        return table.drop_columns("visual_ids")
