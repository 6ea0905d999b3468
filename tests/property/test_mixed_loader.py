"""Batches of several sizes: every sample comes once an epoch, whatever the sizes."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import factories
from ursa.artifacts import TokenDataset
from ursa.data.mixed_loader import MixedLoader, plan_parts, step_parts
from ursa.data.shards import write_shard
from ursa.errors import DataExhaustedError

SHAPES = ((2, 2, 3), (1, 2, 3), (2, 4, 3), (3, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shards"))


def dataset_of(folder: str, bucket: int, count: int, modality: str = "video") -> TokenDataset:
    shape = SHAPES[bucket]
    rows = [
        {
            **row,
            "sample_id": f"{modality}-{bucket}-{number:03d}",
            "num_latent_frames": shape[0],
            "num_rows": shape[1],
            "num_columns": shape[2],
            "visual_ids": [number % 60] * math.prod(shape),
        }
        for number, row in enumerate(factories.token_rows("video", count))
    ]
    shards = [
        write_shard(rows[start : start + 5], f"{folder}/{modality}-{bucket}", codebook_size=60)
        for start in range(0, count, 5)
    ]
    return TokenDataset(
        manifest_uri=f"{folder}/manifest.json",
        modality=modality,
        split="train",
        bucket=bucket,
        num_samples=count,
        num_tokens=count * math.prod(shape),
        codebook_size=60,
        visual_tokenizer_fingerprint="f",
        latent_shape=shape,
        shards=tuple(shards),
        schema_version=3,
        fingerprint="f",
    )


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@example([0, 1, 6], 5, 0)  # a tenth of a batch an epoch
@given(
    st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(any),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_every_sample_comes_once_an_epoch_of_its_bucket(folder, counts, batch_size, seed):
    datasets = [dataset_of(folder, bucket, count) for bucket, count in enumerate(counts)]
    parts = plan_parts(datasets, batch_size=batch_size)
    assert [part.dataset.bucket for part in parts] == [i for i, count in enumerate(counts) if count]
    # a step of each comes first; after that none is behind by more steps than there are parts
    num_steps = 6 * sum(-(-part.dataset.num_samples // part.batch_size) for part in parts) + 8
    loader = MixedLoader(parts, num_main_tokens=12, num_steps=num_steps, seed=seed)
    seen: dict[int, list[str]] = {part.dataset.bucket: [] for part in parts}
    for step in range(num_steps):
        batch = loader.batch(step)
        (bucket,) = {int(name.split("-")[1]) for name in batch.sample_ids}
        assert len(batch.sample_ids) == loader.batch_size(step)
        assert tuple(batch.visual_ids.shape[1:]) == SHAPES[bucket]
        seen[bucket] += batch.sample_ids
    loader.close()
    assert loader.samples_seen(num_steps) == sum(map(len, seen.values()))
    for part in parts:
        names, count = seen[part.dataset.bucket], part.dataset.num_samples
        assert len(names) >= count, "a bucket was left out"
        for start in range(0, len(names) - count + 1, count):
            assert len(set(names[start : start + count])) == count


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 40), st.integers(0, 2**32))
def test_a_step_is_the_same_wherever_a_run_begins_and_however_it_is_shared(folder, step, seed):
    datasets = [dataset_of(folder, bucket, count) for bucket, count in enumerate((9, 4, 7))]
    parts = plan_parts(datasets, batch_size=4)

    def ids(*slices: slice) -> list[str]:
        loader = MixedLoader(parts, num_main_tokens=12, num_steps=50, seed=seed)
        names = [name for part in slices for name in loader.batch(step, part).sample_ids]
        loader.close()
        return names

    size = MixedLoader(parts, num_main_tokens=12, num_steps=50, seed=seed).batch_size(step)
    halves = (slice(0, size // 2), slice(size // 2, size)) if size > 1 else (slice(None),)
    through = MixedLoader(parts, num_main_tokens=12, num_steps=50, seed=seed)
    for before in range(step):
        through.batch(before)
    assert ids(slice(None)) == ids(*halves) == list(through.batch(step).sample_ids)
    through.close()


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 300))
def test_steps_are_shared_out_evenly_all_the_way(weights, num_steps):
    shares = [weight / sum(weights) for weight in weights]
    taken: Counter[int] = Counter()
    for step, part in enumerate(step_parts(shares, num_steps).tolist()):
        taken[part] += 1
        for number, share in enumerate(shares):
            assert abs(taken[number] - share * (step + 1)) < len(shares)
    assert len(taken) == min(len(shares), num_steps), "a part was left out"
    longer = step_parts(shares, num_steps + 7)
    np.testing.assert_array_equal(longer[:num_steps], step_parts(shares, num_steps))


def test_batches_have_about_as_many_tokens(folder):
    datasets = [dataset_of(folder, bucket, 10) for bucket in range(4)]
    parts = plan_parts(datasets, batch_size=12)
    assert [part.batch_size for part in parts] == [12, 24, 6, 6]
    assert sum(part.share for part in parts) == pytest.approx(1)


def test_images_among_videos_have_their_share_of_the_steps(folder):
    videos = [dataset_of(folder, 0, 10), dataset_of(folder, 2, 10)]
    images = [dataset_of(folder, 1, 10, "image")]
    parts = plan_parts(videos, images, batch_size=4, image_share=0.25)
    taken = step_parts([part.share for part in parts], 400)
    assert (taken == 2).sum() == 100
    with pytest.raises(DataExhaustedError, match=r"image_fraction is 0\.25; set it to 0"):
        plan_parts(videos, batch_size=4, image_share=0.25)


def test_nothing_at_all_is_an_error_that_says_what_to_do(folder):
    with pytest.raises(DataExhaustedError, match="no train video samples; loosen"):
        plan_parts([dataset_of(folder, 0, 0)], batch_size=4)


def test_new_samples_have_their_share_and_old_ones_are_replayed(folder):
    """Of 20 shards 4 are new: half of the steps are theirs, and every sample comes."""
    whole = dataset_of(folder, 0, 100)
    known = whole.with_shards(whole.shards[4:])
    parts = plan_parts([whole], batch_size=4, known=[known], new_share=0.5)
    assert [part.dataset.num_samples for part in parts] == [20, 80]
    assert [part.share for part in parts] == [0.5, 0.5]
    loader = MixedLoader(parts, num_main_tokens=12, num_steps=40, seed=3)
    seen = Counter(name for step in range(40) for name in loader.batch(step).sample_ids)
    loader.close()
    new = {f"video-0-{number:03d}" for number in range(20)}
    assert sum(seen[name] for name in new) == 80
    assert len(seen) == 100
    assert max(seen.values()) == 4


@pytest.mark.parametrize("known_from", [0, 20])
def test_where_nothing_or_everything_is_new_all_are_taken_alike(folder, known_from):
    whole = dataset_of(folder, 0, 100)
    known = whole.with_shards(whole.shards[known_from:])
    (part,) = plan_parts([whole], batch_size=4, known=[known], new_share=0.5)
    assert (part.dataset, part.share) == (whole, 1.0)


def test_a_share_of_one_replays_nothing(folder):
    whole = dataset_of(folder, 0, 100)
    known = whole.with_shards(whole.shards[4:])
    (part,) = plan_parts([whole], batch_size=4, known=[known], new_share=1.0)
    assert (part.dataset.num_samples, part.share) == (20, 1.0)
