"""Shot boundaries: which frame begins a new shot, and how a shot is cut into clips."""

import itertools
import math

import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import ContentDetector

_NOMINAL_FPS = 25.0
_ROUNDING = 1e-6


class ShotDetector:
    """Finds hard cuts by the change of colour and brightness between successive frames.

    Frames are pushed one by one, so nothing has to be kept and no file is opened here. Every cut
    counts: a flash of two frames is a shot of its own, which is then too short to become a clip.
    """

    def __init__(self, threshold: float) -> None:
        """Start before the first frame.

        Args:
            threshold: ContentDetector threshold, mean change in 8-bit HSV units.
        """
        self._detector = ContentDetector(threshold=threshold, min_scene_len=0)
        self._num_frames = 0

    def is_cut(self, frame: np.ndarray) -> bool:
        """Return whether a new shot begins with this frame; the very first one is no cut.

        Args:
            frame: BGR picture, shape (H, W, 3), uint8; the same shape in every call.
        """
        # the time is only handed back by the detector: the frame number is enough
        timecode = FrameTimecode(self._num_frames, fps=_NOMINAL_FPS)
        self._num_frames += 1
        return bool(self._detector.process_frame(timecode, frame))


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
