"""A few of the clips of tests/bench/detectors.py, each on the right side of its threshold."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.bench import detectors
from ursa.config import load_config

SEED = 1


def scores_of(cases, names):
    return {
        case.name: detectors.measure(detectors.compressed(case.frames))
        for case in cases
        if case.name in names
    }


@pytest.mark.parametrize(
    ("what", "faulty", "clean"),
    [
        ("black", "black with noise", "dark scene"),
        ("freeze", "stops", "small object"),
        ("freeze", "hangs twice", "6 fps source"),
        ("slideshow", "dissolves", "stop, go, stop"),
        ("slideshow", "cuts", "moving shots"),
        ("flicker", "8 Hz", "fade of 8 fps"),
        ("text overlay", "over a pan", "fine texture"),
        ("watermark", "alpha 0.6", "horizon"),
    ],
)
def test_score_tells_a_faulty_clip_from_a_difficult_one(what, faulty, clean):
    score, make = detectors.CASES[what]
    found = scores_of(make(SEED), {faulty, clean})
    threshold = detectors.THRESHOLDS[score]
    assert getattr(found[faulty], score) > threshold
    assert getattr(found[clean], score) <= threshold


def test_bars_are_found_to_the_pixel_and_dark_scenes_have_none():
    for name, frames, true in detectors.bar_cases(SEED):
        found = detectors.bars_of(detectors.compressed(frames))
        assert any(found) == any(true), name
        assert not any(true) or detectors.box_iou(found, true) > 0.97, name


def test_cuts_are_found_and_fast_motion_is_none():
    config = load_config("tiny").ingestion
    edits = [
        edit
        for edit in detectors.cut_edits(SEED)
        if edit.name in {"fast shots", "whip pan", "pan of 30 px", "shots of 8 fps"}
    ]
    result, wrong = detectors.tally_edits(edits, config)
    assert wrong == []
    assert result.true_found == 4


def test_dissolves_and_fades_are_found_and_zooms_are_none():
    config = load_config("tiny").ingestion
    names = {"dissolve 24 frames, 0.5 px", "fade of 2 x 16 frames", "zoom", "pan of 2 px"}
    edits = [edit for edit in detectors.transition_edits(SEED) if edit.name in names]
    result, wrong = detectors.tally_edits(edits, config)
    assert wrong == []
    assert result.true_found == 2


def test_motion_grows_with_speed_and_a_pan_is_the_camera():
    speeds, measured = detectors.motion_speeds([SEED])
    assert spearmanr(speeds, measured["motion"]).statistic >= 0.95
    assert np.allclose(measured["camera_motion"], speeds, rtol=0.15, atol=1.0)
    for rest, speed in zip(measured["object_motion"], speeds, strict=True):
        assert rest < 0.07 * speed + 1.5


@pytest.mark.parametrize("times", [1, 2, 4])
def test_distinct_rate_of_a_source_with_repeated_frames(times):
    frames = detectors.repeated(detectors.pan(detectors.picture(SEED), 1.0), times)
    scores = detectors.measure(detectors.compressed(frames))
    assert scores.distinct_fps == pytest.approx(24 / times, rel=0.12)
