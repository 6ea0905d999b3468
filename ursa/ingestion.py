"""The ingestion and selection steps: foreign videos in, normalised and judged clips out.

`ursa.sources` lists a source, `ingest_video` does the work of one file and commits a unit
record, `commit_clips` joins all units to a committed `ClipSet`, `select_clips` decides on stored
scores. Every file of the source ends as clips or as a failure with a reason. The layout below
the output URI is in docs/data-format.md.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Clip,
    ClipSelection,
    ClipSet,
    FailureReason,
    IngestedVideo,
    SourceVideo,
)
from ursa.config import IngestionConfig, SelectionConfig, fingerprint
from ursa.data.clips import (
    CLIP_SCHEMA,
    FAILURE_SCHEMA,
    SELECTION_SCHEMA,
    batches_of,
    clip_row,
    failure_row,
    iter_clips,
    put_batches,
    put_table,
    read_clip_table,
    selection_rows,
)
from ursa.errors import DataError, FailureBudgetExceeded, ManifestError
from ursa.sources.names import last_segment, stand_in_etag
from ursa.sources.notes import SourceNotes
from ursa.sources.reading import copy_source
from ursa.video.probe import NormalisedVideo, QuarantinedError, normalise_video
from ursa.video.selection import SELECTION_VERSION, judge_clips, rules_of

logger = logging.getLogger(__name__)

INGESTION_VERSION = 5
"""Raised when the same file and configuration would give other clips or scores."""

# these may come out differently on another day or machine, so they are not kept as done
_UNSTABLE_FAILURES = frozenset(
    {
        FailureReason.TIMEOUT,
        FailureReason.OUT_OF_MEMORY,
        FailureReason.CRASHED,
        FailureReason.UNAVAILABLE,
    }
)
_MAX_NAMED = 5
_UNITS_AT_ONCE = 64


class DoneVideos:
    """Files of a source that are done; whoever iterates reads their units, few at a time."""

    def __init__(
        self,
        units: Sequence[tuple[SourceVideo, str]] = (),
        failed: Sequence[IngestedVideo] = (),
    ) -> None:
        """Take over what is known.

        Args:
            units: Files and the URIs of their units.
            failed: Files that have no unit.
        """
        self._units = units
        self._failed = failed

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._units) + len(self._failed)

    def __iter__(self) -> Iterator[IngestedVideo]:
        """Yield what became of each file.

        Raises:
            ManifestError: If a unit is damaged, or gone since the plan was made.
            StorageError: If the store refuses or does not answer.
        """
        yield from self._failed
        for start in range(0, len(self._units), _UNITS_AT_ONCE):
            part = self._units[start : start + _UNITS_AT_ONCE]
            units = storage.load_records([uri for _, uri in part], IngestedVideo)
            for (source, uri), unit in zip(part, units, strict=True):
                if unit is None:
                    raise ManifestError(f"{uri} is gone since this run began; run again")
                yield _rebind(unit, source)


class IngestPlan(NamedTuple):
    """What is finished and what is still to do for a source.

    Attributes:
        done: Files with a unit, or with a problem that is known without one.
        fingerprint: Of the set of clips.
        notes: Captions and licences, read once: the fingerprint holds for these.
    """

    committed: ClipSet | None
    done: "DoneVideos"
    todo: tuple[SourceVideo, ...]
    fingerprint: str
    notes: SourceNotes


def notes_digest(source_uri: str, sources: Sequence[SourceVideo]) -> str:
    """Return a hash of all captions and licences that people have written about a source.

    Args:
        source_uri: Where the sources are.
        sources: Result of `discover_videos`.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return SourceNotes.read(source_uri, sources).digest()


def has_unstable_failures(clips: ClipSet) -> bool:
    """Whether files are missing in a set only for now, so that the next run looks at them again.

    Args:
        clips: The committed set.
    """
    return any(clips.failures.get(reason) for reason in _UNSTABLE_FAILURES)


def plan_ingestion(
    source_uri: str, sources: Sequence[SourceVideo], output_uri: str, config: IngestionConfig
) -> IngestPlan:
    """Find out what of an ingestion is done already.

    Args:
        source_uri: Where the sources are.
        sources: Result of `discover_videos`.
        output_uri: Root of all intermediate data.
        config: Limits, and what clips shall be like.

    Returns:
        The set if it is committed, else the files that are done and those to do. What became of
        the files that are done is read when it is asked for.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    notes = SourceNotes.read(source_uri, sources)
    plan_fingerprint = fingerprint(
        "ingestion",
        INGESTION_VERSION,
        SCHEMA_VERSION,
        # what may be fetched is seen in the sources
        config.model_dump(mode="json", exclude={"allow_https"}),
        source_uri,
        [[source.uri, source.etag, source.num_bytes] for source in sources],
        notes.digest(),
    )
    committed = storage.load_record(
        _set_uri(output_uri, plan_fingerprint, "manifest.json"), ClipSet
    )
    if committed is not None:
        return IngestPlan(committed, DoneVideos(), (), plan_fingerprint, notes)
    place = _units_uri(output_uri, config)
    try:
        present = {last_segment(item.uri) for item in storage.list_files(place, with_etag=False)}
    except FileNotFoundError:
        present = set()
    failed = [
        _quarantined(source, source.problem, source.detail)
        for source in sources
        if source.problem is not None
    ]
    units: list[tuple[SourceVideo, str]] = []
    todo: list[SourceVideo] = []
    for source in sources:
        if source.problem is not None:
            continue
        name = _unit_name(source)
        if name in present:
            units.append((source, storage.join(place, name)))
        else:
            todo.append(source)
    done = DoneVideos(units, failed)
    return IngestPlan(None, done, tuple(todo), plan_fingerprint, notes)


def ingest_video(source: SourceVideo, output_uri: str, config: IngestionConfig) -> IngestedVideo:
    """Turn one foreign file into normalised, measured clips and commit the unit record.

    A unit that is committed already is returned at once. Content that was met under another name
    or etag is not decoded again: its unit is committed for this etag as well. Timeouts, exhausted
    memory, crashes and files that cannot be opened are returned but not committed: another attempt
    may fare better. Captions are added by `commit_clips`.

    Args:
        source: The file.
        output_uri: Root of all intermediate data.
        config: Limits, and what clips shall be like.

    Returns:
        The clips, or the reason why there are none; a bad file raises nothing.

    Raises:
        StorageError: If the store refuses or does not answer, or a disk is full.
    """
    unit_uri = _unit_uri(output_uri, source, config)
    unit = storage.load_record(unit_uri, IngestedVideo)
    if unit is not None:
        return _rebind(unit, source)
    with storage.scratch_directory("ingest") as folder:
        sha256: str | None = None
        is_final = True
        try:
            sha256, demuxer = copy_source(source, folder, config)
            content_uri = storage.join(_units_uri(output_uri, config), _content_name(sha256))
            known = storage.load_record(content_uri, IngestedVideo)
            if known is not None:
                return _rebind(storage.commit_record(unit_uri, known), source)
            video = normalise_video(folder, demuxer, config)
            clips = tuple(_upload_clips(source, sha256, video, folder, output_uri))
        except QuarantinedError as error:
            # another attempt may fare better, or would find other content
            is_final = error.reason not in {*_UNSTABLE_FAILURES, FailureReason.REFUSED}
            unit = _quarantined(source, error.reason, error.detail, sha256)
        else:
            unit = IngestedVideo(
                source=source,
                source_sha256=sha256,
                info=video.info,
                clips=clips,
                failure=None,
                detail=_describe_damage(video),
                num_dropped_shots=video.num_dropped_shots,
            )
    if unit.failure is None:
        logger.info("%s: %d clips", source.uri, len(unit.clips))
    else:
        logger.warning("%s: quarantined, %s (%s)", source.uri, unit.failure, unit.detail)
    if not is_final:
        return unit
    if sha256 is not None:
        content_uri = storage.join(_units_uri(output_uri, config), _content_name(sha256))
        unit = storage.commit_record(content_uri, unit)
    return _rebind(storage.commit_record(unit_uri, unit), source)


def commit_clips(
    source_uri: str,
    videos: Iterable[IngestedVideo],
    output_uri: str,
    plan: IngestPlan,
    config: IngestionConfig,
) -> ClipSet:
    """Join the results of all files to one committed set of clips, with captions.

    Args:
        source_uri: Where the files are.
        videos: One result for each file of the plan, in any order; read once, and of none are the
            clips held as objects.
        output_uri: Root of all intermediate data.
        plan: The plan whose `todo` has been done, or is while `videos` is read. A set in which
            files timed out, ran out of memory or crashed gets another fingerprint, so that the
            next plan tries them again.
        config: Holds the failure budget.

    Returns:
        The committed set; of several committers all get the first one's.

    Raises:
        FailureBudgetExceeded: If too large a share of the files failed.
        DataError: If there is no clip at all.
        ManifestError: If a unit of the plan is damaged or gone.
        StorageError: If the store refuses or does not answer.
    """
    names: list[str] = []
    counts: list[int] = []
    failed: list[IngestedVideo] = []
    num_dropped_shots = 0

    def each_row() -> Iterator[dict[str, Any]]:
        nonlocal num_dropped_shots
        for video in videos:
            names.append(video.source.uri)
            counts.append(len(video.clips))
            num_dropped_shots += video.num_dropped_shots
            if video.failure is not None:
                failed.append(video)
            for clip in video.clips:
                yield clip_row(plan.notes.applied_to(clip))

    batches = batches_of(CLIP_SCHEMA, each_row())
    failed.sort(key=lambda video: video.source.uri)
    _check_budget(source_uri, len(names), sum(counts), failed, config)
    unstable = [
        f"{video.failure}:{video.source.etag}"
        for video in failed
        if video.failure in _UNSTABLE_FAILURES
    ]
    key = plan.fingerprint
    if unstable:  # a set of its own name, so that a plan looks at these files again
        key = fingerprint("clips-without", key, sorted(unstable))
    plan.notes.warn_about_unused_rows()
    order = _order_of_clips(names, counts)
    clips_uri = put_batches(_set_uri(output_uri, key), "clips", CLIP_SCHEMA, batches, order)
    failures_uri = put_table(
        _set_uri(output_uri, key),
        "failures",
        FAILURE_SCHEMA,
        map(failure_row, failed),
    )
    manifest_uri = _set_uri(output_uri, key, "manifest.json")
    return storage.commit_record(
        manifest_uri,
        ClipSet(
            manifest_uri=manifest_uri,
            clips_uri=clips_uri,
            source_uri=source_uri,
            num_videos=len(names),
            num_failed=len(failed),
            num_clips=sum(counts),
            num_dropped_shots=num_dropped_shots,
            failures=_counts(video.failure for video in failed if video.failure is not None),
            failures_uri=failures_uri,
            config=config,
            fingerprint=key,
        ),
    )


def select_clips(clips: ClipSet, config: SelectionConfig, *, output_uri: str) -> ClipSelection:
    """Decide which clips are used and which of them are held out, and commit it.

    No frame is decoded: thresholds are applied to stored scores.

    Args:
        clips: Committed clips.
        config: Thresholds, rules, share of sources to hold out and seed of the split.
        output_uri: Root of all intermediate data.

    Returns:
        The committed selection.

    Raises:
        ConfigError: If a rule needs a scorer that has not measured these clips.
        DataError: If no clip is kept.
        StorageError: If the store refuses or does not answer.
    """
    rules = [rule.model_dump(mode="json") for _, rule in rules_of(config)]
    key = fingerprint(
        "selection", SELECTION_VERSION, SCHEMA_VERSION, clips.fingerprint, config, rules
    )
    folder_uri = storage.join(output_uri, "selections", key[:16])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    committed = storage.load_record(manifest_uri, ClipSelection)
    if committed is not None:
        return committed
    judged = judge_clips(iter_clips(clips), config)
    splits = Counter(split for split in judged.splits if split is not None)
    num_kept, num_validation = splits.total(), splits["validation"]
    rejections: dict[str, int] = _counts(reason for reason in judged.reasons if reason)
    if num_kept == 0:
        raise DataError(
            f"none of {clips.num_clips} clips passes the selection ({_in_words(rejections)}); "
            "loosen the thresholds in `selection` or add videos"
        )
    _check_split(num_kept, num_validation, config.validation_fraction)
    table = read_clip_table(clips, ("clip_id", "source_uri"))
    verdicts = selection_rows(table, judged.reasons, judged.splits)
    selection_uri = put_table(folder_uri, "selection", SELECTION_SCHEMA, verdicts)
    return storage.commit_record(
        manifest_uri,
        ClipSelection(
            manifest_uri=manifest_uri,
            selection_uri=selection_uri,
            clips=clips,
            num_kept=num_kept,
            num_train=num_kept - num_validation,
            num_validation=num_validation,
            rejections=rejections,
            config=config,
            thresholds=judged.thresholds,
            fingerprint=key,
        ),
    )


def _check_split(num_kept: int, num_validation: int, fraction: float) -> None:
    """Warn if what is held out is far from what was asked for."""
    if fraction > 0 and num_validation == 0:
        logger.warning(
            "all clips are of one source video, or of videos that show the same: no clip is held "
            "out for validation"
        )
    elif num_validation > max(2 * fraction, fraction + 0.1) * num_kept:
        logger.warning(
            "%d of %d clips are held out for validation, more than the %.0f %% asked for: clips of "
            "a source are held out together, which is too many where sources are few or large; "
            "add videos",
            num_validation,
            num_kept,
            100 * fraction,
        )


def _quarantined(
    source: SourceVideo, reason: FailureReason, detail: str, sha256: str | None = None
) -> IngestedVideo:
    return IngestedVideo(
        source=source,
        source_sha256=sha256,
        info=None,
        clips=(),
        failure=reason,
        detail=detail,
    )


def _upload_clips(
    source: SourceVideo, sha256: str, video: NormalisedVideo, folder: Path, output_uri: str
) -> Iterable[Clip]:
    for clip in video.clips:
        path = folder / clip.file_name
        span = f"{clip.start_s:.6f}:{clip.end_s:.6f}"
        clip_id = hashlib.sha256(f"{sha256}:{span}".encode()).hexdigest()[:32]
        media_sha256 = storage.sha256_file(path)
        media_uri = storage.join(output_uri, "clips", "media", f"{clip_id}-{media_sha256[:16]}.mp4")
        storage.upload_file(path, media_uri)
        yield Clip(
            clip_id=clip_id,
            source_uri=source.uri,
            source_sha256=sha256,
            start_s=clip.start_s,
            end_s=clip.end_s,
            media_uri=media_uri,
            media_sha256=media_sha256,
            info=clip.info,
            cropped_px=clip.cropped_px,
            scores=clip.scores,
        )


def _describe_damage(video: NormalisedVideo) -> str:
    if video.num_decode_errors == 0:
        return ""
    return f"{video.num_decode_errors} damaged packets were left out"


def _order_of_clips(names: Sequence[str], counts: Sequence[int]) -> np.ndarray | None:
    """Return the places of all clips in the order of their files; None if they are in order."""
    order = sorted(range(len(names)), key=lambda place: names[place])
    if order == list(range(len(names))):
        return None
    ends = np.cumsum(counts)
    ranges = [np.arange(ends[place] - counts[place], ends[place]) for place in order]
    return np.concatenate(ranges)


def _check_budget(
    source_uri: str,
    num_videos: int,
    num_clips: int,
    failed: Sequence[IngestedVideo],
    config: IngestionConfig,
) -> None:
    reasons = _in_words(_counts(video.failure for video in failed if video.failure is not None))
    if len(failed) > config.max_failed_fraction * num_videos:
        names = ", ".join(video.source.uri for video in failed[:_MAX_NAMED])
        raise FailureBudgetExceeded(
            f"{len(failed)} of {num_videos} files of {source_uri} failed ({reasons}), expected at "
            f"most a share of {config.max_failed_fraction:g}; remove the bad files or raise "
            f"ingestion.max_failed_fraction. The first: {names}"
        )
    if num_clips == 0:
        raise DataError(
            f"no clip in {num_videos} files of {source_uri} ({reasons}); add readable videos of "
            f"at least {config.min_clip_s:g} s"
        )


def _unit_fingerprint(config: IngestionConfig) -> str:
    settings = config.model_dump(mode="json", exclude={"max_failed_fraction", "allow_https"})
    return fingerprint("ingestion-unit", INGESTION_VERSION, SCHEMA_VERSION, settings)


def _unit_uri(output_uri: str, source: SourceVideo, config: IngestionConfig) -> str:
    return storage.join(_units_uri(output_uri, config), _unit_name(source))


def _unit_name(source: SourceVideo) -> str:
    etag = source.etag
    if storage.is_remote(source.uri) or not re.fullmatch("[0-9a-f]{64}", etag):
        # what a store or server says tells versions of one name apart, and no more than that
        etag = stand_in_etag(source.uri, source.num_bytes, etag)
    return _content_name(etag)


def _content_name(sha256: str) -> str:
    """Return the name of the unit of a content: of local files that of their etag."""
    return f"{sha256[:32]}.json"


def _units_uri(output_uri: str, config: IngestionConfig) -> str:
    return storage.join(output_uri, "clips", "units", _unit_fingerprint(config)[:16])


def _set_uri(output_uri: str, plan_fingerprint: str, *parts: str) -> str:
    return storage.join(output_uri, "clips", "sets", plan_fingerprint[:16], *parts)


def _rebind(unit: IngestedVideo, source: SourceVideo) -> IngestedVideo:
    """Return a unit for a source with the same content as the one it was made for."""
    if unit.source == source:
        return unit
    clips = tuple(clip.model_copy(update={"source_uri": source.uri}) for clip in unit.clips)
    return unit.model_copy(update={"source": source, "clips": clips})


def _counts(reasons: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(reasons).items()))


def _in_words(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no failure"
