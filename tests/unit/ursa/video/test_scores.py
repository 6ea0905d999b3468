import cv2
import numpy as np
import pytest

from tests.media import flat, letterboxed, moving_square, panning, still, texture
from ursa.video.borders import NO_MARGINS, Margins, even_margins, find_bars
from ursa.video.scores import ClipMeter, perceptual_hash


def measure(frames, fps=12.0):
    meter = ClipMeter(fps=fps, num_frames=len(frames))
    for frame in frames:
        meter.add(frame)
    return meter.scores()


@pytest.mark.parametrize("step", [1, 3])
def test_motion_of_a_pan_is_its_speed(step):
    scores = measure(panning(12, step=step), fps=12.0)
    assert scores.motion_px_per_s == pytest.approx(12 * step, rel=0.1)


def test_motion_is_measured_at_a_fixed_width():
    small = panning(8, step=2)
    large = np.stack([cv2.resize(frame, (512, 288)) for frame in small])
    assert measure(large).motion_px_per_s == pytest.approx(measure(small).motion_px_per_s, rel=0.1)


def test_motion_of_a_square_is_weighted_by_its_area():
    side, step, fps = 72, 2, 12.0
    scores = measure(moving_square(12, step=step, side=side), fps=fps)
    expected = step * fps * side * side / (144 * 256)
    assert scores.motion_px_per_s == pytest.approx(expected, rel=0.35)


def test_motion_does_not_depend_on_repeated_frames():
    frames = panning(12, step=2)
    slow = measure(frames, fps=6.0)
    held = measure(np.repeat(frames, 2, axis=0), fps=12.0)
    assert held.motion_px_per_s == pytest.approx(slow.motion_px_per_s, rel=0.1)


def test_motion_does_not_depend_on_the_frame_rate_of_the_clip():
    frames = panning(25, step=2)
    assert measure(frames, fps=24.0).motion_px_per_s == pytest.approx(48, rel=0.1)


def test_still_picture_does_not_move():
    assert measure(still(6)).motion_px_per_s == 0.0


def test_blur_lowers_sharpness():
    sharp = still(3)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in sharp])
    assert measure(soft).sharpness < 0.1 * measure(sharp).sharpness


def test_luminance_of_grey():
    assert measure(flat(3, (77, 77, 77))).luminance == pytest.approx(77, abs=0.5)


def test_letterbox_bars_are_measured():
    frames = letterboxed(panning(4, step=1, height=144), 36)
    assert measure(frames).black_border_fraction == pytest.approx(72 / 216, abs=0.01)
    assert measure(panning(4, step=1)).black_border_fraction == 0.0
    assert measure(flat(4, (0, 0, 0))).black_border_fraction == 1.0


def test_one_frame_has_no_motion_but_other_scores():
    scores = measure(still(1))
    assert scores.motion_px_per_s is None
    assert scores.sharpness is not None
    assert measure(still(1)[:0]).perceptual_hash is None


def test_hash_survives_scaling_but_not_another_picture():
    first = cv2.cvtColor(texture(144, 256, grain=12), cv2.COLOR_RGB2GRAY)
    second = cv2.cvtColor(texture(144, 256, grain=12, seed=9), cv2.COLOR_RGB2GRAY)
    smaller = cv2.resize(first, (128, 72), interpolation=cv2.INTER_AREA)

    def distance(a, b):
        return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()

    assert distance(first, smaller) <= 4
    assert distance(first, second) >= 16


def test_nine_frames_are_hashed_and_one_that_shows_nothing_is_zeros():
    frames = panning(36, step=3)
    frames[17:20] = 90
    text = measure(frames).perceptual_hash
    parts = [text[place : place + 16] for place in range(0, len(text), 16)]
    lumas = [cv2.cvtColor(frames[place], cv2.COLOR_RGB2GRAY) for place in range(2, 36, 4)]
    assert parts == [perceptual_hash(luma) for luma in lumas]
    assert [part == "0" * 16 for part in parts] == [place == 4 for place in range(9)]
    # the one frame of a short clip counts nine times, so it can be compared all the same
    assert measure(still(1)).perceptual_hash == 9 * measure(still(1)).perceptual_hash[:16]


@pytest.mark.parametrize(("fps", "places"), [(24.0, range(1, 36, 3)), (12.0, [0, 2, 3, 5, 6, 8])])
def test_eight_frames_a_second_are_hashed_too(fps, places):
    frames = panning(36 if fps == 24 else 9, step=3)
    lumas = [cv2.cvtColor(frames[place], cv2.COLOR_RGB2GRAY) for place in places]
    expected = bytes.fromhex("".join(perceptual_hash(luma) for luma in lumas))
    assert measure(frames, fps=fps).frame_hashes == expected


def test_shares_of_clipped_pixels_and_black_frames():
    frames = flat(8, (120, 120, 120), height=64, width=64)
    frames[:, :16] = 255
    frames[:, 16:24] = 0
    frames[:2] = 10
    scores = measure(frames)
    assert scores.bright_fraction == pytest.approx(0.25 * 6 / 8)
    assert scores.dark_fraction == pytest.approx(0.125 * 6 / 8)
    assert scores.black_fraction == pytest.approx(2 / 8)


def test_pan_is_the_camera_and_a_square_an_object():
    pan = measure(panning(12, step=2))
    assert pan.camera_motion_px_per_s == pytest.approx(24, rel=0.1)
    assert pan.object_motion_px_per_s < 2
    square = measure(moving_square(12, step=2))
    assert square.camera_motion_px_per_s == 0.0
    assert square.object_motion_px_per_s == pytest.approx(square.motion_px_per_s, rel=0.3)


def test_freeze_is_counted_to_the_frame():
    frames = np.concatenate([panning(30, step=2), still(18, seed=5)])
    assert measure(frames, fps=24.0).freeze_fraction == pytest.approx(18 / 48)
    # 0.46 s are no freeze
    assert measure(frames[:41], fps=24.0).freeze_fraction == 0.0


def test_slideshow_needs_two_stills_that_differ():
    two = np.concatenate([still(18, seed=5), still(18, seed=6)])
    assert measure(two, fps=24.0).slideshow_fraction == 1.0
    assert measure(still(36), fps=24.0).slideshow_fraction == 0.0
    assert measure(still(36), fps=24.0).freeze_fraction == 1.0


def test_distinct_rate_leaves_stills_out():
    frames = np.concatenate([np.repeat(panning(18, step=2), 2, axis=0), still(24, seed=4)])
    assert measure(frames, fps=24.0).distinct_fps == pytest.approx(12, abs=0.7)
    assert measure(still(24), fps=24.0).distinct_fps is None


def test_flicker_is_half_the_second_difference_of_frames_that_differ():
    ground = panning(24, step=1).astype(float) / 2
    light = np.where(np.arange(24) % 2, 60, 50)[:, None, None, None]
    assert measure((ground + light).astype(np.uint8)).flicker == pytest.approx(10, abs=0.5)
    fade = np.linspace(0, 100, 24)[:, None, None, None]
    held = np.repeat((ground + fade).astype(np.uint8)[::3], 3, axis=0)
    assert measure(held).flicker < 0.5


@pytest.mark.parametrize("margins", [Margins(0, 20, 0, 20), Margins(31, 0, 31, 0)])
def test_bars_come_in_pairs(margins):
    left, top, right, bottom = margins
    inside = texture(144, 256)[top : 144 - bottom, left : 256 - right, 0]
    assert find_bars(np.pad(inside, ((top, bottom), (left, right)))) == margins
    assert find_bars(np.pad(inside, ((top, 0), (left, 0)))) == NO_MARGINS


def test_cut_margins_leave_even_sides():
    assert even_margins(Margins(1, 0, 2, 5), 64, 36) == Margins(1, 0, 3, 5 + 1)
    assert even_margins(NO_MARGINS, 64, 36) == NO_MARGINS
