"""Measurements of a clip, from its frames alone.

Flicker and smoothness reward a clip that stands still, so they are only read beside the motion.
Motion, sharpness and flicker of brightness are measured as those of the clips that were trained on
(`ursa.video.scores`).

References:
    Temporal flickering, motion smoothness and dynamic degree: VBench, arXiv 2311.17982. Where it
    has networks (AMT, RAFT), here is optical flow by dense inverse search.
    SSIM: Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13 (2004).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from ursa.tokenizers.visual import psnr_db
from ursa.video.exposure import flicker_levels
from ursa.video.motion import MOTION_FPS, MOTION_WIDTH_PX, Displacement, FlowMeter
from ursa.video.stillness import StillnessMeter

DYNAMIC_PX = 6.0
"""A frame moves if the fastest spots do so by that much, pixels at 256 px width in 1/8 second."""
DYNAMIC_SHARE = 0.25
"""A clip is dynamic if so many of its frames move."""

_FASTEST = 0.05
_DYNAMIC_FPS = 8.0
_SSIM_SIGMA = 1.5
_SSIM_WINDOW = 11
_EDGE = cv2.BORDER_REPLICATE
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class ClipValues(NamedTuple):
    """What is measured of a clip.

    Attributes:
        temporal_flicker: 1 less the mean change of neighbouring frames / 255, in [0, 1].
        motion_smoothness: 1 less the mean error / 255 of guessing a frame from both neighbours.
        motion: Mean optical flow, px/s at 256 px width.
        dynamic_degree: 1 if it is dynamic, else 0.
        sharpness: Variance of the Laplacian, 8-bit levels squared.
        luminance_flicker: Distance of mean luma from that of the neighbours in time, levels.
    """

    temporal_flicker: float
    motion_smoothness: float
    motion: float
    dynamic_degree: float
    sharpness: float
    luminance_flicker: float


def measure_clip(frames: np.ndarray, fps: float) -> ClipValues:
    """Measure a clip.

    Args:
        frames: RGB, uint8 (F, H, W, 3), at least three.
        fps: Frames per second.
    """
    lumas = _lumas(frames)
    small = _at_motion_width(lumas)
    moved = _displacements(small, fps)
    return ClipValues(
        temporal_flicker=float(1 - np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255),
        motion_smoothness=motion_smoothness(_at_motion_width(frames)),
        motion=_speed(moved, fps),
        dynamic_degree=float(_is_dynamic(moved, fps)),
        sharpness=float(np.mean([cv2.Laplacian(luma, cv2.CV_32F).var() for luma in lumas])),
        luminance_flicker=flicker_levels(_distinct_means(lumas, small, fps)) or 0.0,
    )


def measure_motion(frames: np.ndarray, fps: float) -> float:
    """Return the motion of a clip alone, as `ClipScores.motion_px_per_s` has it.

    Args:
        frames: RGB, uint8 (F, H, W, 3).
        fps: Frames per second.

    Returns:
        px/s at 256 px width; 0 of a single frame.
    """
    return _speed(_displacements(_at_motion_width(_lumas(frames)), fps), fps)


def motion_smoothness(frames: np.ndarray) -> float:
    """Return how well every second frame is guessed from those before and after it.

    The guess carries both neighbours half the way along the optical flow between them.

    Args:
        frames: uint8 (F, H, W, 3), at least three; the flow wants some 64 pixels a side.

    Returns:
        1 less the mean absolute error / 255, in [0, 1].
    """
    errors = []
    flow_of: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)
    lumas = _lumas(frames)
    for middle in range(1, len(frames) - 1, 2):
        before, after = frames[middle - 1], frames[middle + 1]
        half = flow_of.calc(lumas[middle - 1], lumas[middle + 1], None) / 2
        x, y = half[..., 0], half[..., 1]
        guess = np.mean(
            [
                cv2.remap(before, columns - x, rows - y, cv2.INTER_LINEAR, None, _EDGE),
                cv2.remap(after, columns + x, rows + y, cv2.INTER_LINEAR, None, _EDGE),
            ],
            axis=0,
        )
        errors.append(np.abs(guess - frames[middle]).mean())
    return float(1 - np.mean(errors) / 255)


def psnr(reference: np.ndarray, frames: np.ndarray) -> float:
    """Return the mean over frames of the peak signal-to-noise ratio.

    Args:
        reference: uint8 (F, H, W, 3).
        frames: Of the same shape.

    Returns:
        Decibels; 168 at most, which equal frames have.
    """
    return float(np.mean([psnr_db(one, two) for one, two in zip(reference, frames, strict=True)]))


def ssim(reference: np.ndarray, frames: np.ndarray) -> float:
    """Return the mean structural similarity of frames, by channel.

    With the Gaussian window of the paper (sigma 1.5, 11 pixels) and its constants.

    Args:
        reference: uint8 (F, H, W, 3).
        frames: Of the same shape.

    Returns:
        In [-1, 1]; 1 if they are equal.
    """
    return float(np.mean([_ssim(one, two) for one, two in zip(reference, frames, strict=True)]))


def _ssim(one: np.ndarray, two: np.ndarray) -> float:
    x, y = one.astype(np.float64), two.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    )
    margin = _SSIM_WINDOW // 2
    inside = similarity[margin:-margin, margin:-margin]  # where the whole window lies inside
    return float((inside if inside.size else similarity).mean())


def _blur(values: np.ndarray) -> np.ndarray:
    size = (_SSIM_WINDOW, _SSIM_WINDOW)
    return np.asarray(cv2.GaussianBlur(values, size, _SSIM_SIGMA, borderType=cv2.BORDER_REFLECT))


def _motion_step(fps: float) -> int:
    """Return how many frames lie between the two whose flow is measured."""
    return max(1, round(fps / MOTION_FPS))


def _displacements(lumas: np.ndarray, fps: float) -> list[Displacement]:
    meter = FlowMeter()
    return [meter.measure(*pair) for pair in itertools.pairwise(lumas[:: _motion_step(fps)])]


def _speed(moved: Sequence[Displacement], fps: float) -> float:
    if not moved:
        return 0.0
    return float(np.mean([each.total_px for each in moved])) * fps / _motion_step(fps)


def _is_dynamic(moved: Sequence[Displacement], fps: float) -> bool:
    """Whether enough frames move, by the mean of the fastest spots of each."""
    pair_s = _motion_step(fps) / fps
    fastest = np.zeros(len(moved))
    for place, each in enumerate(moved):
        if each.length_px is not None:
            count = max(1, round(_FASTEST * each.length_px.size))
            fastest[place] = np.partition(each.length_px.ravel(), -count)[-count:].mean()
    return bool((fastest / pair_s >= DYNAMIC_PX * _DYNAMIC_FPS).mean() >= DYNAMIC_SHARE)


def _distinct_means(lumas: np.ndarray, small: np.ndarray, fps: float) -> list[float]:
    """Return the mean luma of the frames that are not the one before once more."""
    meter = StillnessMeter(fps)
    for luma in small:
        meter.add(luma)
    return [float(lumas[index].mean()) for index in meter.distinct_frames()]


def _lumas(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def _at_motion_width(frames: np.ndarray) -> np.ndarray:
    """Return frames 256 px wide, as motion is measured on them."""
    height_px, width_px = frames.shape[1:3]
    size = (MOTION_WIDTH_PX, max(16, round(height_px * MOTION_WIDTH_PX / width_px)))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
