import numpy as np
import pytest

from tests.media import panning, texture
from ursa.video.shots import ShotDetector, cut_spans, frame_limits


def cuts_of(frames):
    detector = ShotDetector(27.0)
    return [index for index, frame in enumerate(frames) if detector.is_cut(frame)]


def test_hard_cut_is_found_at_its_frame():
    frames = np.concatenate(
        [panning(9, step=1, seed=1), 255 - panning(7, step=1, seed=2) // 3, panning(5, step=1)]
    )
    assert cuts_of(frames) == [9, 16]


def test_motion_is_no_cut():
    assert cuts_of(panning(30, step=2)) == []


def test_a_flash_is_a_shot_of_its_own():
    frame = texture(144, 256)
    frames = [frame] * 5 + [np.full_like(frame, 255)] * 2 + [frame] * 5
    assert cuts_of(frames) == [5, 7]


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
