"""Measurements of a clip, from its frames alone.

Flicker and smoothness reward a clip that stands still, so they are only read beside the motion.
Motion, sharpness and flicker of brightness are those of `ursa.video.scores`, as of the clips that
were trained on.

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
from ursa.video.motion import MOTION_WIDTH_PX
from ursa.video.scores import ClipMeter

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
    meter = ClipMeter(fps=fps, num_frames=len(frames))
    for frame in frames:
        meter.add(frame)
    scores = meter.scores()
    pictures = _at_motion_width(frames)
    flows = _flows(pictures)
    change = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()
    return ClipValues(
        temporal_flicker=float(1 - change / 255),
        motion_smoothness=motion_smoothness(pictures),
        motion=scores.motion_px_per_s or 0.0,
        dynamic_degree=float(_is_dynamic(flows, fps)),
        sharpness=scores.sharpness or 0.0,
        luminance_flicker=scores.flicker or 0.0,
    )


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
    lumas = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
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


def _is_dynamic(lengths: Sequence[np.ndarray], fps: float) -> bool:
    """Whether enough frames move, by the mean of the fastest spots of each."""
    num_fastest = max(1, round(_FASTEST * lengths[0].size))
    fastest = [
        np.partition(length.ravel(), -num_fastest)[-num_fastest:].mean() for length in lengths
    ]
    moving = np.array(fastest) * fps / _DYNAMIC_FPS >= DYNAMIC_PX
    return bool(moving.mean() >= DYNAMIC_SHARE)


def _flows(pictures: np.ndarray) -> list[np.ndarray]:
    """Return the length of the flow from each frame to the next, pixels, float32 (H, W)."""
    flow_of: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lumas = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    lengths = []
    for one, two in itertools.pairwise(lumas):
        # a repeated frame has moved by nothing; the search would find noise
        if np.array_equal(one, two):
            lengths.append(np.zeros(one.shape, np.float32))
            continue
        flow = flow_of.calc(one, two, None)
        lengths.append(cv2.magnitude(flow[..., 0], flow[..., 1]))
    return lengths


def _at_motion_width(frames: np.ndarray) -> np.ndarray:
    """Return frames 256 px wide, as motion is measured on them."""
    height_px, width_px = frames.shape[1:3]
    size = (MOTION_WIDTH_PX, max(16, round(height_px * MOTION_WIDTH_PX / width_px)))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
