"""Which clips are used, and for what: pure rules over stored scores; no frame is decoded here."""

import hashlib
from collections.abc import Mapping, Sequence

from ursa.artifacts import Clip, ClipScores, RejectReason
from ursa.config import SelectionConfig


def judge_clips(clips: Sequence[Clip], config: SelectionConfig) -> list[RejectReason | None]:
    """Return for every clip the reason to reject it, or None to keep it.

    Of several clips with the same source bytes and span only the first is kept.

    Args:
        clips: All clips, in a fixed order.
        config: Thresholds.
    """
    verdicts: list[RejectReason | None] = []
    seen: set[str] = set()
    for clip in clips:
        verdict = judge_scores(clip.scores, config)
        if verdict is None and config.drop_duplicates and clip.clip_id in seen:
            verdict = RejectReason.DUPLICATE
        seen.add(clip.clip_id)
        verdicts.append(verdict)
    return verdicts


def judge_scores(scores: ClipScores, config: SelectionConfig) -> RejectReason | None:
    """Return the first threshold that the scores of a clip miss, or None.

    Args:
        scores: Measurements of a clip.
        config: Thresholds; None is none. A score that is needed but not measured is a reason too.
    """
    thresholds = (
        (scores.luminance, config.min_luminance, None, RejectReason.TOO_DARK),
        (scores.luminance, None, config.max_luminance, RejectReason.TOO_BRIGHT),
        (
            scores.black_border_fraction,
            None,
            config.max_black_border_fraction,
            RejectReason.BLACK_BORDERS,
        ),
        (scores.sharpness, config.min_sharpness, None, RejectReason.BLURRED),
        (scores.motion_px_per_s, config.min_motion_px_per_s, None, RejectReason.TOO_STATIC),
        (scores.motion_px_per_s, None, config.max_motion_px_per_s, RejectReason.TOO_FAST),
    )
    for value, least, greatest, reason in thresholds:
        if least is None and greatest is None:
            continue
        if value is None:
            return RejectReason.NOT_MEASURED
        if (least is not None and value < least) or (greatest is not None and value > greatest):
            return reason
    return None


def choose_validation_sources(
    num_clips: Mapping[str, int], fraction: float, *, seed: int
) -> frozenset[str]:
    """Choose the source videos whose clips are held out.

    Sources are gone through in an order drawn by the seed. One is held out if all clips held out
    so far and its own are at most `fraction` of all. If none fits, but some should be held out,
    the smallest is. At least one source stays for training.

    Args:
        num_clips: Number of kept clips by sha256 of the source.
        fraction: Greatest share of clips to hold out, in [0, 1].
        seed: Decides the order.

    Returns:
        sha256 of the sources.
    """
    order = sorted(num_clips, key=lambda source: _rank(source, seed))
    if fraction == 0 or len(order) < 2:
        return frozenset()
    allowed = fraction * sum(num_clips.values())
    chosen: set[str] = set()
    total = 0
    for source in order:
        if len(chosen) + 1 < len(order) and total + num_clips[source] <= allowed:
            chosen.add(source)
            total += num_clips[source]
    return frozenset(chosen or {min(order, key=lambda source: num_clips[source])})


def _rank(source: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{source}".encode()).digest()
