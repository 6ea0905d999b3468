"""What lies over a clip: text, and edges that stay while the picture moves.

References:
    Strokes by top-hat: Epshtein et al., CVPR 2010, find strokes of one width, which a top-hat as
    wide as the widest stroke leaves; characters are joined to lines as there (section 3.2).
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from ursa.video.motion import Displacement

TEXT_HEIGHT_PX = 180
"""Text is looked for in pictures of at most this height, pixels."""
TEXT_RATE_FPS = 4.0
"""Pictures a second in which text is looked for."""
TEXT_PICTURES = 4
"""Strokes must stay over this many of these pictures; then the next ones are compared."""
STROKE_LEVELS = 40
"""Least contrast of a stroke to the ground around it, 8-bit levels."""
MIN_CHARACTERS = 4
"""Least number of characters in a line."""
STAY_LEVELS = 6.0
"""Least slope of an edge that counts as staying, 8-bit levels per pixel."""
STAY_SIGNIFICANCE = 5.0
"""Mean of the slope at a spot over its standard error from which on it counts as staying."""
MIN_STAY_PICTURES = 6
"""Pictures that are needed to know what stays."""
MIN_LOCAL_MOTION = 0.5
"""Around an overlay the picture moves at least this share of its mean."""
SHIFT_PX = 4.0
"""The picture must have moved by so much since the one before it, pixels at 256 px width."""
MIN_MOVING_FRACTION = 0.5
"""And at least this share of what can be seen must move."""

_STROKE_PX = 13
_MIN_CHARACTER_PX = 5
_MAX_CHARACTER_PX = 45
_MAX_COMPONENTS = 400
_MAX_ADVANCE_PX = 100
_MIN_OVERLAY_PX = 24
_MIN_CROSSING = 0.25
_AROUND_PX = (41, 41)


class Box(NamedTuple):
    """A rectangle, pixels."""

    left: int
    top: int
    width: int
    height: int


class TextMeter:
    """Measures the area of lines of text that stay for about a second."""

    def __init__(self, fps: float) -> None:
        """Start a clip.

        Args:
            fps: Frame rate of the clip, frames per second.
        """
        self._step = max(1, round(fps / TEXT_RATE_FPS))
        self._num_frames = 0
        self._strokes: tuple[np.ndarray, np.ndarray] | None = None
        self._num_pictures = 0
        self._areas: list[float] = []

    def add(self, luma: np.ndarray) -> None:
        """Take in the next frame.

        Args:
            luma: Shape (H, W), uint8.
        """
        self._num_frames += 1
        if (self._num_frames - 1) % self._step:
            return
        strokes = find_strokes(luma)
        if self._strokes is not None:
            bright, dark = (
                cv2.bitwise_and(lasting, new)
                for lasting, new in zip(self._strokes, strokes, strict=True)
            )
            strokes = (bright, dark)
        self._strokes = strokes
        self._num_pictures += 1
        if self._num_pictures == TEXT_PICTURES:
            self._areas.append(_text_area(strokes))
            self._strokes = None
            self._num_pictures = 0

    def area_fraction(self) -> float:
        """Return the share of the picture inside lines of text, averaged over time, in [0, 1]."""
        if not self._areas and self._strokes is not None:
            return _text_area(self._strokes)
        return float(np.mean(self._areas)) if self._areas else 0.0


def _text_area(strokes: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the share of the picture in lines of bright or of dark strokes."""
    covered = np.zeros(strokes[0].shape, np.uint8)
    for mask in strokes:
        for box in find_lines(mask):
            bottom, right = box.top + box.height, box.left + box.width
            covered[box.top : bottom, box.left : right] = 1
    return float(covered.mean())


def find_strokes(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where strokes brighter, and where strokes darker than their ground are.

    Args:
        luma: Shape (H, W), uint8.

    Returns:
        Two masks of 0 and 255, at most `TEXT_HEIGHT_PX` high.
    """
    height_px, width_px = luma.shape
    if height_px > TEXT_HEIGHT_PX:
        size = (max(1, round(width_px * TEXT_HEIGHT_PX / height_px)), TEXT_HEIGHT_PX)
        luma = cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (_STROKE_PX, _STROKE_PX))
    bright = cv2.morphologyEx(luma, cv2.MORPH_TOPHAT, kernel)
    dark = cv2.morphologyEx(luma, cv2.MORPH_BLACKHAT, kernel)
    return (
        cv2.threshold(bright, STROKE_LEVELS, 255, cv2.THRESH_BINARY)[1],
        cv2.threshold(dark, STROKE_LEVELS, 255, cv2.THRESH_BINARY)[1],
    )


def find_lines(strokes: np.ndarray) -> list[Box]:
    """Return the lines of text among strokes: characters of like height, side by side.

    Args:
        strokes: Mask, shape (H, W), uint8.
    """
    _, _, stats, _ = cv2.connectedComponentsWithStats(strokes, connectivity=8)
    characters = [
        Box(int(x), int(y), int(width), int(height))
        for x, y, width, height, area in stats[1:]
        if _MIN_CHARACTER_PX <= height <= _MAX_CHARACTER_PX
        and width <= 2.5 * height
        and 0.15 <= area / (width * height) <= 0.95
    ]
    if len(characters) > _MAX_COMPONENTS:  # leaves or gravel, no page of text at this size
        return []
    lines: list[list[Box]] = []
    growing: list[list[Box]] = []
    for character in sorted(characters):
        # nothing to the right of here can continue the others
        growing = [line for line in growing if character.left - line[-1].left <= _MAX_ADVANCE_PX]
        line = next((line for line in growing if _continues(line[-1], character)), None)
        if line is None:
            line = []
            lines.append(line)
            growing.append(line)
        line.append(character)
    return [_hull(line) for line in lines if _is_line(line)]


def _continues(last: Box, character: Box) -> bool:
    """Whether a character may stand beside the last one of a line."""
    higher, lower = max(last.height, character.height), min(last.height, character.height)
    gap = character.left - (last.left + last.width)
    foot = abs(last.top + last.height - character.top - character.height)
    return higher <= 1.8 * lower and -0.3 * higher <= gap <= 1.2 * higher and foot <= 0.25 * higher


def _is_line(line: list[Box]) -> bool:
    """Whether there are enough characters, which stand on one line and fill it."""
    if len(line) < MIN_CHARACTERS:
        return False
    box = _hull(line)
    heights = np.array([character.height for character in line])
    feet = np.array([character.top + character.height for character in line])
    return bool(
        np.std(feet) <= 0.12 * box.height + 0.5
        and np.std(heights) <= 0.3 * heights.mean()
        and box.width >= 2 * box.height
    )


def _hull(line: list[Box]) -> Box:
    left = min(box.left for box in line)
    top = min(box.top for box in line)
    right = max(box.left + box.width for box in line)
    bottom = max(box.top + box.height for box in line)
    return Box(left, top, right - left, bottom - top)


class OverlayMeter:
    """Measures the area of edges that stay while the rest of the picture moves.

    At every spot the slope of luma, a vector, is averaged over pictures between which the picture
    has moved. Under an overlay it is the same again and again; elsewhere it changes, and its mean
    is near zero for its standard error. Straight edges, which look the same when they move along
    themselves, are left out: an overlay has edges in both directions.
    """

    def __init__(self) -> None:
        self._sum: np.ndarray | None = None
        self._square_sum: np.ndarray | None = None
        self._length_sum: np.ndarray | None = None
        self._num_pictures = 0
        self._moved_px = 0.0

    def add(self, picture: np.ndarray, moved: Displacement) -> None:
        """Take in a picture.

        Args:
            picture: Luma, 256 px wide, shape (H, W), uint8.
            moved: How it has moved since the one before.
        """
        if moved.length_px is None or moved.moving_fraction < MIN_MOVING_FRACTION:
            return
        if self._length_sum is None:
            self._length_sum = np.zeros_like(moved.length_px)
        self._length_sum += moved.length_px
        self._moved_px += moved.total_px
        if self._moved_px < SHIFT_PX:
            return
        self._moved_px = 0.0
        soft = cv2.GaussianBlur(picture, (3, 3), 0)
        # central differences: half the difference of the neighbours
        parts = [
            cv2.Sobel(soft, cv2.CV_32F, *axis, ksize=1, scale=0.5) for axis in ((1, 0), (0, 1))
        ]
        slope: np.ndarray = np.stack(parts)
        if self._sum is None or self._square_sum is None:
            self._sum = np.zeros_like(slope)
            self._square_sum = np.zeros_like(slope[0])
        self._sum += slope
        self._square_sum += (slope * slope).sum(axis=0)
        self._num_pictures += 1

    def area_fraction(self) -> float | None:
        """Return the share of the picture that overlays cover, in [0, 1].

        Returns:
            None if too little moves to tell.
        """
        if self._sum is None or self._square_sum is None or self._length_sum is None:
            return None
        if self._num_pictures < MIN_STAY_PICTURES:
            return None
        count = self._num_pictures
        mean = self._sum / count
        square = (mean * mean).sum(axis=0)
        variance = np.maximum(self._square_sum / count - square, 0.0)
        # what lies about the spot must move: the middle of a zoom does not
        around = cv2.blur(self._length_sum, _AROUND_PX)
        moves = around >= MIN_LOCAL_MOTION * self._length_sum.mean()
        stays = (
            moves
            & (square >= STAY_LEVELS**2)
            & (square * count >= STAY_SIGNIFICANCE**2 * (variance + 1.0))
        )
        return float(_overlay_mask(stays, mean).mean())


def _overlay_mask(stays: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the areas of staying edges that are large enough and run in both directions."""
    kernel: Any = np.ones((5, 5), np.uint8)
    joined = cv2.morphologyEx(stays.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    count, labels = cv2.connectedComponents(joined, connectivity=8)
    weights = [np.bincount(labels[stays], np.abs(part[stays]), minlength=count) for part in mean]
    sizes = np.bincount(labels[stays], minlength=count)
    crossing = np.minimum(*weights) / np.maximum(np.maximum(*weights), 1e-6)
    is_overlay: np.ndarray = (sizes >= _MIN_OVERLAY_PX) & (crossing >= _MIN_CROSSING)
    is_overlay[0] = False
    mask: np.ndarray = is_overlay[labels]
    return mask
