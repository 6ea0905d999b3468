"""Which clips are used, and for what: pure rules over stored scores; no frame is decoded here."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from ursa.artifacts import Clip, ClipScores, RejectReason
from ursa.config import SelectionConfig

_ONLY_WHERE_IT_MOVES = frozenset({"distinct_fps", "static_overlay_fraction"})


THRESHOLD_KEYS: Mapping[RejectReason, str] = {
    RejectReason.TOO_SHORT: "min_clip_s",
    RejectReason.TOO_STATIC: "min_motion_px_per_s",
    RejectReason.TOO_FAST: "max_motion_px_per_s",
    RejectReason.CAMERA_TOO_FAST: "max_camera_motion_px_per_s",
    RejectReason.OBJECTS_TOO_STATIC: "min_object_motion_px_per_s",
    RejectReason.BLURRED: "min_sharpness",
    RejectReason.TOO_DARK: "min_luminance",
    RejectReason.TOO_BRIGHT: "max_luminance",
    RejectReason.UNDEREXPOSED: "max_dark_fraction",
    RejectReason.OVEREXPOSED: "max_bright_fraction",
    RejectReason.BLACK_FRAMES: "max_black_fraction",
    RejectReason.BLACK_BORDERS: "max_black_border_fraction",
    RejectReason.FROZEN: "max_freeze_fraction",
    RejectReason.SLIDESHOW: "max_slideshow_fraction",
    RejectReason.REPEATED_FRAMES: "min_distinct_fps",
    RejectReason.FLICKER: "max_flicker",
    RejectReason.TEXT: "max_text_area_fraction",
    RejectReason.OVERLAY: "max_static_overlay_fraction",
    RejectReason.DUPLICATE: "drop_duplicates",
}
"""The key of `SelectionConfig` that decides about a reason."""


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
        verdict = judge_clip(clip, config)
        if verdict is None and config.drop_duplicates and clip.clip_id in seen:
            verdict = RejectReason.DUPLICATE
        seen.add(clip.clip_id)
        verdicts.append(verdict)
    return verdicts


def judge_clip(clip: Clip, config: SelectionConfig) -> RejectReason | None:
    """Return the first threshold that a clip misses, or None.

    Args:
        clip: A measured clip.
        config: Thresholds; None is none.
    """
    if config.min_clip_s is not None and clip.info.duration_s < config.min_clip_s:
        return RejectReason.TOO_SHORT
    return judge_scores(clip.scores, config)


def judge_scores(scores: ClipScores, config: SelectionConfig) -> RejectReason | None:
    """Return the first threshold that the scores of a clip miss, or None.

    Args:
        scores: Measurements of a clip.
        config: Thresholds; None is none. A score that is needed but not measured is a reason too,
            except the two that say nothing about a clip in which (almost) nothing moves.
    """
    for name, least, greatest, reason in _thresholds(config):
        if least is None and greatest is None:
            continue
        value = getattr(scores, name)
        if value is None:
            if name in _ONLY_WHERE_IT_MOVES:
                continue
            return RejectReason.NOT_MEASURED
        if (least is not None and value < least) or (greatest is not None and value > greatest):
            return reason
    return None


def _thresholds(
    config: SelectionConfig,
) -> Iterator[tuple[str, float | None, float | None, RejectReason]]:
    """Yield score, least value, greatest value and reason, the plainest reasons first."""
    yield "black_fraction", None, config.max_black_fraction, RejectReason.BLACK_FRAMES
    yield "luminance", config.min_luminance, None, RejectReason.TOO_DARK
    yield "luminance", None, config.max_luminance, RejectReason.TOO_BRIGHT
    yield "dark_fraction", None, config.max_dark_fraction, RejectReason.UNDEREXPOSED
    yield "bright_fraction", None, config.max_bright_fraction, RejectReason.OVEREXPOSED
    borders = config.max_black_border_fraction
    yield "black_border_fraction", None, borders, RejectReason.BLACK_BORDERS
    yield "sharpness", config.min_sharpness, None, RejectReason.BLURRED
    yield "motion_px_per_s", config.min_motion_px_per_s, None, RejectReason.TOO_STATIC
    yield "motion_px_per_s", None, config.max_motion_px_per_s, RejectReason.TOO_FAST
    camera = config.max_camera_motion_px_per_s
    yield "camera_motion_px_per_s", None, camera, RejectReason.CAMERA_TOO_FAST
    objects = config.min_object_motion_px_per_s
    yield "object_motion_px_per_s", objects, None, RejectReason.OBJECTS_TOO_STATIC
    yield "slideshow_fraction", None, config.max_slideshow_fraction, RejectReason.SLIDESHOW
    yield "freeze_fraction", None, config.max_freeze_fraction, RejectReason.FROZEN
    yield "distinct_fps", config.min_distinct_fps, None, RejectReason.REPEATED_FRAMES
    yield "flicker", None, config.max_flicker, RejectReason.FLICKER
    yield "text_area_fraction", None, config.max_text_area_fraction, RejectReason.TEXT
    overlay = config.max_static_overlay_fraction
    yield "static_overlay_fraction", None, overlay, RejectReason.OVERLAY


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
