"""Dissolves and fades: where one picture slowly becomes another one without moving there.

In a dissolve every picture lies on the straight line between the pictures at its ends. Motion
leads to another picture too, but not along that line. Compared are thumbnails, so that what moves
a little on either side of a dissolve does not matter.

References:
    Dissolves as linear mixtures of two shots: Hampapur, Jain and Weymouth, Multimedia Tools and
    Applications 1 (1995).
"""

import bisect
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

THUMBNAIL_PX = (32, 18)
"""Width and height of the pictures that are compared, pixels."""
MAX_BLEND_ERROR = 0.28
"""Share of the change that the straight line may leave unexplained."""
ERROR_SHARE = 0.5
"""And at most this share of what smooth motion to a picture so alike would leave."""
MAX_BEND = 0.12
"""The picture in the middle is that far from half-way between its neighbours at most."""
MAX_CORRELATION = 0.5
"""Pictures more alike than that are the same scene, brighter or darker."""
FLAT_RATIO = 0.25
"""A picture with less than this share of the contrast of the other one is faded out."""

MIN_SPREAD = 0.68
"""Mean over root mean square of the change: what passes through the picture changes a part only."""
MAX_STEP = 0.5
"""Share of the whole change that a single frame may bring."""

_SCALES = (0.125, 0.25, 0.5, 1.0)
_LEAST_FRAMES = 4
_TINY = 1e-6
_LEAST_WEIGHT = 0.08
_LEAST_SPAN = 0.3


class Moment(NamedTuple):
    """A frame as it is kept."""

    number: int
    time_s: float
    thumbnail: np.ndarray
    change: float
    """Mean change of luma from the frame before, 8-bit levels."""


class TransitionDetector:
    """Finds dissolves and fades among frames that are pushed one by one."""

    def __init__(self, min_change: float, max_transition_s: float) -> None:
        """Start before the first frame.

        Args:
            min_change: Mean change of luma from one end to the other at the least, 8-bit levels.
            max_transition_s: Longest window looked at, seconds; longer transitions are found in
                parts, if at all.
        """
        self._min_change = min_change
        self._windows_s = [max_transition_s * scale for scale in _SCALES]
        self._moments: deque[Moment] = deque()
        self._open: tuple[int, int] | None = None
        self._max_open_s = 2 * max_transition_s
        self._open_since_s = 0.0

    @property
    def settled(self) -> int:
        """Number of the first frame that may still turn out to lie in a transition."""
        first = self._moments[0].number if self._moments else 0
        return first if self._open is None else min(first, self._open[0])

    def push(self, number: int, time_s: float, frame: np.ndarray) -> list[tuple[int, int]]:
        """Take in the next frame.

        Args:
            number: Its number.
            time_s: When it is shown, seconds; it never falls.
            frame: BGR picture, shape (H, W, 3), uint8.

        Returns:
            Transitions that are over: first frame, and frame after the last.
        """
        small = cv2.resize(frame, THUMBNAIL_PX, interpolation=cv2.INTER_AREA)
        # fine grain that moves by less than a pixel of the thumbnail would be a blend to the digit
        luma = cv2.GaussianBlur(
            cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32), (5, 5), 1.0
        )
        moments = self._moments
        change = float(np.abs(luma - moments[-1].thumbnail).mean()) if moments else 0.0
        moments.append(Moment(number, time_s, luma, change))
        while time_s - moments[0].time_s > self._windows_s[-1] + 1e-6:
            moments.popleft()
        over: list[tuple[int, int]] = []
        if self._open is not None and (
            moments[0].number >= self._open[1] or time_s - self._open_since_s > self._max_open_s
        ):
            over.append(self._open)
            self._open = None
        first = self._first_of_blend()
        if first is not None:
            start = first.number if self._open is None else min(self._open[0], first.number)
            if self._open is None:
                self._open_since_s = first.time_s
            self._open = (start, number + 1)
        return over

    def finish(self) -> list[tuple[int, int]]:
        """Return the transition that is not over with the last frame, if there is one."""
        return [] if self._open is None else [self._open]

    def _first_of_blend(self) -> Moment | None:
        """Return where the shortest blend begins that ends with the newest frame."""
        moments = list(self._moments)
        times = [moment.time_s for moment in moments]
        last = len(moments) - 1
        for window_s in self._windows_s:
            first = bisect.bisect_left(times, times[last] - window_s - 1e-6)
            if last - first < _LEAST_FRAMES or times[last] - times[first] < 0.8 * window_s:
                continue
            size = float(np.abs(moments[last].thumbnail - moments[first].thumbnail).mean())
            if max(m.change for m in moments[first + 1 :]) > MAX_STEP * size:
                continue  # a cut, or motion
            middle = [first + round(share * (last - first)) for share in (0.25, 0.5, 0.75)]
            if is_blend(
                moments[first].thumbnail,
                [moments[place].thumbnail for place in middle],
                moments[last].thumbnail,
                min_change=self._min_change,
            ):
                return moments[first]
        return None


def is_blend(
    start: np.ndarray, between: Sequence[np.ndarray], stop: np.ndarray, *, min_change: float
) -> bool:
    """Return whether pictures lie, evenly and in order, on the line between two unlike ones.

    Args:
        start: Luma, shape (H, W), float32.
        between: Three pictures, a quarter, half and three quarters of the way.
        stop: The last picture.
        min_change: Mean change from first to last at the least, 8-bit levels.
    """
    step = stop - start
    size = float(np.abs(step).mean())
    if size < min_change or not _is_other_scene(start, stop, min_change):
        return False
    most = size * min(MAX_BLEND_ERROR, ERROR_SHARE * _error_of_motion(start, stop))
    square = float(np.vdot(step, step))
    weights: list[float] = []
    for picture in between:
        change = picture - start
        weight = float(np.vdot(change, step)) / square
        if float(np.abs(change - weight * step).mean()) > most:
            return False
        weights.append(weight)
    first, second, third = weights
    return (
        first >= _LEAST_WEIGHT
        and third <= 1 - _LEAST_WEIGHT
        and third - first >= _LEAST_SPAN
        and abs(second - (first + third) / 2) <= MAX_BEND
    )


def _error_of_motion(start: np.ndarray, stop: np.ndarray) -> float:
    """Return the share of the change that a blend leaves unexplained half-way if it is motion.

    It holds for a smooth random texture, the correlation of which falls as a Gaussian of the shift:
    half the shift has its fourth root.
    """
    first, second = start - start.mean(), stop - stop.mean()
    product = float(np.linalg.norm(first) * np.linalg.norm(second)) + _TINY
    alike = min(max(float(np.vdot(first, second)) / product, 0.0), 0.99)
    return float(np.sqrt((1 - 2 * np.sqrt(alike) / (1 + alike)) / (2 * (1 - alike))))


def _is_other_scene(start: np.ndarray, stop: np.ndarray, min_change: float) -> bool:
    """Return whether two pictures differ in more than how bright they are as a whole."""
    first, second = start - start.mean(), stop - stop.mean()
    contrast = sorted((float(np.linalg.norm(first)), float(np.linalg.norm(second))))
    if contrast[0] <= FLAT_RATIO * contrast[1]:
        return True
    if float(np.vdot(first, second)) >= MAX_CORRELATION * contrast[0] * contrast[1]:
        return False
    change = np.abs(second - first)
    spread = float(change.mean()) / float(np.sqrt(np.square(change).mean()) + _TINY)
    return float(change.mean()) >= min_change and spread >= MIN_SPREAD
