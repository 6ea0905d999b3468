"""Where a clip stands still: freezes, slideshows and repeated frames.

A run of frames is still as long as no spot of it differs from the first frame of the run. So a
slow pan, which drifts away from there, ends its runs, noise of compression does not, and a small
thing that moves in a picture that stands is seen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

MIN_STILL_S = 0.5
"""Shorter runs are no freeze but a low frame rate, seconds."""
STILL_LEVELS = 2.5
"""Mean change of a spot from which on it is no longer still, 8-bit levels."""
SPOT_PX = 16
"""Side of the spots that are compared, pixels of a picture 256 px wide."""
MAX_JOINT_S = 2.0
"""Longest dissolve between two stills of a slideshow, seconds."""
REPEATED_SHARE = 0.2
"""A frame that changes less than this share of what those around it change is a repeated one."""

_REPEATED_LEVELS = 0.02
_NEIGHBOURHOOD_S = 0.5
_RANK = 3
_JOINT_SIZE = (64, 36)
_MIN_STEP_LEVELS = 6.0
_MAX_CUT_FRAMES = 2
_MAX_BLEND_ERROR = 0.3


class Run(NamedTuple):
    """Frames from `start` up to `stop` that show the same."""

    start: int
    stop: int


class StillnessMeter:
    """Finds still runs, and what joins them, from the frames of a clip in order.

    Kept are two pictures, the thumbnails of `MAX_JOINT_S`, and a number a frame.
    """

    def __init__(self, fps: float) -> None:
        """Start a clip.

        Args:
            fps: Frame rate of the clip, frames per second.
        """
        self._fps = fps
        self._least_frames = max(2, round(MIN_STILL_S * fps))
        self._most_joint = round(MAX_JOINT_S * fps)
        self._reference: np.ndarray | None = None
        self._previous: np.ndarray | None = None
        self._run_start = 0
        self._num_frames = 0
        self._changes: list[float] = []
        self._runs: list[Run] = []
        self._joined: set[Run] = set()
        self._last_still: np.ndarray | None = None
        self._thumbnail: np.ndarray | None = None
        self._between: list[np.ndarray] = []

    def add(self, picture: np.ndarray) -> None:
        """Take in the next frame.

        Args:
            picture: Luma, `MOTION_WIDTH_PX` wide, shape (H, W), uint8.
        """
        if self._previous is not None:
            self._changes.append(_mean_change(self._previous, picture))
        if self._reference is None or spot_change(self._reference, picture) > STILL_LEVELS:
            self._end_run()
            self._reference = picture
            self._run_start = self._num_frames
            self._thumbnail = cv2.resize(picture, _JOINT_SIZE, interpolation=cv2.INTER_AREA)
        self._previous = picture
        self._num_frames += 1

    def runs(self) -> tuple[Run, ...]:
        """Return the still runs of at least `MIN_STILL_S`."""
        self._end_run()
        self._run_start = self._num_frames
        return tuple(self._runs)

    def freeze_fraction(self) -> float:
        """Return the share of the frames in still runs, in [0, 1]."""
        return _length(self.runs()) / max(self._num_frames, 1)

    def slideshow_fraction(self) -> float:
        """Return the share of the frames in still runs that a cut or dissolve joins to another."""
        self.runs()
        return _length(tuple(self._joined)) / max(self._num_frames, 1)

    def distinct_frames(self) -> list[int]:
        """Return the frames that are not the one before once more, the first one among them."""
        return [0, *(1 + np.flatnonzero(~self._is_repeated())).tolist()][: self._num_frames]

    def distinct_fps(self) -> float | None:
        """Return how many frames a second differ from the one before, outside of still runs.

        Returns:
            At most the rate of the clip; None if nothing is left outside.
        """
        is_inside = np.ones(max(self._num_frames - 1, 0), bool)
        for run in self.runs():
            # the change into a run belongs to what was before
            is_inside[run.start : run.stop - 1] = False
        if not is_inside.any():
            return None
        is_distinct = ~self._is_repeated()[is_inside]
        return float(is_distinct.mean() * self._fps)

    def _is_repeated(self) -> np.ndarray:
        """Return for every frame but the first whether it is the one before once more."""
        changes = np.asarray(self._changes)
        if not changes.size:
            return np.zeros(0, bool)
        reach = max(1, round(_NEIGHBOURHOOD_S * self._fps))
        padded = np.pad(changes, reach)
        around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
        # not the greatest one: a flash or a cut says nothing about the frames around it
        rank = min(_RANK, around.shape[1])
        usual = np.partition(around, -rank, axis=1)[:, -rank]
        return changes <= np.maximum(_REPEATED_LEVELS, REPEATED_SHARE * usual)

    def _end_run(self) -> None:
        run = Run(self._run_start, self._num_frames)
        if self._thumbnail is None or run.stop == run.start:
            return
        if run.stop - run.start < self._least_frames:
            # a still that begins with the first frame has nothing before it to be joined to
            if self._last_still is not None:
                self._between += [self._thumbnail] * (run.stop - run.start)
                if len(self._between) > self._most_joint:
                    self._last_still = None
                    self._between.clear()
            return
        self._runs.append(run)
        if self._last_still is not None and is_joint(
            self._last_still, self._between, self._thumbnail
        ):
            self._joined |= {self._runs[-2], run}
        self._last_still = self._thumbnail
        self._between.clear()


def is_joint(before: np.ndarray, between: Sequence[np.ndarray], after: np.ndarray) -> bool:
    """Return whether a cut or a dissolve, and no motion, leads from one still to another.

    Args:
        before: Thumbnail of the still before, luma, shape (H, W), uint8.
        between: The frames between both.
        after: Thumbnail of the still after.

    Returns:
        False too if both stills show the same.
    """
    start = before.astype(np.float32)
    step = after.astype(np.float32) - start
    size = float(np.abs(step).mean())
    if size < _MIN_STEP_LEVELS:
        return False
    if len(between) <= _MAX_CUT_FRAMES:
        return True
    return all(_blend_error(frame - start, step) <= _MAX_BLEND_ERROR for frame in between)


def _blend_error(change: np.ndarray, step: np.ndarray) -> float:
    """Return the share of a step that the best blend of both ends does not explain."""
    weight = float(np.vdot(change, step) / np.vdot(step, step))
    weight = min(max(weight, 0.0), 1.0)
    return float(np.abs(change - weight * step).mean() / np.abs(step).mean())


def spot_change(first: np.ndarray, second: np.ndarray) -> float:
    """Return the greatest mean change of a spot of `SPOT_PX` square, 8-bit levels.

    Args:
        first: Luma, shape (H, W), uint8.
        second: Luma of the same shape.
    """
    difference = cv2.absdiff(first, second)
    spots = (max(1, difference.shape[1] // SPOT_PX), max(1, difference.shape[0] // SPOT_PX))
    means = cv2.resize(difference.astype(np.float32), spots, interpolation=cv2.INTER_AREA)
    return float(means.max())


def _mean_change(first: np.ndarray, second: np.ndarray) -> float:
    return float(cv2.norm(first, second, cv2.NORM_L1) / first.size)


def _length(runs: tuple[Run, ...]) -> int:
    return sum(run.stop - run.start for run in runs)
