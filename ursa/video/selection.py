"""Which clips are used, and for what: pure rules over stored scores; no frame is decoded here.

`judge_clips` is the one place that decides. Order: limits in numbers; copies with equal source
bytes; percentiles and shares, all of the clips that passed so far; near-duplicates; the split.
"""

import hashlib
import math
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ursa.artifacts import Clip, RejectReason, Split, Threshold
from ursa.config import SelectionConfig, SelectionRule
from ursa.errors import ConfigError
from ursa.video.duplicates import drop_repeats, find_clusters, find_likeness, join
from ursa.video.footage import ClipFrames, ClipHashes, join_by_footage, lay_out
from ursa.video.recipes import load_recipe
from ursa.video.score_table import SCORES, score_key, score_of

SELECTION_VERSION = 2
"""Raised when the same clips and configuration would be judged or split otherwise."""

_ONLY_WHERE_IT_MOVES = frozenset({"distinct_fps", "static_overlay_fraction"})

_PLAIN_LIMITS: tuple[tuple[str, str, RejectReason], ...] = (
    ("min_clip_s", "duration_s", RejectReason.TOO_SHORT),
    ("max_black_fraction", "black_fraction", RejectReason.BLACK_FRAMES),
    ("min_luminance", "luminance", RejectReason.TOO_DARK),
    ("max_luminance", "luminance", RejectReason.TOO_BRIGHT),
    ("max_dark_fraction", "dark_fraction", RejectReason.UNDEREXPOSED),
    ("max_bright_fraction", "bright_fraction", RejectReason.OVEREXPOSED),
    ("max_black_border_fraction", "black_border_fraction", RejectReason.BLACK_BORDERS),
    ("min_sharpness", "sharpness", RejectReason.BLURRED),
    ("min_motion_px_per_s", "motion_px_per_s", RejectReason.TOO_STATIC),
    ("max_motion_px_per_s", "motion_px_per_s", RejectReason.TOO_FAST),
    ("max_camera_motion_px_per_s", "camera_motion_px_per_s", RejectReason.CAMERA_TOO_FAST),
    ("min_object_motion_px_per_s", "object_motion_px_per_s", RejectReason.OBJECTS_TOO_STATIC),
    ("max_slideshow_fraction", "slideshow_fraction", RejectReason.SLIDESHOW),
    ("max_freeze_fraction", "freeze_fraction", RejectReason.FROZEN),
    ("min_distinct_fps", "distinct_fps", RejectReason.REPEATED_FRAMES),
    ("max_flicker", "flicker", RejectReason.FLICKER),
    ("max_text_area_fraction", "text_area_fraction", RejectReason.TEXT),
    ("max_static_overlay_fraction", "static_overlay_fraction", RejectReason.OVERLAY),
)
"""Key of `SelectionConfig`, score and reason, the plainest reasons first."""

_PLAIN_REASONS = {key: reason for key, _, reason in _PLAIN_LIMITS}

THRESHOLD_KEYS: Mapping[RejectReason, str] = {
    **{reason: key for key, _, reason in _PLAIN_LIMITS},
    RejectReason.DUPLICATE: "drop_duplicates",
    RejectReason.NEAR_DUPLICATE: "max_duplicate_distance",
    RejectReason.TOO_LOW: "rules",
    RejectReason.TOO_HIGH: "rules",
}
"""The key of `SelectionConfig` that decides about a reason."""


class _Seen:
    """What is kept of the clips, in columns: as objects it would be twice as much."""

    def __init__(self) -> None:
        self.clip_ids: list[str] = []
        self.sources: list[str] = []
        self.starts_s = array("d")
        self.ends_s = array("d")
        self.durations_s = array("d")
        self.num_px = array("q")
        self.perceptual_hashes: list[str | None] = []
        self.frame_hashes = bytearray()
        self.first_bytes = array("q", [0])

    def add(self, clip: Clip, *, with_hash: bool) -> None:
        self.clip_ids.append(clip.clip_id)
        self.sources.append(sys.intern(clip.source_sha256))  # the clips of a source share it
        self.starts_s.append(clip.start_s)
        self.ends_s.append(clip.end_s)
        self.durations_s.append(clip.info.duration_s)
        self.num_px.append(clip.info.width_px * clip.info.height_px)
        if with_hash:
            self.perceptual_hashes.append(clip.scores.perceptual_hash)
            self.frame_hashes += clip.scores.frame_hashes or b""
        self.first_bytes.append(len(self.frame_hashes))

    def preference(self, place: int) -> tuple[int, float, str]:
        """Return a key that puts the clip first that is kept of near-duplicates."""
        return -self.num_px[place], -self.durations_s[place], self.clip_ids[place]


class Judgement(NamedTuple):
    """What is decided about clips, in their order."""

    reasons: list[str | None]
    """Why each clip is rejected; None keeps it."""
    splits: list[Split | None]
    """What each clip that is kept is for."""
    thresholds: tuple[Threshold, ...]
    """The limits in numbers, in the order in which they decided."""


def judge_clips(clips: Iterable[Clip], config: SelectionConfig) -> Judgement:
    """Decide which clips are kept and which of these are held out.

    A score that a limit needs but that was not measured rejects a clip too, except the two that
    say nothing about a clip in which (almost) nothing moves. Of several clips with equal source
    bytes and span the first is kept. Percentiles and shares are of the clips that pass all limits
    in numbers and are no such copies; clips whose score is equal to the limit are all kept. Of
    near-duplicates the one with the most pixels is kept, of equal ones the longest, then the one
    whose id comes first in order.

    Args:
        clips: All clips, in a fixed order; they are read once, and none of them is held.
        config: Thresholds, rules, share to hold out and seed of the split.

    Returns:
        Reasons, splits and the limits in numbers.

    Raises:
        ConfigError: If a rule needs a scorer that has not measured these clips.
    """
    rules = rules_of(config)
    absolute = [*_plain_thresholds(config), *_rule_thresholds(rules)]
    measured = {(item.scorer, item.score): array("d") for item in absolute}
    measured |= {(rule.scorer, rule.score): array("d") for _, rule in rules}
    extra_scores: set[str] = set()
    seen = _Seen()
    for clip in clips:
        seen.add(clip, with_hash=config.max_duplicate_distance is not None)
        extra_scores.update(clip.extra_scores)
        for (scorer, score), column in measured.items():
            value = score_of(clip, scorer, score)
            column.append(math.nan if value is None else value)
    if seen.clip_ids:
        check_rules(config, extra_scores)
    values = {key: np.asarray(column) for key, column in measured.items()}
    reasons = np.full(len(seen.clip_ids), None, object)
    for item in absolute:
        _reject(reasons, values[item.scorer, item.score], item)
    if config.drop_duplicates:
        _reject_equal(reasons, seen.clip_ids)
    is_passing = _is_open(reasons)
    relative = list(
        _relative_thresholds(rules, lambda rule: values[rule.scorer, rule.score][is_passing])
    )
    for item in relative:
        _reject(reasons, values[item.scorer, item.score], item)
    # what percentiles and shares reject changes as clips come; what shows the same must not, or a
    # group would fall apart and a source that was trained on be held out
    shown = np.flatnonzero(is_passing).tolist()
    clusters = np.arange(len(shown))
    if config.max_duplicate_distance is not None:
        hashes = [seen.perceptual_hashes[place] for place in shown]
        seen.perceptual_hashes.clear()
        likeness = find_likeness(hashes, config.max_duplicate_distance)
        del hashes
        is_left = _is_open(reasons)[is_passing]
        order = sorted(
            np.flatnonzero(is_left).tolist(), key=lambda place: seen.preference(shown[place])
        )
        repeats = sorted(drop_repeats(likeness, order))
        reasons[np.flatnonzero(is_passing)[repeats]] = RejectReason.NEAR_DUPLICATE
        clusters = find_clusters(likeness)
    kept = {seen.sources[place] for place in np.flatnonzero(_is_open(reasons)).tolist()}
    # of dropped copies too: their sources show the same
    joined = _joined_sources(seen, shown, clusters, config.max_duplicate_distance)
    groups = [group for group in joined if group & kept]
    held_out = choose_validation_sources(groups, config.validation_fraction, seed=config.split_seed)
    verdicts = [None if reason is None else str(reason) for reason in reasons.tolist()]
    splits: list[Split | None] = [
        None if reason else "validation" if source in held_out else "train"
        for source, reason in zip(seen.sources, verdicts, strict=True)
    ]
    return Judgement(verdicts, splits, (*absolute, *relative))


def rules_of(config: SelectionConfig) -> list[tuple[str, SelectionRule]]:
    """Return the rules of the recipe and those beside it, by what they are called in a record.

    Args:
        config: Names the recipe and holds the rules.
    """
    recipe = () if config.recipe is None else load_recipe(config.recipe).rules
    return [
        *((f"{config.recipe}.{place}", rule) for place, rule in enumerate(recipe)),
        *((f"rules.{place}", rule) for place, rule in enumerate(config.rules)),
    ]


def check_rules(config: SelectionConfig, extra_scores: Collection[str]) -> None:
    """Refuse rules whose scorer has not measured, or will not measure, the clips.

    Args:
        config: Names the recipe and holds the rules.
        extra_scores: What scorers of extras measure, as `<scorer>/<score>`.

    Raises:
        ConfigError: If there is such a rule; names the scorer that it needs, the one that there
            is, and what to do.
    """
    measured = {score_key(item.scorer, name): name for name, item in SCORES.items()}
    measured |= {key: key.partition("/")[2] for key in extra_scores}
    missing: dict[str, str] = {}
    for key, rule in rules_of(config):
        needed = score_key(rule.scorer, rule.score)
        if needed in measured:
            continue
        word = rule.score.partition("_")[0]
        others = sorted(item for item, name in measured.items() if name.partition("_")[0] == word)
        there = f"there is {', '.join(others)}" if others else "nothing like it is measured"
        missing.setdefault(needed, f"{needed} for {key} ({there})")
    if missing:
        other = "" if config.recipe is None else " or another recipe (`ursa data recipes`)"
        raise ConfigError(
            f"selection needs scores that the clips do not have: {'; '.join(missing.values())}. A "
            "number means nothing on the scale of another scorer: enable the plug-in that measures "
            f"it, or choose a rule for a scorer that there is{other}"
        )


def explain(reason: str) -> str:
    """Return where the limit behind a reason is set, in words.

    Args:
        reason: Why a clip was rejected.
    """
    kind, _, score = reason.partition(":")
    if kind == RejectReason.NOT_MEASURED:
        return f"{score or 'a score'} that a limit needs"
    key = THRESHOLD_KEYS[RejectReason(kind)]
    return f"see `selection.{key}`" + (" and `selection.recipe`" if score else "")


def _plain_thresholds(config: SelectionConfig) -> Iterator[Threshold]:
    for key, score, _ in _PLAIN_LIMITS:
        value = getattr(config, key)
        if value is not None:
            is_least = key.startswith("min_")
            yield Threshold(
                key=key,
                scorer=SCORES[score].scorer,
                score=score,
                least=value if is_least else None,
                greatest=None if is_least else value,
                is_relative=False,
                source=None,
            )


def _rule_thresholds(rules: Sequence[tuple[str, SelectionRule]]) -> Iterator[Threshold]:
    for key, rule in rules:
        if rule.least is not None or rule.greatest is not None:
            yield _threshold(key, rule, rule.least, rule.greatest, is_relative=False)


def _relative_thresholds(
    rules: Sequence[tuple[str, SelectionRule]], values_of: Callable[[SelectionRule], np.ndarray]
) -> Iterator[Threshold]:
    """Yield percentiles and shares as numbers; none where nothing was measured."""
    for key, rule in rules:
        values = values_of(rule)
        ordered = np.sort(values[np.isfinite(values)])
        if not len(ordered):  # no number follows, but clips that were not measured are rejected
            yield _threshold(key, rule, None, None, is_relative=True)
            continue
        least, greatest = _percentile_limits(rule, ordered)
        if least is not None or greatest is not None:
            yield _threshold(key, rule, least, greatest, is_relative=True)
        if rule.keep_fraction is not None:
            # rounded, or 0.1 * 30 would be a little more than three clips
            number = max(1, math.ceil(round(rule.keep_fraction * len(ordered), 6)))
            if rule.keep == "greatest":
                yield _threshold(key, rule, float(ordered[-number]), None, is_relative=True)
            else:
                yield _threshold(key, rule, None, float(ordered[number - 1]), is_relative=True)


def _percentile_limits(
    rule: SelectionRule, ordered: np.ndarray
) -> tuple[float | None, float | None]:
    """Return the least and greatest value that stay; both are values of clips."""
    least = greatest = None
    if rule.least_percentile is not None:
        number = math.floor(round(rule.least_percentile / 100 * len(ordered), 6))
        least = float(ordered[min(number, len(ordered) - 1)])
    if rule.greatest_percentile is not None:
        number = math.ceil(round(rule.greatest_percentile / 100 * len(ordered), 6))
        greatest = float(ordered[max(number - 1, 0)])
    return least, greatest


def _threshold(
    key: str,
    rule: SelectionRule,
    least: float | None,
    greatest: float | None,
    *,
    is_relative: bool,
) -> Threshold:
    return Threshold(
        key=key,
        scorer=rule.scorer,
        score=rule.score,
        least=least,
        greatest=greatest,
        is_relative=is_relative,
        source=rule.source,
    )


def _reject(reasons: np.ndarray, values: np.ndarray, limit: Threshold) -> None:
    """Write the reason of the clips that a limit rejects and that have none yet."""
    is_open = _is_open(reasons)
    plain = _PLAIN_REASONS.get(limit.key)
    name = score_key(limit.scorer, limit.score)
    is_built_in = limit.score in SCORES and limit.scorer == SCORES[limit.score].scorer
    if not (is_built_in and limit.score in _ONLY_WHERE_IT_MOVES):
        missing = RejectReason.NOT_MEASURED if plain else f"{RejectReason.NOT_MEASURED}:{name}"
        reasons[is_open & ~np.isfinite(values)] = missing
    if limit.least is not None:
        reasons[is_open & (values < limit.least)] = plain or f"{RejectReason.TOO_LOW}:{name}"
    if limit.greatest is not None:
        reasons[is_open & (values > limit.greatest)] = plain or f"{RejectReason.TOO_HIGH}:{name}"


def _is_open(reasons: np.ndarray) -> np.ndarray:
    """Whether each clip has no reason yet, bool."""
    return np.array([reason is None for reason in reasons.tolist()], bool)


def _reject_equal(reasons: np.ndarray, clip_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for place in np.flatnonzero(_is_open(reasons)).tolist():
        clip_id = clip_ids[place]
        if clip_id in seen:
            reasons[place] = RejectReason.DUPLICATE
        seen.add(clip_id)


def _joined_sources(
    clips: _Seen, places: Sequence[int], clusters: np.ndarray, max_distance: int | None
) -> list[set[str]]:
    """Return the sources in groups: joined are those with clips in one cluster or one footage."""
    names = sorted({clips.sources[place] for place in places})
    number_of = {name: number for number, name in enumerate(names)}
    numbers = np.array([number_of[clips.sources[place]] for place in places], np.int64)
    num_clusters = int(clusters.max(initial=-1)) + 1
    edges = np.stack([numbers, len(names) + clusters], axis=1)
    groups = join(edges, len(names) + num_clusters)[: len(names)]
    if max_distance is not None:
        frames = _frames_of(clips, places, numbers)
        clips.frame_hashes.clear()
        groups = join_by_footage(frames, groups, max_distance)
    joined: dict[int, set[str]] = defaultdict(set)
    for name, group in zip(names, groups.tolist(), strict=True):
        joined[group].add(name)
    return list(joined.values())


def _frames_of(clips: _Seen, places: Sequence[int], numbers: np.ndarray) -> ClipFrames:
    """Return the frames of clips, sorted by the number of their source, by start, by their id."""
    starts = np.array([clips.starts_s[place] for place in places])
    clip_ids = np.array([clips.clip_ids[place] for place in places])
    order = np.lexsort((clip_ids, starts, numbers)).tolist()
    return lay_out(
        ClipHashes(
            numbers[number],
            clips.starts_s[place],
            clips.ends_s[place],
            bytes(clips.frame_hashes[clips.first_bytes[place] : clips.first_bytes[place + 1]]),
        )
        for number, place in ((number, places[number]) for number in order)
    )


def choose_validation_sources(
    groups: Iterable[Collection[str]], fraction: float, *, seed: int
) -> frozenset[str]:
    """Choose the source videos whose clips are held out.

    Every source has a number in [0, 1), a hash of its content and the seed. A group is held out if
    the numbers of all its sources are below `fraction`. So a source stays where it is whatever
    else comes, except that a group which is joined by a source for training becomes training too:
    what was trained on is never held out later, while fraction and seed are the same and no group
    falls apart. If no group is held out, the smallest one is, of equal ones that of the smallest
    number; if all are, that of the greatest number is not; such a small set may change sides when
    it grows.

    Args:
        groups: sha256 of sources, those together that must stay together.
        fraction: Share of the sources to hold out, in [0, 1].
        seed: Decides the numbers.

    Returns:
        sha256 of the sources.
    """
    ranked = [{_rank(source, seed): source for source in group} for group in groups]
    if fraction == 0 or len(ranked) < 2:
        return frozenset()
    chosen = [group for group in ranked if max(group) < fraction]
    if not chosen:
        chosen = [min(ranked, key=lambda group: (len(group), min(group)))]
    elif len(chosen) == len(ranked):
        chosen.remove(max(ranked, key=max))
    return frozenset(source for group in chosen for source in group.values())


def _rank(source: str, seed: int) -> float:
    """Return the number of a source; that no two are equal is as sure as a hash is."""
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
