"""Distances of histograms with known answers, and what of clips goes into them."""

import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon

from tests import factories
from ursa.artifacts import Clip, ClipScores, VideoInfo
from ursa.config import fingerprint
from ursa.data.clips import CLIP_SCHEMA, clip_row
from ursa.drift import CAPTION_WORDS, distances, divergence, measure_drift
from ursa.errors import DataError

INFO = VideoInfo(width_px=64, height_px=48, fps=12.0, num_frames=18, duration_s=1.5, codec="h264")


def clip(file, index=0, caption="a tree", extra=None, **scores):
    return Clip(
        clip_id=fingerprint("clip", file, index)[:32],
        source_uri=f"file:///videos/{file}.mp4",
        source_sha256=hashlib.sha256(str(file).encode()).hexdigest(),
        start_s=0.0,
        end_s=1.5,
        media_uri="file:///gone.mp4",
        media_sha256="0" * 64,
        info=INFO,
        scores=ClipScores(**dict.fromkeys(ClipScores.model_fields) | scores),
        extra_scores=extra or {},
        caption=caption,
    )


def table(clips):
    return pa.Table.from_pylist([clip_row(item) for item in clips], schema=CLIP_SCHEMA)


def of_values(values, first=0, name="sharpness"):
    """A table of clips, each of a file of its own."""
    return table([clip(first + i, **{name: value}) for i, value in enumerate(values)])


@pytest.mark.parametrize(
    ("these", "rest", "bits"),
    [
        ([1, 1], [5, 5], 0.0),
        ([1, 0], [0, 1], 1.0),
        # entropy of (3/4, 1/4) less half that of (1/2, 1/2)
        ([1, 1], [1, 0], 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4) - 0.5),
        ([1, 0], [1, 1], 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4) - 0.5),
        # a bin that both lack changes nothing
        ([1, 1, 0], [1, 0, 0], 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4) - 0.5),
        ([0, 0], [1, 0], 0.0),
    ],
)
def test_divergence_has_its_known_values(these, rest, bits):
    assert divergence(np.array([rest, these]), np.array([1])) == pytest.approx(bits)


def test_divergence_is_that_of_scipy():
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 9, (30, 7))
    expected = jensenshannon(counts[:10].sum(0), counts[10:].sum(0), base=2) ** 2
    assert divergence(counts, np.arange(10)) == pytest.approx(expected)


@pytest.mark.parametrize("number", [5, 40, 300])
def test_clips_of_one_distribution_do_not_differ(number):
    rng = np.random.default_rng(number)
    clips = of_values(rng.normal(size=300 + 8 * number))
    reference = clips.slice(0, 300)
    found = [distances(reference, clips.slice(300 + i * number, number)) for i in range(8)]
    # by chance one in a hundred does
    assert sum(item["sharpness"] > 0 for item in found) <= 1


def test_another_mean_is_seen_and_more_of_it_with_more_clips():
    rng = np.random.default_rng(1)
    reference = of_values(rng.normal(size=1000))
    few, more = (
        distances(reference, of_values(rng.normal(1, size=n), first=2000))["sharpness"]
        for n in (60, 1000)
    )
    # that of two normal distributions a standard deviation apart
    assert more == pytest.approx(0.401, abs=0.05)
    assert 0.1 < few < more


def test_of_a_handful_of_files_nothing_can_be_said():
    assert distances(of_values([1.0, 2.0, 3.0]), of_values([9.0], first=10))["sharpness"] == 0


def test_values_that_are_many_have_a_bin_of_their_own():
    reference = of_values([0.0] * 200, name="black_fraction")
    same = distances(reference, of_values([0.0] * 100, first=500, name="black_fraction"))
    assert same == dict.fromkeys(
        ("duration_s", "width_px", "height_px", "fps", "black_fraction", CAPTION_WORDS), 0.0
    )
    for value in (-0.5, 1e-9, 0.5):
        new = of_values([value] * 100, first=500, name="black_fraction")
        assert distances(reference, new)["black_fraction"] > 0.95
    half = of_values([0.0, 0.5] * 50, first=500, name="black_fraction")
    # the square root of 0.311, and somewhat less
    assert distances(reference, half)["black_fraction"] == pytest.approx(0.54, abs=0.03)


def test_missing_values_are_a_bin_and_scores_of_one_side_alone_are_left_out():
    reference = of_values([1.0] * 200)
    some = of_values([1.0, None] * 50, first=500)
    assert distances(reference, some)["sharpness"] > 0.5
    none = of_values([None] * 100, first=500)
    assert "sharpness" not in distances(reference, none)
    assert "luminance" not in distances(
        reference, of_values([1.0] * 100, first=500, name="luminance")
    )


def test_clips_of_one_file_say_less_than_those_of_many():
    values = np.linspace(0, 1, 40)
    # ten clips a file, all alike
    reference = table([clip(i, j, sharpness=v) for i, v in enumerate(values) for j in range(10)])
    of_one = table([clip("x", j, sharpness=0.5) for j in range(40)])
    of_many = of_values([0.5] * 40, first=500)
    assert distances(reference, of_one)["sharpness"] == 0
    assert distances(reference, of_many)["sharpness"] > 0.5


def test_extra_scores_and_words_of_captions_are_compared():
    def clips(first, word, value):
        return table(
            [clip(first + i, caption=f"A {word}", extra={"a/b": value}) for i in range(100)]
        )

    same = distances(clips(0, "tree", 1.0), clips(500, "Tree", 1.0))
    assert (same["a/b"], same[CAPTION_WORDS]) == (0, 0)
    other = distances(clips(0, "tree", 1.0), clips(500, "cat", 2.0))
    assert other["a/b"] > 0.95
    assert other[CAPTION_WORDS] == pytest.approx(math.sqrt(0.5), abs=0.03)  # every second word


def test_only_kept_clips_that_are_new_are_compared_with_those_to_train_on(tmp_path):
    known = [clip(i, sharpness=1.0) for i in range(100)]
    new = [clip(1000 + i, sharpness=9.0) for i in range(50)]
    before = factories.commit_selection(str(tmp_path / "a"), known, num_validation=20)
    after = factories.commit_selection(str(tmp_path / "b"), [*known, *new], num_validation=10)
    drift = measure_drift(before, after)
    assert (drift.num_reference, drift.num_new, drift.num_new_files) == (80, 50, 50)
    assert drift.greatest[0] == "sharpness"
    assert drift.greatest[1] > 0.9
    same = measure_drift(before, before)
    assert (same.num_new, same.distances, same.greatest) == (0, {}, ("", 0.0))
    with pytest.raises(DataError, match="no clip to train on"):
        measure_drift(
            factories.commit_selection(str(tmp_path / "c"), known, num_validation=100), after
        )
