from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import factories
from ursa.artifacts import Clip, VideoInfo
from ursa.config import SampleSize
from ursa.data.buckets import bucket_settings, choose_bucket, kept_share, sample_sizes
from ursa.data.clips import clip_windows
from ursa.errors import ConfigError

WIDE, TALL, SMALL, LONG = (
    SampleSize(num_frames=9, height_px=56, width_px=96),
    SampleSize(num_frames=9, height_px=96, width_px=56),
    SampleSize(num_frames=9, height_px=32, width_px=56),
    SampleSize(num_frames=33, height_px=56, width_px=96),
)


@pytest.fixture(scope="module")
def a_clip(tmp_path_factory) -> Clip:
    path = Path(tmp_path_factory.mktemp("clip")) / "a.mp4"
    path.write_bytes(b"a")
    return factories.clip_of(path, caption="", info=info_of(320, 180, 48))


def info_of(width: int, height: int, frames: int) -> VideoInfo:
    return VideoInfo(
        width_px=width,
        height_px=height,
        fps=24.0,
        num_frames=frames,
        duration_s=frames / 24,
        codec="h264",
    )


def settings_of(main: SampleSize, *extra: SampleSize):
    config = factories.tiny_config(
        {
            "tokenization": {
                **main.model_dump(),
                "fps": 8.0,
                "extra_buckets": [size.model_dump() for size in extra],
            }
        }
    )
    return config.tokenization


@pytest.mark.parametrize(
    ("width", "height", "frames", "bucket"),
    [
        (320, 180, 48, 0),
        (180, 320, 48, 1),
        (64, 36, 48, 2),  # the main size would enlarge it
        (320, 180, 24 * 5, 3),  # long enough for long samples
        (180, 320, 24 * 5, 1),
        (40, 22, 48, 2),  # every size enlarges it: the smallest
        (320, 180, 6, 3),  # too short for all: by the picture alone
    ],
)
def test_a_clip_goes_where_most_of_it_is_kept(a_clip, width, height, frames, bucket):
    clip = a_clip.model_copy(update={"info": info_of(width, height, frames)})
    assert choose_bucket(clip, settings_of(WIDE, TALL, SMALL, LONG)) == bucket


SIZES = st.builds(
    SampleSize,
    num_frames=st.integers(1, 12).map(lambda k: 1 + 4 * k),
    height_px=st.integers(2, 12).map(lambda k: 8 * k),
    width_px=st.integers(2, 12).map(lambda k: 8 * k),
)


@given(
    st.lists(SIZES, min_size=1, max_size=5, unique=True),
    st.integers(16, 400),
    st.integers(16, 400),
    st.integers(1, 200),
)
def test_every_clip_has_one_bucket_and_none_that_loses_more(a_clip, sizes, width, height, frames):
    clip = a_clip.model_copy(update={"info": info_of(width, height, frames)})
    settings = settings_of(*sizes)
    chosen = choose_bucket(clip, settings)
    number = {
        place: len(list(clip_windows(clip, bucket_settings(settings, place))))
        for place in range(len(sizes))
    }
    if any(number.values()):
        assert number[chosen]
    for place, size in enumerate(sample_sizes(settings)):
        if bool(number[place]) == bool(number[chosen]):
            assert kept_share(clip, size) < kept_share(clip, sizes[chosen]) + 0.05
    # the order of the further buckets does not matter, but to break ties
    assert sample_sizes(bucket_settings(settings, chosen)) == (sizes[chosen],)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 8}, r"extra_buckets\.0\.num_frames must be 1 \+ 4k, got 8"),
        ({"width_px": 50}, r"extra_buckets\.0\.width_px must be divisible by 8, got 50"),
        ({}, r"extra_buckets\.0 is there twice"),
    ],
)
def test_wrong_sizes_are_refused(size, message):
    config = {"extra_buckets": [{**WIDE.model_dump(), **size}]}
    with pytest.raises(ConfigError, match=message):
        factories.tiny_config({"tokenization": {**WIDE.model_dump(), **config}})
