"""Raw measurements of a clip; what is good enough is decided elsewhere.

Frames are pushed one by one and only running sums are kept. Motion is measured on pictures of a
fixed width, so that its unit, pixels a second, means the same for every clip.

References:
    Optical flow by dense inverse search: arXiv 1603.03590. Sharpness as the variance of the
    Laplacian: Pech-Pacheco et al., ICPR 2000.
"""

from typing import Any

import cv2
import numpy as np

from ursa.artifacts import ClipScores

MOTION_WIDTH_PX = 256
"""Width of the pictures on which motion is measured, pixels."""
MOTION_FPS = 12.0
"""Motion is measured between frames about this rate apart, frames per second."""
BLACK_LUMA = 24
"""Luma up to which a pixel counts as black, 0..255 (coded black is not quite 0)."""
FLAT_SLOPE = 0.25
"""Mean slope of luma below which a spot counts as flat, 8-bit levels per pixel."""

_FLAT_WINDOW_PX = (7, 7)
_SOBEL_SUM = 8.0
_HASH_SIDE = 8
_HASH_INPUT_SIDE = 32
_BORDER_QUANTILE = 0.98


class ClipMeter:
    """Measures one clip from its frames in order."""

    def __init__(self, *, fps: float, num_frames: int) -> None:
        """Start a clip.

        Args:
            fps: Frame rate of the clip, frames per second.
            num_frames: Number of frames that will be added; the middle one is hashed.
        """
        self._fps = fps
        self._hashed_frame = num_frames // 2
        self._num_frames = 0
        # its type stub wants a picture to write to, which may be left out
        self._flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._motion_step = max(1, round(fps / MOTION_FPS))
        self._num_pairs = 0
        self._previous: np.ndarray | None = None
        self._brightest: np.ndarray | None = None
        self._motion_sum = 0.0
        self._sharpness_sum = 0.0
        self._luminance_sum = 0.0
        self._hash: str | None = None

    def add(self, frame: np.ndarray) -> None:
        """Take in the next frame.

        Args:
            frame: RGB picture, shape (H, W, 3), uint8.
        """
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if self._num_frames % self._motion_step == 0:
            self._add_motion(luma)
        self._sharpness_sum += float(cv2.Laplacian(luma, cv2.CV_32F).var())
        self._luminance_sum += float(luma.mean())
        self._brightest = (
            luma.copy() if self._brightest is None else np.maximum(self._brightest, luma)
        )
        if self._num_frames == self._hashed_frame:
            self._hash = perceptual_hash(luma)
        self._num_frames += 1

    def scores(self) -> ClipScores:
        """Return the measurements of all frames added so far."""
        if self._brightest is None:
            return ClipScores(
                motion_px_per_s=None,
                sharpness=None,
                luminance=None,
                black_border_fraction=None,
                perceptual_hash=None,
            )
        pair_s = self._motion_step / self._fps
        num_pairs = self._num_pairs
        return ClipScores(
            motion_px_per_s=self._motion_sum / (num_pairs * pair_s) if num_pairs else None,
            sharpness=self._sharpness_sum / self._num_frames,
            luminance=self._luminance_sum / self._num_frames,
            black_border_fraction=black_border_fraction(self._brightest),
            perceptual_hash=self._hash,
        )

    def _add_motion(self, luma: np.ndarray) -> None:
        height_px, width_px = luma.shape
        size = (MOTION_WIDTH_PX, max(16, round(height_px * MOTION_WIDTH_PX / width_px)))
        small = cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
        if self._previous is not None:
            self._motion_sum += self._displacement(self._previous, small)
            self._num_pairs += 1
        self._previous = small

    def _displacement(self, first: np.ndarray, second: np.ndarray) -> float:
        """Return the mean length of the optical flow between two pictures, pixels."""
        # a repeated frame has moved by nothing; the search would find noise
        if np.array_equal(first, second):
            return 0.0
        flow = self._flow.calc(first, second, None)
        length = cv2.magnitude(flow[..., 0], flow[..., 1])
        # the search spreads motion over flat ground, where none can be seen
        gradient_x, gradient_y = cv2.spatialGradient(first)
        slope: Any = cv2.magnitude(gradient_x.astype(np.float32), gradient_y.astype(np.float32))
        length[cv2.blur(slope / _SOBEL_SUM, _FLAT_WINDOW_PX) < FLAT_SLOPE] = 0.0
        return float(length.mean())


def black_border_fraction(brightest: np.ndarray) -> float:
    """Return the share of the picture that lies in black bars along its edges.

    Args:
        brightest: Greatest luma of every pixel over the clip, shape (H, W), uint8.

    Returns:
        Share in [0, 1]; 1 for a picture that is black everywhere.
    """
    rows = np.quantile(brightest, _BORDER_QUANTILE, axis=1) > BLACK_LUMA
    columns = np.quantile(brightest, _BORDER_QUANTILE, axis=0) > BLACK_LUMA
    lit_rows, lit_columns = np.flatnonzero(rows), np.flatnonzero(columns)
    if not lit_rows.size or not lit_columns.size:
        return 1.0
    inner = (lit_rows[-1] - lit_rows[0] + 1) * (lit_columns[-1] - lit_columns[0] + 1)
    return float(1.0 - inner / brightest.size)


def perceptual_hash(luma: np.ndarray) -> str:
    """Return a 64-bit hash that changes little when a picture is scaled or recompressed.

    Args:
        luma: Picture, shape (H, W), uint8.

    Returns:
        16 hexadecimal digits: the signs of the 8 x 8 lowest DCT coefficients about their median.
    """
    side = (_HASH_INPUT_SIDE, _HASH_INPUT_SIDE)
    small = cv2.resize(luma, side, interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_HASH_SIDE, :_HASH_SIDE].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits).tobytes().hex()
