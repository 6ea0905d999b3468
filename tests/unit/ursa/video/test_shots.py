import numpy as np
import pytest

from tests.media import ingestion_config, panning, texture
from ursa.video.shots import ShotDetector, cut_spans, frame_limits


def boundaries(frames, fps=24.0, **changes):
    detector = ShotDetector(ingestion_config(**changes))
    found = []
    for number, frame in enumerate(frames):
        found += detector.push(frame, number / fps)
    return [tuple(boundary) for boundary in found + detector.finish()]


def dissolved(before, after):
    weight = ((np.arange(len(before)) + 1) / (len(before) + 1))[:, None, None, None]
    return ((1 - weight) * before + weight * after).astype(np.uint8)


def test_hard_cut_is_found_at_its_frame():
    frames = np.concatenate(
        [panning(9, step=1, seed=1), 255 - panning(7, step=1, seed=2) // 3, panning(5, step=1)]
    )
    assert boundaries(frames) == [(9, 9), (16, 16)]


@pytest.mark.parametrize("place", [1, 2, 11])
def test_cut_beside_the_first_or_last_frame_is_found(place):
    frames = np.concatenate(
        [panning(place, step=1, seed=1), 255 - panning(12 - place, step=1, seed=2) // 3]
    )
    assert boundaries(frames) == [(place, place)]


@pytest.mark.parametrize("step", [2, 12, 40])
def test_motion_is_no_cut(step):
    frames = panning(30, step=step)
    assert boundaries(frames) == []


def test_fast_motion_is_a_cut_without_the_comparison_with_its_surroundings():
    assert boundaries(panning(30, step=40), shot_ratio=1.0, shot_threshold=10.0)


def test_low_frame_rate_is_no_cut():
    frames = np.repeat(panning(12, step=30), 4, axis=0)
    assert boundaries(frames) == []


def test_a_flash_is_a_shot_of_its_own():
    frame = texture(144, 256)
    frames = [frame] * 5 + [np.full_like(frame, 255)] * 2 + [frame] * 5
    assert boundaries(frames) == [(5, 5), (7, 7)]


def test_black_frame_between_two_shots_is_cut_on_both_sides():
    dark = panning(12, step=1, seed=1, height=72) // 3
    bright = panning(12, step=1, seed=2, height=72) // 2 + 120
    frames = np.concatenate([dark, np.zeros_like(dark[:1]), bright])
    assert boundaries(frames, transition_threshold=None, adaptive_threshold=10.0) == [
        (12, 12),
        (13, 13),
    ]


@pytest.mark.parametrize("length", [10, 24])
def test_dissolve_is_cut_out(length):
    before, after = (panning(30 + length, step=0, seed=seed, grain=16) for seed in (1, 2))
    joint = dissolved(before[30:], after[:length])
    ((start, stop),) = boundaries(np.concatenate([before[:30], joint, after[length:]]))
    assert 30 - length // 2 <= start <= 32
    assert 28 + length <= stop <= 31 + length + length // 2


def test_fade_through_black_is_cut_out():
    before, after = (panning(48, step=1, seed=seed, grain=16) for seed in (1, 2))
    gain = np.concatenate([np.ones(30), np.linspace(1, 0, 18)])[:, None, None, None]
    frames = np.concatenate([before * gain, after * gain[::-1]]).astype(np.uint8)
    ((start, stop),) = boundaries(frames)
    assert 20 <= start <= 33
    assert 62 <= stop <= 76


def test_change_of_exposure_is_no_transition():
    gain = np.concatenate([np.ones(20), np.linspace(1, 0.5, 20), np.full(20, 0.5)])
    frames = (panning(60, step=1, grain=16) * gain[:, None, None, None]).astype(np.uint8)
    assert boundaries(frames) == []


def test_transitions_can_be_left_alone():
    frames = dissolved(*(panning(24, step=0, seed=seed, grain=16) for seed in (1, 2)))
    assert boundaries(frames) != []
    assert boundaries(frames, transition_threshold=None) == []


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (11, []),
        (12, [(0, 12)]),
        (48, [(0, 48)]),
        (49, [(0, 24), (24, 49)]),
        (100, [(0, 33), (33, 66), (66, 100)]),
    ],
)
def test_spans_are_equal_pieces(num_frames, expected):
    assert cut_spans(num_frames, 12, 48) == expected


def test_limits_where_seconds_are_no_whole_frames():
    assert frame_limits(1.0, 4.0, 12.0) == (12, 48)
    assert frame_limits(1.01, 3.99, 12.0) == (13, 47)
    assert frame_limits(0.3, 0.3, 10.0) == (3, 3)
    assert frame_limits(0.001, 0.001, 10.0) == (1, 1)
