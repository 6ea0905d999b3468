import numpy as np
import pytest

from tests import media
from ursa.evaluation.clips import measure_clip, measure_motion, motion_smoothness, psnr, ssim
from ursa.video.scores import ClipMeter

HEIGHT, WIDTH = 64, 96


def textured(num_frames, *, step):
    return media.panning(num_frames, step=step, height=HEIGHT, width=WIDTH)


def test_a_frozen_clip_is_steady_and_smooth_but_does_not_move():
    values = measure_clip(media.still(9, height=HEIGHT, width=WIDTH), 8.0)
    assert (values.temporal_flicker, values.motion_smoothness) == (1.0, 1.0)
    assert (values.motion, values.dynamic_degree, values.luminance_flicker) == (0.0, 0.0, 0.0)


def test_motion_is_that_of_the_pan():
    slow, fast = (measure_clip(textured(9, step=step), 8.0) for step in (1, 4))
    # 1 px of 96 is 2.7 px of 256; flat ground and the border count as still
    assert 0.5 * 8 * 256 / 96 < slow.motion < 1.1 * 8 * 256 / 96
    assert fast.motion > 2.5 * slow.motion
    assert (slow.dynamic_degree, fast.dynamic_degree) == (0.0, 1.0)


def test_motion_sharpness_and_flicker_are_those_of_clips_that_are_trained_on():
    frames = textured(9, step=2)
    values = measure_clip(frames, 8.0)
    meter = ClipMeter(fps=8.0, num_frames=9)
    for frame in frames:
        meter.add(frame)
    scores = meter.scores()
    assert values.motion == pytest.approx(scores.motion_px_per_s)
    assert measure_motion(frames, 8.0) == values.motion
    assert values.sharpness == pytest.approx(scores.sharpness)
    assert values.luminance_flicker == pytest.approx(scores.flicker)


def test_shuffled_frames_are_less_smooth():
    frames = textured(9, step=2)
    shuffled = frames[[0, 5, 2, 7, 4, 1, 6, 3, 8]]
    assert motion_smoothness(frames) > motion_smoothness(shuffled) + 0.02


def test_noise_flickers_and_blinking_changes_brightness():
    frames = textured(9, step=1)
    noise = np.random.default_rng(0).integers(-40, 41, frames.shape)
    noisy = np.clip(frames + noise, 0, 255).astype(np.uint8)
    clean, dirty = measure_clip(frames, 8.0), measure_clip(noisy, 8.0)
    assert dirty.temporal_flicker < clean.temporal_flicker - 0.05
    assert dirty.sharpness > 2 * clean.sharpness
    blinking = frames.copy()
    blinking[1::2] //= 2
    assert measure_clip(blinking, 8.0).luminance_flicker > 20 > clean.luminance_flicker


def test_flicker_of_known_frames():
    frames = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    frames[1::2] = 255
    assert measure_clip(frames, 8.0).temporal_flicker == 0.0


def test_psnr_of_a_known_error():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(frames, frames + np.uint8(1)) == pytest.approx(20 * np.log10(255))
    other = frames + np.uint8(1)
    other[1] += 9
    # the mean over frames, not of all pixels at once
    assert psnr(frames, other) == pytest.approx(20 * np.log10(255) - 10)


def test_ssim_of_known_pictures():
    flat = np.full((1, 32, 32, 3), 100, np.uint8)
    brighter = flat + np.uint8(50)
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat) == pytest.approx(1.0)
    # no contrast: the term of the means alone is left
    assert ssim(flat, brighter) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    frames = textured(1, step=1)
    inverted = 255 - frames
    assert ssim(frames, inverted) < 0 < ssim(frames, np.roll(frames, 1, axis=2)) < 1
