"""Shot boundaries: where a shot ends and the next one begins, and how a shot is cut into clips."""

import itertools
import math
import statistics
from collections import deque
from typing import NamedTuple

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import ContentDetector

from ursa.config import IngestionConfig
from ursa.video.transitions import TransitionDetector

_NOMINAL_FPS = 25.0
_ROUNDING = 1e-6
_AROUND = 2
_MAX_REPEATS = 3
_REPEATED_LEVELS = 0.5
_REPEAT_SIZE = (64, 36)


class Boundary(NamedTuple):
    """Between two shots: frames from `start` up to `stop` belong to neither.

    A hard cut has none: `start` equals `stop`, the first frame of the next shot.
    """

    start: int
    stop: int


class CutDetector:
    """Finds hard cuts by the change of colour and brightness between successive frames.

    A cut is a large change (the content score of PySceneDetect) that is also large beside those of
    the two frames before and after it (as its adaptive detector asks), so that fast motion, which
    changes every frame as much, is none. Every cut counts: a flash of two frames is a shot of its
    own, which is then too short to become a clip. Repeated frames are passed over: beside them
    every change would be large.
    """

    def __init__(self, config: IngestionConfig) -> None:
        """Start before the first frame.

        Args:
            config: Thresholds of cuts.
        """
        self._detector = ContentDetector(min_scene_len=0)
        self._rules = (
            (config.shot_threshold, config.shot_ratio),
            (config.adaptive_threshold, config.adaptive_ratio),
        )
        self._scored: deque[tuple[int, float | None]] = deque(maxlen=2 * _AROUND + 1)
        self._num_repeats = 0
        self._last_luma: np.ndarray | None = None

    @property
    def settled(self) -> int:
        """Number of the first frame that may still turn out to be a cut."""
        return self._scored[-_AROUND][0] if self._scored else 0

    def push(self, number: int, frame: np.ndarray) -> list[int]:
        """Take in the next frame.

        Args:
            number: Its number; numbers ascend.
            frame: BGR picture, shape (H, W, 3), uint8; the same shape in every call.

        Returns:
            Numbers of frames, before this one, with which a shot begins; never the first one.
        """
        small = cv2.resize(frame, _REPEAT_SIZE, interpolation=cv2.INTER_AREA)
        luma = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
        if self._last_luma is None:
            # nothing is known of what was before: the second frame may be a cut
            self._scored.extend([(number, None)] * _AROUND)
        else:
            change = cv2.norm(luma, self._last_luma, cv2.NORM_L1) / luma.size
            if change < _REPEATED_LEVELS and self._num_repeats < _MAX_REPEATS:
                self._num_repeats += 1
                return []
        self._num_repeats = 0
        self._last_luma = luma
        # the time is only handed back by the detector: the number is enough
        self._detector.process_frame(FrameTimecode(number, fps=_NOMINAL_FPS), frame)
        is_first = self._scored[-1][1] is None and self._scored[-1][0] == number
        return self._judge(number, None if is_first else float(self._detector._frame_score))

    def finish(self) -> list[int]:
        """Return the cuts among the last frames."""
        if not self._scored:
            return []
        last = self._scored[-1][0]
        return [cut for _ in range(_AROUND) for cut in self._judge(last, None)]

    def _judge(self, number: int, score: float | None) -> list[int]:
        """Add the score of a frame; return the frame two before it if that is a cut."""
        self._scored.append((number, score))
        if len(self._scored) <= 2 * _AROUND:
            return []
        scores = [score for _, score in self._scored]
        change = scores.pop(_AROUND)
        if change is None:
            return []
        # the median, not the mean: the second of two cuts hides the first one otherwise
        usual = statistics.median([score for score in scores if score is not None] or [0.0])
        is_cut = any(
            change >= threshold and change >= ratio * usual for threshold, ratio in self._rules
        )
        return [self._scored[_AROUND][0]] if is_cut else []


class ShotDetector:
    """Finds cuts, dissolves and fades; frames are pushed one by one and no file is opened here."""

    def __init__(self, config: IngestionConfig) -> None:
        """Start before the first frame.

        Args:
            config: Thresholds of cuts and transitions.
        """
        self._cuts = CutDetector(config)
        self._transitions: TransitionDetector | None = None
        if config.transition_threshold is not None:
            self._transitions = TransitionDetector(
                config.transition_threshold, config.max_transition_s
            )
        self._found: list[Boundary] = []
        self._released_to = 0
        self._num_frames = 0

    def push(self, frame: np.ndarray, time_s: float) -> list[Boundary]:
        """Take in the next frame.

        Args:
            frame: BGR picture, shape (H, W, 3), uint8; the same shape in every call.
            time_s: When it is shown, seconds; it never falls.

        Returns:
            Boundaries that are certain by now, in order and disjoint; frames count from 0. They
            may lie as long ago as `lookback_s`.
        """
        number = self._num_frames
        self._num_frames += 1
        self._found += [Boundary(cut, cut) for cut in self._cuts.push(number, frame)]
        settled = self._cuts.settled
        if self._transitions is not None:
            spans = self._transitions.push(number, time_s, frame)
            self._found += [Boundary(*span) for span in spans]
            settled = min(settled, self._transitions.settled)
        return self._release(settled)

    def finish(self) -> list[Boundary]:
        """Return the boundaries that are left after the last frame."""
        self._found += [Boundary(cut, cut) for cut in self._cuts.finish()]
        if self._transitions is not None:
            self._found += [Boundary(*span) for span in self._transitions.finish()]
        return self._release(self._num_frames)

    def _release(self, settled: int) -> list[Boundary]:
        """Return, and forget, the boundaries that end by a frame, those that touch as one."""
        if not self._found:
            return []
        released: list[Boundary] = []
        kept: list[Boundary] = []
        for boundary in sorted(self._found):
            # one that was cut short because it took too long may go on
            start = max(boundary.start, self._released_to)
            stop = max(boundary.stop, start)
            if kept or boundary.stop > settled:
                kept.append(boundary)
            elif released and start <= released[-1].stop:
                released.append(Boundary(released.pop().start, stop))
            else:
                released.append(Boundary(start, stop))
            if not kept:
                self._released_to = stop
        self._found = kept
        return released


def lookback_s(config: IngestionConfig) -> float:
    """Return how long ago a boundary may lie when it is found, seconds.

    Args:
        config: Thresholds of cuts and transitions.
    """
    cut_s = (_AROUND + 1) * (_MAX_REPEATS + 1) / config.min_fps
    if config.transition_threshold is None:
        return cut_s
    # the longest that one may grow to, and the time until nothing can be added to it
    return max(cut_s, 3 * config.max_transition_s)


def frame_limits(min_clip_s: float, max_clip_s: float, fps: float) -> tuple[int, int]:
    """Return the least and the greatest number of frames of a clip.

    Args:
        min_clip_s: Least length, seconds.
        max_clip_s: Greatest length, seconds, at least `min_clip_s`.
        fps: Frame rate, frames per second.

    Returns:
        Least, rounded up and at least 1, and greatest, rounded down and at least the least.
    """
    shortest = max(1, math.ceil(min_clip_s * fps - _ROUNDING))
    longest = max(shortest, math.floor(max_clip_s * fps + _ROUNDING))
    return shortest, longest


def cut_spans(num_frames: int, shortest: int, longest: int) -> list[tuple[int, int]]:
    """Cut a shot into the fewest equal clips that are not too long.

    Spans are half-open, ordered and disjoint; each has between `shortest` and `longest` frames.
    They cover the whole shot, except that a shot shorter than `shortest` gives none, and where
    equal pieces would be too short (only if `longest < 2 * shortest`) the end is left out.

    Args:
        num_frames: Length of the shot, frames.
        shortest: Least length of a clip, frames.
        longest: Greatest length of a clip, frames; at least `shortest`.

    Returns:
        Pairs (first frame, frame after the last), relative to the shot.
    """
    if num_frames < shortest:
        return []
    num_pieces = math.ceil(num_frames / longest)
    if num_frames // num_pieces < shortest:
        num_pieces -= 1
        num_frames = num_pieces * longest
    borders = [piece * num_frames // num_pieces for piece in range(num_pieces + 1)]
    return list(itertools.pairwise(borders))
