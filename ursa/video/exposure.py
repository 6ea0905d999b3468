"""How a clip is exposed: clipped pixels, black frames, flicker of the brightness.

References:
    What a black frame is follows the filter blackdetect of FFmpeg (98 % of the pixels are at most
    10 % bright).
"""

from collections.abc import Sequence

import cv2
import numpy as np

CLIPPED_LEVELS = 8
"""Luma this near to 0 or 255 counts as clipped, 8-bit levels."""
BLACK_LUMA = 24
"""Luma up to which a pixel counts as black, 0..255 (coded black is not quite 0)."""
BLACK_FRAME_FRACTION = 0.98
"""A frame with at least this share of black pixels is black."""


class ExposureMeter:
    """Sums what the histograms of the frames of a clip say."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._num_black = 0
        self._dark_sum = 0.0
        self._bright_sum = 0.0

    def add(self, luma: np.ndarray) -> None:
        """Take in the next frame.

        Args:
            luma: Shape (H, W), uint8.
        """
        histogram = cv2.calcHist([luma], [0], None, [256], [0, 256]).ravel() / luma.size
        self._num_frames += 1
        self._dark_sum += float(histogram[: CLIPPED_LEVELS + 1].sum())
        self._bright_sum += float(histogram[255 - CLIPPED_LEVELS :].sum())
        self._num_black += float(histogram[: BLACK_LUMA + 1].sum()) >= BLACK_FRAME_FRACTION

    def fractions(self) -> tuple[float, float, float]:
        """Return the mean shares of dark and of bright pixels, and the share of black frames."""
        num_frames = max(self._num_frames, 1)
        # sums of float32 shares may be above 1 in the last digit
        dark, bright = self._dark_sum / num_frames, self._bright_sum / num_frames
        return min(dark, 1.0), min(bright, 1.0), self._num_black / num_frames


def flicker_levels(lumas: Sequence[float]) -> float | None:
    """Return how far the brightness of a frame lies from that of its neighbours.

    It is half the second difference of mean luma, so a steady fade counts nothing, and motion,
    which changes the mean luma slowly, next to nothing.

    Args:
        lumas: Mean luma of successive frames that differ, 8-bit levels. Repeated frames are to be
            left out: they would turn a fade into steps.

    Returns:
        Mean of |L[t] - (L[t-1] + L[t+1]) / 2| over the frames, 8-bit levels, in [0, 255]; None for
        fewer than three frames.
    """
    if len(lumas) < 3:
        return None
    return float(np.abs(np.diff(np.asarray(lumas, np.float64), n=2)).mean() / 2)
