"""Batches are a function of seed, step and manifest, whatever reads them and in which order."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import factories
from ursa.artifacts import ShardInfo, TokenDataset
from ursa.data.dataset import TokenBatch, TokenSamples, join_batches
from ursa.data.loader import TokenLoader
from ursa.data.order import SampleOrder
from ursa.data.shards import write_shard
from ursa.training.distributed import Group

SAMPLE_BYTES = 2 * 12 + 512
"""What a sample of the factories counts as in a block."""
few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=12)


class Pool(NamedTuple):
    """Shards to choose from, and all their samples by name."""

    shards: list[ShardInfo]
    samples: TokenSamples
    dataset: TokenDataset


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    root = str(tmp_path_factory.mktemp("pool"))
    sizes = [1, 2, 3, 4, 5, 1, 7, 2, 3, 6]
    rows = factories.token_rows("video", sum(sizes))
    np.random.default_rng(1).shuffle(rows)  # names of a shard need not follow one another
    ends = np.cumsum(sizes)
    shards = [
        write_shard(rows[end - size : end], f"{root}/s", codebook_size=60)
        for size, end in zip(sizes, ends, strict=True)
    ]
    dataset = factories.write_dataset(root, "video", "train", 2)
    every = dataset.model_copy(update={"shards": tuple(shards), "num_samples": sum(sizes)})
    return Pool(shards, TokenSamples(every), every)


def equal(one: TokenBatch, other: TokenBatch) -> bool:
    return torch.equal(one.visual_ids, other.visual_ids) and (
        (one.sample_ids, one.captions, one.motion_px_per_s)
        == (other.sample_ids, other.captions, other.motion_px_per_s)
    )


@few
@given(sizes=sizes_of_shards, limit=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=...)
def test_blocks_divide_the_shards_of_an_epoch(sizes, limit, seed, epoch: bool):
    order = SampleOrder(sizes, block_samples=limit, seed=seed)
    blocks = order.blocks(int(epoch))
    assert sorted(itertools.chain(*(block.shards for block in blocks))) == list(range(len(sizes)))
    start = 0
    for number, block in enumerate(blocks):
        assert block.start == start
        assert block.num_samples == sum(sizes[shard] for shard in block.shards)
        assert block.num_samples <= limit or len(block.shards) == 1
        places = order.places(int(epoch), number)
        assert sorted(places.tolist()) == list(range(block.num_samples))
        for place in (0, block.num_samples - 1):
            position = int(epoch) * sum(sizes) + start + place
            assert order.find(position) == (int(epoch), number, place)
        start += block.num_samples
    assert start == sum(sizes)
    # a block is not closed before the next shard would be too many
    for block, following in itertools.pairwise(blocks):
        assert block.num_samples + max(sizes[shard] for shard in following.shards) > limit


@few
@given(sizes=sizes_of_shards, seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_what_fits_into_a_block_is_permuted_as_a_whole(sizes, seed, epoch):
    count = sum(sizes)
    order = SampleOrder(sizes, block_samples=count, seed=seed)
    expected = np.random.default_rng([seed, epoch]).permutation(count)
    assert len(order.blocks(epoch)) == 1
    assert np.array_equal(order.places(epoch, 0), expected)


def test_epochs_seeds_and_blocks_differ_in_order():
    def stream(seed, epoch, limit):
        order = SampleOrder([10] * 12, block_samples=limit, seed=seed)
        blocks = order.blocks(epoch)
        places = [tuple(order.places(epoch, number).tolist()) for number in range(len(blocks))]
        assert len(set(places)) == len(places)
        return tuple(block.shards for block in blocks), tuple(places)

    streams = {
        stream(seed, epoch, limit) for seed in range(3) for epoch in range(3) for limit in (30, 99)
    }
    assert len(streams) == 18


@few
@given(
    chosen=st.sets(st.integers(0, 9), min_size=1),
    block=st.integers(1, 40),
    per_rank=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3, 4]),
    num_threads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**63),
    data=st.data(),
)
def test_batches_are_a_function_of_the_step(
    pool, chosen, block, per_rank, world_size, num_threads, seed, data
):
    shards = tuple(pool.shards[index] for index in sorted(chosen))
    count = sum(shard.num_samples for shard in shards)
    size = per_rank * world_size
    num_steps = -(-2 * count // size)
    dataset = pool.dataset.model_copy(update={"shards": shards, "num_samples": count})

    def loader(of=dataset, threads=1):
        return TokenLoader(
            of,
            batch_size=size,
            num_steps=num_steps,
            seed=seed,
            block_bytes=block * SAMPLE_BYTES,
            num_threads=threads,
        )

    with loader() as plain:
        batches = [plain.batch(step) for step in range(num_steps)]
    # every sample once an epoch, and what belongs to it
    names = [name for batch in batches for name in batch.sample_ids]
    expected = [pool.samples.sample_ids.index(name) for name in names]
    assert equal(join_batches(batches), pool.samples.batch(expected))
    for epoch in range(2):
        assert len(set(names[epoch * count : (epoch + 1) * count])) == count
    # any number of ranks and threads, from any step on, in any order, shards listed otherwise
    turned = dataset.model_copy(update={"shards": shards[::-1]})
    groups = [Group(rank, world_size) for rank in range(world_size)]
    first = data.draw(st.integers(0, num_steps - 1))
    steps = [*range(first, num_steps), *data.draw(st.permutations(range(num_steps)))[:3]]
    for of in (dataset, turned):
        with loader(of, num_threads) as other:
            for step in steps:
                parts = [other.batch(step, group.share(size)) for group in groups]
                assert equal(join_batches(parts), batches[step])


@few
@given(block=st.integers(1, 99), split=st.integers(1, 9), seed=st.integers(0, 99))
def test_new_shards_make_a_new_order_of_old_and_new_samples(pool, block, split, seed):
    old = pool.dataset.model_copy(update={"shards": tuple(pool.shards[:split])})
    num_old = sum(shard.num_samples for shard in old.shards)

    def names(dataset, count):
        with TokenLoader(
            dataset, batch_size=1, num_steps=count, seed=seed, block_bytes=block * SAMPLE_BYTES
        ) as loader:
            return [loader.batch(step).sample_ids[0] for step in range(count)]

    before, after = names(old, num_old), names(pool.dataset, len(pool.samples))
    assert sorted(after) == pool.samples.sample_ids
    assert set(before) < set(after)
    # where samples of one shard lie beside one another is decided by the whole list of shards
    assert after == names(pool.dataset, len(pool.samples))
