"""Variants of a sample: another crop, mirrored or not, recoloured or not.

Small data sets are learned by heart within minutes; variants of the training samples keep a model
learning what holds for videos it has not seen.

Dimensions: T = frames, H, W = rows and columns.
"""

import cv2
import numpy as np

ZOOM = 2
"""Frames are read at this multiple of the sample size, so that crops have pixels to choose from."""
_GAIN = 0.3
_LIFT = 30.0


def vary(frames: np.ndarray, *, seed: int) -> np.ndarray:
    """Return a variant of a sample, the same change in all its frames.

    The crop has the aspect of the frames and between 1 / ZOOM and all of their height. Half of
    the variants are mirrored, half are recoloured: contrast and channels by up to 30 %,
    brightness by up to 30 levels.

    Args:
        frames: RGB frames at ZOOM times the size of the sample, (T, ZOOM*H, ZOOM*W, 3), uint8.
        seed: Decides the variant.

    Returns:
        RGB frames, shape (T, H, W, 3), uint8.
    """
    random = np.random.default_rng(seed)
    height, width = frames.shape[1] // ZOOM, frames.shape[2] // ZOOM
    scale = random.uniform(1.0, ZOOM)
    rows, columns = round(height * scale), round(width * scale)
    top = int(random.integers(0, frames.shape[1] - rows + 1))
    left = int(random.integers(0, frames.shape[2] - columns + 1))
    mirrored, recoloured = random.random(2) < 0.5
    gain = random.uniform(1 - _GAIN, 1 + _GAIN, 3)
    lift = random.uniform(-_LIFT, _LIFT)
    crop = frames[:, top : top + rows, left : left + columns]
    if mirrored:
        crop = crop[:, :, ::-1]
    small = np.stack(
        [
            cv2.resize(np.ascontiguousarray(frame), (width, height), interpolation=cv2.INTER_AREA)
            for frame in crop
        ]
    )
    if recoloured:
        mean = small.mean()
        small = np.clip((small - mean) * gain + mean + lift, 0, 255).round()
    return small.astype(np.uint8)


def shrink(frames: np.ndarray) -> np.ndarray:
    """Average ZOOM x ZOOM pixels.

    Args:
        frames: Shape (..., ZOOM*H, ZOOM*W, 3), uint8.

    Returns:
        Shape (..., H, W, 3), uint8, rounded.
    """
    *outer, height, width, _ = frames.shape
    shape = (*outer, height // ZOOM, ZOOM, width // ZOOM, ZOOM, 3)
    small: np.ndarray = frames.reshape(shape).mean((-4, -2)).round().astype(np.uint8)
    return small
