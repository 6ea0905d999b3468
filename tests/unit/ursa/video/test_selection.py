import pytest

from ursa.artifacts import Clip, ClipScores, RejectReason, VideoInfo
from ursa.config import SelectionConfig
from ursa.video.selection import (
    THRESHOLD_KEYS,
    choose_validation_sources,
    judge_clip,
    judge_clips,
    judge_scores,
)


def selection_config(**changes):
    values = dict.fromkeys(SelectionConfig.model_fields) | {
        "min_motion_px_per_s": 2.0,
        "max_motion_px_per_s": 200.0,
        "min_sharpness": 10.0,
        "min_luminance": 16.0,
        "max_luminance": 240.0,
        "max_black_border_fraction": 0.3,
        "drop_duplicates": True,
        "validation_fraction": 0.2,
    }
    return SelectionConfig.model_validate(values | changes)


def scores(**changes):
    values = {
        "motion_px_per_s": 20.0,
        "sharpness": 100.0,
        "luminance": 120.0,
        "black_border_fraction": 0.0,
        "perceptual_hash": "0" * 16,
        "camera_motion_px_per_s": 12.0,
        "object_motion_px_per_s": 8.0,
        "dark_fraction": 0.1,
        "bright_fraction": 0.1,
        "black_fraction": 0.1,
        "freeze_fraction": 0.1,
        "slideshow_fraction": 0.1,
        "distinct_fps": 11.0,
        "flicker": 0.5,
        "text_area_fraction": 0.01,
        "static_overlay_fraction": 0.01,
    }
    return ClipScores.model_validate(values | changes)


def clip(clip_id):
    return Clip(
        clip_id=clip_id,
        source_uri="file:///a.mp4",
        source_sha256="0" * 64,
        start_s=0,
        end_s=1,
        media_uri="m",
        media_sha256="0" * 64,
        info=VideoInfo(
            width_px=64, height_px=64, fps=12, num_frames=12, duration_s=1, codec="h264"
        ),
        scores=scores(),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"motion_px_per_s": 1.9}, RejectReason.TOO_STATIC),
        ({"motion_px_per_s": 2.0}, None),
        ({"motion_px_per_s": 201.0}, RejectReason.TOO_FAST),
        ({"sharpness": 1.0}, RejectReason.BLURRED),
        ({"luminance": 3.0}, RejectReason.TOO_DARK),
        ({"luminance": 250.0}, RejectReason.TOO_BRIGHT),
        ({"black_border_fraction": 0.31}, RejectReason.BLACK_BORDERS),
        ({"motion_px_per_s": None}, RejectReason.NOT_MEASURED),
        # a black picture is called dark, not bordered
        ({"luminance": 0.0, "black_border_fraction": 1.0}, RejectReason.TOO_DARK),
    ],
)
def test_thresholds(changes, reason):
    assert judge_scores(scores(**changes), selection_config()) == reason


@pytest.mark.parametrize(
    ("threshold", "passes", "fails", "reason"),
    [
        ("max_camera_motion_px_per_s", 12.0, 11.9, RejectReason.CAMERA_TOO_FAST),
        ("min_object_motion_px_per_s", 8.0, 8.1, RejectReason.OBJECTS_TOO_STATIC),
        ("max_dark_fraction", 0.1, 0.09, RejectReason.UNDEREXPOSED),
        ("max_bright_fraction", 0.1, 0.09, RejectReason.OVEREXPOSED),
        ("max_black_fraction", 0.1, 0.09, RejectReason.BLACK_FRAMES),
        ("max_freeze_fraction", 0.1, 0.09, RejectReason.FROZEN),
        ("max_slideshow_fraction", 0.1, 0.09, RejectReason.SLIDESHOW),
        ("min_distinct_fps", 11.0, 11.1, RejectReason.REPEATED_FRAMES),
        ("max_flicker", 0.5, 0.4, RejectReason.FLICKER),
        ("max_text_area_fraction", 0.01, 0.009, RejectReason.TEXT),
        ("max_static_overlay_fraction", 0.01, 0.009, RejectReason.OVERLAY),
    ],
)
def test_every_score_has_a_threshold_of_its_own(threshold, passes, fails, reason):
    assert judge_scores(scores(), selection_config(**{threshold: passes})) is None
    assert judge_scores(scores(), selection_config(**{threshold: fails})) is reason


def test_every_reason_but_a_missing_score_names_its_threshold():
    assert set(RejectReason) - set(THRESHOLD_KEYS) == {RejectReason.NOT_MEASURED}
    assert set(THRESHOLD_KEYS.values()) == set(SelectionConfig.model_fields) - {
        "validation_fraction"
    }


def test_clips_may_be_too_short():
    assert judge_clip(clip("a"), selection_config(min_clip_s=1.0)) is None
    assert judge_clip(clip("a"), selection_config(min_clip_s=1.1)) is RejectReason.TOO_SHORT


def test_a_clip_that_does_not_move_has_no_overlay_and_no_repeated_frames():
    config = selection_config(min_distinct_fps=11.0, max_static_overlay_fraction=0.01)
    nothing = scores(distinct_fps=None, static_overlay_fraction=None)
    assert judge_scores(nothing, config) is None
    config = selection_config(max_flicker=1.0)
    assert judge_scores(scores(flicker=None), config) is RejectReason.NOT_MEASURED


def test_a_threshold_can_be_switched_off():
    config = selection_config(min_motion_px_per_s=None, max_motion_px_per_s=None)
    assert judge_scores(scores(motion_px_per_s=None), config) is None


def test_only_the_first_of_equal_clips_is_kept():
    clips = [clip("a"), clip("b"), clip("a")]
    assert judge_clips(clips, selection_config()) == [None, None, RejectReason.DUPLICATE]
    assert judge_clips(clips, selection_config(drop_duplicates=False)) == [None] * 3


def test_validation_never_exceeds_its_share_while_a_source_fits():
    num_clips = {f"source{index}": index % 7 + 1 for index in range(40)}
    for seed in range(20):
        chosen = choose_validation_sources(num_clips, 0.2, seed=seed)
        share = sum(num_clips[source] for source in chosen) / sum(num_clips.values())
        assert 0.15 < share <= 0.2
    assert choose_validation_sources(num_clips, 0.2, seed=1) == choose_validation_sources(
        dict(reversed(num_clips.items())), 0.2, seed=1
    )
    assert choose_validation_sources(num_clips, 0.2, seed=1) != choose_validation_sources(
        num_clips, 0.2, seed=2
    )


def test_small_sets():
    assert choose_validation_sources({"a": 5}, 0.5, seed=0) == frozenset()
    assert choose_validation_sources({"a": 5, "b": 3}, 0.1, seed=0) == {"b"}
    assert choose_validation_sources({"a": 5, "b": 3}, 0.0, seed=0) == frozenset()
    assert len(choose_validation_sources({"a": 1, "b": 1, "c": 1}, 1.0, seed=0)) == 2
