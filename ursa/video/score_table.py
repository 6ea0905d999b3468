"""What is measured of every clip: the unit of each score and the scorer that measures it.

A threshold means something on the scale of one scorer alone: motion in pixels of one optical flow
is not that of another, nor that of codec vectors. So every score names its scorer, and a rule of a
selection names the scorer that its numbers were chosen for. Scores of extras are stored with
theirs, as `<scorer>/<score>`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ursa.artifacts import Clip


class Score(NamedTuple):
    """Who measures a score that every clip has, and in what unit."""

    scorer: str
    unit: str


SCORES: Mapping[str, Score] = {
    "duration_s": Score("clip-file", "s"),
    "width_px": Score("clip-file", "px, of the normalised clip"),
    "height_px": Score("clip-file", "px, of the normalised clip"),
    "fps": Score("clip-file", "frames per second, of the normalised clip"),
    "motion_px_per_s": Score("dis-flow-256px", "px/s at 256 px width"),
    "camera_motion_px_per_s": Score("dis-flow-affine-256px", "px/s at 256 px width"),
    "object_motion_px_per_s": Score("dis-flow-affine-256px", "px/s at 256 px width"),
    "sharpness": Score("laplacian-variance-clip-size", "8-bit luma squared, at clip size"),
    "luminance": Score("mean-luma", "8-bit luma, 0..255"),
    "dark_fraction": Score("luma-histogram", "share of pixels, 0..1"),
    "bright_fraction": Score("luma-histogram", "share of pixels, 0..1"),
    "black_fraction": Score("black-frames-24", "share of frames, 0..1"),
    "black_border_fraction": Score("max-luma-bars", "share of the picture, 0..1"),
    "freeze_fraction": Score("still-runs-256px", "share of frames, 0..1"),
    "slideshow_fraction": Score("still-runs-256px", "share of frames, 0..1"),
    "distinct_fps": Score("repeated-frames-256px", "frames per second"),
    "flicker": Score("luma-second-difference", "8-bit levels"),
    "text_area_fraction": Score("tophat-text-180px", "share of the picture, 0..1"),
    "static_overlay_fraction": Score("mean-slope-overlay", "share of the picture, 0..1"),
}
"""Scores that need no extra, by their name in the table of clips."""

BUILT_IN_SCORERS = frozenset(item.scorer for item in SCORES.values())

_OF_FILE = frozenset({"duration_s", "width_px", "height_px", "fps"})


def score_key(scorer: str, score: str) -> str:
    """Return the name of a score with its scorer, as `extra_scores` has it.

    Args:
        scorer: Who measures it.
        score: What it is called.
    """
    return f"{scorer}/{score}"


def score_of(clip: Clip, scorer: str, score: str) -> float | None:
    """Return what a scorer measured of a clip; None if it did not.

    Args:
        clip: A measured clip.
        scorer: Who measures it.
        score: What it is called.
    """
    known = SCORES.get(score)
    if known is None or known.scorer != scorer:
        return clip.extra_scores.get(score_key(scorer, score))
    value = getattr(clip.info if score in _OF_FILE else clip.scores, score)
    return None if value is None else float(value)
