"""Black bars around the picture: how much they cover, and the box of the picture inside them.

Both are found in the greatest luma that each pixel has over a whole shot, so bars count only
where they are all the time.
"""

from typing import NamedTuple

import cv2
import numpy as np

from ursa.video.exposure import BLACK_LUMA

BORDER_QUANTILE = 0.98
"""A line of pixels is black if this share of it is; subtitles in a bar may be brighter."""
EDGE_LEVELS = 12
"""Step of luma from a bar into the picture at the least, 8-bit levels."""
EDGE_FRACTION = 0.6
"""Share of the length of a bar along which there is such a step."""
MAX_IMBALANCE = 0.2
"""Opposite bars differ by at most this share of the larger one."""
MIN_PICTURE_FRACTION = 0.25
"""What is left of a side must be at least this share of it."""

_EDGE_REACH = 3
_MAX_IMBALANCE_PX = 3


class Margins(NamedTuple):
    """What lies outside of the picture, pixels."""

    left: int
    top: int
    right: int
    bottom: int


NO_MARGINS = Margins(0, 0, 0, 0)


def black_border_fraction(brightest: np.ndarray) -> float:
    """Return the share of the picture that lies in black bars along its edges.

    Args:
        brightest: Greatest luma of every pixel over the clip, shape (H, W), uint8.

    Returns:
        Share in [0, 1]; 1 for a picture that is black everywhere.
    """
    rows = np.quantile(brightest, BORDER_QUANTILE, axis=1) > BLACK_LUMA
    columns = np.quantile(brightest, BORDER_QUANTILE, axis=0) > BLACK_LUMA
    lit_rows, lit_columns = np.flatnonzero(rows), np.flatnonzero(columns)
    if not lit_rows.size or not lit_columns.size:
        return 1.0
    inner = (lit_rows[-1] - lit_rows[0] + 1) * (lit_columns[-1] - lit_columns[0] + 1)
    return float(1.0 - inner / brightest.size)


def find_bars(brightest: np.ndarray) -> Margins:
    """Return the straight black bars around a picture, above and below or left and right or both.

    Bars come in pairs of about equal size and end in a straight edge, a step of luma along most of
    their length. So dark skies, vignettes and black pictures have none.

    Args:
        brightest: Greatest luma of every pixel over the shot, shape (H, W), uint8.

    Returns:
        Pixels of the bars, all 0 if there are none. The line of mixed pixels between bar and
        picture belongs to the bar.
    """
    top, bottom = _pair_of_bars(brightest)
    left, right = _pair_of_bars(brightest[top : brightest.shape[0] - bottom].T)
    if not (top or bottom) and (left or right):
        # bars on all sides: those above show their edge only between those beside
        top, bottom = _pair_of_bars(brightest[:, left : brightest.shape[1] - right])
    return Margins(left, top, right, bottom)


def even_margins(margins: Margins, width_px: int, height_px: int) -> Margins:
    """Return margins, enlarged by at most a pixel a direction, that leave even sides.

    Args:
        margins: What is to be cut.
        width_px: Width of the picture.
        height_px: Height of the picture.
    """
    odd_columns = (width_px - margins.left - margins.right) % 2
    odd_rows = (height_px - margins.top - margins.bottom) % 2
    return margins._replace(right=margins.right + odd_columns, bottom=margins.bottom + odd_rows)


def _pair_of_bars(brightest: np.ndarray) -> tuple[int, int]:
    """Return the heights of the bars above and below; (0, 0) if they are none."""
    height = brightest.shape[0]
    lit = np.flatnonzero(np.quantile(brightest, BORDER_QUANTILE, axis=1) > BLACK_LUMA)
    if not lit.size:
        return 0, 0
    above, below = int(lit[0]), int(height - 1 - lit[-1])
    if min(above, below) == 0:
        return 0, 0
    larger = max(above, below)
    if abs(above - below) > max(_MAX_IMBALANCE_PX, MAX_IMBALANCE * larger):
        return 0, 0
    if height - above - below < MIN_PICTURE_FRACTION * height:
        return 0, 0
    above = _edge(brightest, above)
    below = _edge(brightest[::-1], below)
    return (above, below) if above and below else (0, 0)


def _edge(brightest: np.ndarray, bar: int) -> int:
    """Return where the picture begins below a bar if there is a straight edge, else 0."""
    inside = brightest[bar : bar + _EDGE_REACH + 1].astype(np.int16)
    outside = float(np.median(brightest[:bar]))
    shares = np.mean(inside >= outside + EDGE_LEVELS, axis=1)
    steep = np.flatnonzero(shares >= EDGE_FRACTION)
    if not steep.size:
        return 0
    # a line that is half bar is darker than the next one
    first = int(steep[0])
    if first + 1 < len(inside):
        here, inner = (float(np.mean(inside[line])) - outside for line in (first, first + 1))
        first += here < 0.75 * inner
    return bar + first


def brighter_of(brightest: np.ndarray | None, picture: np.ndarray) -> np.ndarray:
    """Return the greatest luma so far, with one more picture.

    Args:
        brightest: The greatest luma of the pictures before, shape (H, W), uint8; None if there
            are none.
        picture: RGB, shape (H, W, 3), uint8.
    """
    luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return luma if brightest is None else cv2.max(brightest, luma)
