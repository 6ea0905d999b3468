"""The ingestion and selection steps: foreign videos in, normalised and judged clips out.

`discover_videos` lists a source, `ingest_video` does the work of one file and commits a unit
record, `commit_clips` joins all units to a committed `ClipSet`, `select_clips` decides on stored
scores. Every file of the source ends as clips or as a failure with a reason. The layout below
the output URI is in docs/data-format.md.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Clip,
    ClipSelection,
    ClipSet,
    FailureReason,
    IngestedVideo,
    RejectReason,
    SelectedClip,
    SourceVideo,
)
from ursa.config import IngestionConfig, SelectionConfig, fingerprint
from ursa.data.clips import (
    CLIP_SCHEMA,
    FAILURE_SCHEMA,
    SELECTION_SCHEMA,
    clip_row,
    failure_row,
    put_table,
    read_clips,
    selection_row,
)
from ursa.errors import DataError, FailureBudgetExceeded
from ursa.video.captions import CaptionRow, caption_of, clean_caption, parse_caption_rows
from ursa.video.probe import (
    NormalisedVideo,
    QuarantinedError,
    copy_foreign_file,
    normalise_video,
)
from ursa.video.selection import choose_validation_sources, judge_clips

logger = logging.getLogger(__name__)

INGESTION_VERSION = 2
"""Raised when the same file and configuration would give other clips or scores."""
CAPTION_FILE_NAME = "captions.jsonl"
SIDECAR_LIMIT_BYTES = 64 << 10
CAPTION_FILE_LIMIT_BYTES = 256 << 20

_OTHER_SUFFIXES = frozenset(
    {".txt", ".json", ".jsonl", ".md", ".vtt", ".srt", ".csv", ".tsv", ".yaml", ".yml", ".parquet"}
)
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


class IngestPlan(NamedTuple):
    """What is finished and what is still to do for a source."""

    committed: ClipSet | None
    done: tuple[IngestedVideo, ...]
    todo: tuple[SourceVideo, ...]
    fingerprint: str


def discover_videos(source_uri: str) -> tuple[SourceVideo, ...]:
    """List the files of a source that may be videos, sorted by URI.

    Hidden files and plain texts are left out; everything else is looked at, whatever its name.
    Pipes and devices are listed too, so that they are reported; links are not followed.

    Args:
        source_uri: A directory, a single file or an `s3://` prefix.

    Returns:
        The files; `etag` is the sha256 of a local file, or what the store says of an object.

    Raises:
        DataError: If it does not exist or holds no candidate file.
        StorageError: If the store refuses or does not answer.
    """
    try:
        files = storage.list_files(source_uri, with_etag=storage.is_remote(source_uri))
        irregular = storage.list_irregular_files(source_uri)
    except FileNotFoundError as error:
        raise DataError(
            f"source {source_uri!r} does not exist or is empty; give a directory, a file or an "
            "s3:// prefix that holds videos"
        ) from error
    sources = [
        SourceVideo(uri=item.uri, num_bytes=item.num_bytes, etag=item.etag or _local_etag(item.uri))
        for item in files
        if _is_candidate(_relative_name(source_uri, item.uri))
    ]
    sources += [
        SourceVideo(uri=uri, num_bytes=0, etag=_stand_in_etag("irregular", uri))
        for uri in irregular
        if _is_candidate(_relative_name(source_uri, uri))
    ]
    if not sources:
        holds = f"{len(files)} files, but none that may be a video" if files else "no files"
        raise DataError(
            f"source {source_uri!r} holds {holds}; give a "
            "directory or s3:// prefix with mp4, mkv, webm, mov, avi, mpg or gif files"
        )
    return tuple(sorted(sources, key=lambda source: source.uri))


def captions_digest(source_uri: str, sources: Sequence[SourceVideo]) -> str:
    """Return a hash of all captions that people have written about a source.

    Args:
        source_uri: Where the sources are.
        sources: Result of `discover_videos`.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return _Captions.read(source_uri, sources).digest()


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
        The set if it is committed, else the files that are done and those to do.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    captions = _Captions.read(source_uri, sources)
    plan_fingerprint = fingerprint(
        "ingestion",
        INGESTION_VERSION,
        SCHEMA_VERSION,
        config,
        source_uri,
        [[source.uri, source.etag] for source in sources],
        captions.digest(),
    )
    committed = storage.load_record(
        _set_uri(output_uri, plan_fingerprint, "manifest.json"), ClipSet
    )
    if committed is not None:
        return IngestPlan(committed, (), (), plan_fingerprint)
    try:
        units_uri = storage.join(output_uri, "clips", "units", _unit_fingerprint(config)[:16])
        present = {
            _last_segment(item.uri) for item in storage.list_files(units_uri, with_etag=False)
        }
    except FileNotFoundError:
        present = set()
    done: list[IngestedVideo] = []
    todo: list[SourceVideo] = []
    for source in sources:
        unit_uri = _unit_uri(output_uri, source, config)
        unit = None
        if _last_segment(unit_uri) in present:
            unit = storage.load_record(unit_uri, IngestedVideo)
        if unit is None:
            todo.append(source)
        else:
            done.append(_rebind(unit, source))
    return IngestPlan(None, tuple(done), tuple(todo), plan_fingerprint)


def ingest_video(source: SourceVideo, output_uri: str, config: IngestionConfig) -> IngestedVideo:
    """Turn one foreign file into normalised, measured clips and commit the unit record.

    A unit that is committed already is returned at once. Timeouts, exhausted memory, crashes and
    files that cannot be opened are returned but not committed: another attempt may fare better.
    Captions are added by `commit_clips`.

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
            sha256, video = _normalise(source, folder, config)
            clips = tuple(_upload_clips(source, sha256, video, folder, output_uri))
        except QuarantinedError as error:
            # another attempt may fare better, or would find other content
            is_final = error.reason not in _UNSTABLE_FAILURES
            unit = IngestedVideo(
                source=source,
                source_sha256=sha256,
                info=None,
                clips=(),
                failure=error.reason,
                detail=error.detail,
            )
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
    return _rebind(storage.commit_record(unit_uri, unit), source)


def commit_clips(
    source_uri: str,
    videos: Sequence[IngestedVideo],
    output_uri: str,
    plan_fingerprint: str,
    config: IngestionConfig,
) -> ClipSet:
    """Join the results of all files to one committed set of clips, with captions.

    Args:
        source_uri: Where the files are.
        videos: One result for each file of the plan, in any order.
        output_uri: Root of all intermediate data.
        plan_fingerprint: `IngestPlan.fingerprint`. A set in which files timed out, ran out of
            memory or crashed gets another one, so that the next plan tries them again.
        config: Holds the failure budget.

    Returns:
        The committed set; of several committers all get the first one's.

    Raises:
        FailureBudgetExceeded: If too large a share of the files failed.
        DataError: If there is no clip at all.
        StorageError: If the store refuses or does not answer.
    """
    ordered = sorted(videos, key=lambda video: video.source.uri)
    failed = [video for video in ordered if video.failure is not None]
    _check_budget(source_uri, ordered, failed, config)
    unstable = [
        f"{video.failure}:{video.source.etag}"
        for video in failed
        if video.failure in _UNSTABLE_FAILURES
    ]
    if unstable:  # a set of its own name, so that a plan looks at these files again
        plan_fingerprint = fingerprint("clips-without", plan_fingerprint, sorted(unstable))
    captions = _Captions.read(source_uri, [video.source for video in ordered])
    captions.warn_about_unused_rows()
    clips = [captions.applied_to(clip) for video in ordered for clip in video.clips]
    clips_uri = put_table(
        _set_uri(output_uri, plan_fingerprint), "clips", CLIP_SCHEMA, map(clip_row, clips)
    )
    put_table(
        _set_uri(output_uri, plan_fingerprint),
        "failures",
        FAILURE_SCHEMA,
        map(failure_row, failed),
    )
    manifest_uri = _set_uri(output_uri, plan_fingerprint, "manifest.json")
    return storage.commit_record(
        manifest_uri,
        ClipSet(
            manifest_uri=manifest_uri,
            clips_uri=clips_uri,
            source_uri=source_uri,
            num_videos=len(ordered),
            num_failed=len(failed),
            num_clips=len(clips),
            num_dropped_shots=sum(video.num_dropped_shots for video in ordered),
            failures=_counts(video.failure for video in failed if video.failure is not None),
            fingerprint=plan_fingerprint,
        ),
    )


def select_clips(
    clips: ClipSet, config: SelectionConfig, *, seed: int, output_uri: str
) -> ClipSelection:
    """Decide which clips are used and which of them are held out, and commit it.

    No frame is decoded: thresholds are applied to stored scores.

    Args:
        clips: Committed clips.
        config: Thresholds and share of clips to hold out.
        seed: Decides which sources are held out.
        output_uri: Root of all intermediate data.

    Returns:
        The committed selection.

    Raises:
        DataError: If no clip is kept.
        StorageError: If the store refuses or does not answer.
    """
    key = fingerprint("selection", SCHEMA_VERSION, clips.fingerprint, config, seed)
    folder_uri = storage.join(output_uri, "selections", key[:16])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    committed = storage.load_record(manifest_uri, ClipSelection)
    if committed is not None:
        return committed
    rows = read_clips(clips)
    verdicts = judge_clips(rows, config)
    kept_of = Counter(
        clip.source_sha256 for clip, verdict in zip(rows, verdicts, strict=True) if verdict is None
    )
    num_kept = sum(kept_of.values())
    rejections: dict[RejectReason, int] = _counts(reason for reason in verdicts if reason)
    if num_kept == 0:
        raise DataError(
            f"none of {len(rows)} clips passes the selection ({_in_words(rejections)}); loosen the "
            "thresholds in `selection` or add videos"
        )
    held_out = choose_validation_sources(kept_of, config.validation_fraction, seed=seed)
    if config.validation_fraction > 0 and not held_out:
        logger.warning("all clips are of one source video: no clip is held out for validation")
    selected = [
        SelectedClip(
            clip=clip,
            kept=verdict is None,
            reason=verdict,
            split=_split_of(clip, held_out) if verdict is None else None,
        )
        for clip, verdict in zip(rows, verdicts, strict=True)
    ]
    num_validation = sum(kept_of[source] for source in held_out)
    selection_uri = put_table(
        folder_uri, "selection", SELECTION_SCHEMA, map(selection_row, selected)
    )
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
            fingerprint=key,
        ),
    )


class _Captions:
    """What is written about the videos of a source."""

    def __init__(
        self,
        source_uri: str,
        rows: Mapping[str, list[CaptionRow]],
        sidecars: Mapping[str, str],
        unused_names: Sequence[str],
    ) -> None:
        self._source_uri = source_uri
        self._rows = rows
        self._sidecars = sidecars
        self._unused_names = unused_names

    @classmethod
    def read(cls, source_uri: str, sources: Sequence[SourceVideo]) -> "_Captions":
        """Read the caption file and the texts beside the videos."""
        names = {_relative_name(source_uri, source.uri): source.uri for source in sources}
        files = {
            _relative_name(source_uri, item.uri): item
            for item in storage.list_files(source_uri, with_etag=False)
        }
        rows: dict[str, list[CaptionRow]] = {}
        unused: list[str] = []
        caption_file = files.get(CAPTION_FILE_NAME)
        if caption_file is not None and caption_file.num_bytes <= CAPTION_FILE_LIMIT_BYTES:
            parsed, bad_lines = parse_caption_rows(storage.read_bytes(caption_file.uri))
            if bad_lines:
                logger.warning(
                    "%s: %d lines are left out, the first is line %d; expected objects with "
                    "path and caption",
                    caption_file.uri,
                    len(bad_lines),
                    bad_lines[0],
                )
            for row in parsed:
                if row.path in names:
                    rows.setdefault(names[row.path], []).append(row)
                else:
                    unused.append(row.path)
        sidecars: dict[str, str] = {}
        for name, uri in names.items():
            for sidecar in (f"{name}.txt", f"{PurePosixPath(name).with_suffix('')}.txt"):
                file = files.get(sidecar)
                if file is not None and 0 < file.num_bytes <= SIDECAR_LIMIT_BYTES:
                    text = storage.read_bytes(file.uri).decode("utf-8", "replace")
                    sidecars[uri] = clean_caption(text)
                    break
        return cls(source_uri, rows, sidecars, unused)

    def digest(self) -> str:
        """Return a hash of everything that decides captions."""
        return fingerprint(
            {uri: [list(map(str, row)) for row in rows] for uri, rows in self._rows.items()},
            dict(self._sidecars),
        )

    def applied_to(self, clip: Clip) -> Clip:
        """Return the clip with its caption."""
        caption = caption_of(
            _relative_name(self._source_uri, clip.source_uri).rsplit("/", 1)[-1],
            clip.start_s,
            clip.end_s,
            rows=self._rows.get(clip.source_uri, ()),
            sidecar=self._sidecars.get(clip.source_uri),
        )
        return clip.model_copy(update={"caption": caption.text, "caption_source": caption.source})

    def warn_about_unused_rows(self) -> None:
        """Say which rows of the caption file name no video."""
        if self._unused_names:
            logger.warning(
                "%s has %d rows for files that are no videos of this source, such as %r",
                CAPTION_FILE_NAME,
                len(self._unused_names),
                self._unused_names[0],
            )


def _normalise(
    source: SourceVideo, folder: Path, config: IngestionConfig
) -> tuple[str, NormalisedVideo]:
    if source.num_bytes > config.max_file_bytes:
        # an object need not be fetched to know this
        raise QuarantinedError(
            FailureReason.FILE_TOO_LARGE,
            f"{source.num_bytes} bytes, expected at most {config.max_file_bytes}",
        )
    try:
        with storage.local_copy(source.uri) as path:
            sha256, demuxer = copy_foreign_file(path, folder, config)
    except FileNotFoundError as error:
        raise QuarantinedError(
            FailureReason.UNAVAILABLE, "it is gone since it was listed"
        ) from error
    if not storage.is_remote(source.uri) and sha256 != source.etag:
        # what it holds now must not be kept under the hash of what it held
        raise QuarantinedError(FailureReason.UNAVAILABLE, "it has changed since it was listed")
    return sha256, normalise_video(folder, demuxer, config)


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


def _check_budget(
    source_uri: str,
    videos: Sequence[IngestedVideo],
    failed: Sequence[IngestedVideo],
    config: IngestionConfig,
) -> None:
    reasons = _in_words(_counts(video.failure for video in failed if video.failure is not None))
    if len(failed) > config.max_failed_fraction * len(videos):
        names = ", ".join(video.source.uri for video in failed[:_MAX_NAMED])
        raise FailureBudgetExceeded(
            f"{len(failed)} of {len(videos)} files of {source_uri} failed ({reasons}), expected at "
            f"most a share of {config.max_failed_fraction:g}; remove the bad files or raise "
            f"ingestion.max_failed_fraction. The first: {names}"
        )
    if not any(video.clips for video in videos):
        raise DataError(
            f"no clip in {len(videos)} files of {source_uri} ({reasons}); add readable videos of "
            f"at least {config.min_clip_s:g} s"
        )


def _is_candidate(name: str) -> bool:
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix.lower() not in _OTHER_SUFFIXES


def _local_etag(uri: str) -> str:
    try:
        return storage.sha256_file(storage.local_path(uri))
    except OSError:
        # it will fail again when it is ingested, and be reported then
        return _stand_in_etag("unreadable", uri)


def _stand_in_etag(kind: str, uri: str) -> str:
    return hashlib.sha256(f"{kind}:{uri}".encode()).hexdigest()


def _relative_name(source_uri: str, uri: str) -> str:
    """Return the path of a file below the source, as a person would write it."""
    if storage.is_remote(source_uri):
        name = uri.removeprefix(source_uri.rstrip("/")).lstrip("/")
        return name or _last_segment(uri)
    root = storage.local_path(source_uri).absolute().as_uri().rstrip("/")
    name = uri.removeprefix(root).lstrip("/") or _last_segment(uri)
    return unquote(name, errors="replace")


def _last_segment(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def _unit_fingerprint(config: IngestionConfig) -> str:
    settings = config.model_dump(mode="json", exclude={"max_failed_fraction"})
    return fingerprint("ingestion-unit", INGESTION_VERSION, SCHEMA_VERSION, settings)


def _unit_uri(output_uri: str, source: SourceVideo, config: IngestionConfig) -> str:
    etag = source.etag
    if not re.fullmatch(r"[0-9A-Za-z-]{32,}", etag):
        etag = hashlib.sha256(etag.encode()).hexdigest()
    return storage.join(
        output_uri, "clips", "units", _unit_fingerprint(config)[:16], f"{etag[:32]}.json"
    )


def _set_uri(output_uri: str, plan_fingerprint: str, *parts: str) -> str:
    return storage.join(output_uri, "clips", "sets", plan_fingerprint[:16], *parts)


def _rebind(unit: IngestedVideo, source: SourceVideo) -> IngestedVideo:
    """Return a unit for a source with the same content as the one it was made for."""
    if unit.source == source:
        return unit
    clips = tuple(clip.model_copy(update={"source_uri": source.uri}) for clip in unit.clips)
    return unit.model_copy(update={"source": source, "clips": clips})


def _split_of(clip: Clip, held_out: frozenset[str]) -> str:
    return "validation" if clip.source_sha256 in held_out else "train"


def _counts(reasons: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(reasons).items()))


def _in_words(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no failure"
