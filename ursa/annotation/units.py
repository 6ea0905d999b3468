"""The annotation step: committed clips in, the same clips with captions and scores out.

What a captioner or scorer says about a clip is a small record below `annotations/`, named by the
scorer's fingerprint and by what it looked at, and committed if absent: it is made once, whatever
else is added. `ClipAnnotator` makes the records of a few clips, `apply_annotations` puts them on
the clips, `commit_annotations` commits the new `ClipSet`. Which scorer does what is in
`ursa.annotation.scorers`.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ursa import storage
from ursa.annotation.records import (
    AnnotatedUnit,
    Annotation,
    AnnotationError,
    AnnotationReport,
    AnnotationUnit,
    CrashedError,
    FailedAnnotation,
    Measure,
    Measurement,
    NotFiniteError,
    ResolvedScorer,
    SeenClip,
    UnreadableError,
)
from ursa.artifacts import CLIPS, SCHEMA_VERSION, Clip, ClipSet
from ursa.config import AnnotationConfig, CaptionerConfig, ScorerConfig, fingerprint
from ursa.data.clips import (
    CLIP_SCHEMA,
    FAILURE_SCHEMA,
    batches_of,
    clip_row,
    clips_of,
    each_clip,
    failure_row,
    local_clip,
    put_batches,
    put_table,
    read_failures,
)
from ursa.errors import FailureBudgetExceeded, UrsaError, VideoDecodeError
from ursa.video.captions import clean_caption
from ursa.video.decode import FrameSize, ReadFrames, read_frames_at
from ursa.video.reader import ClipReader

logger = logging.getLogger(__name__)

REPORT_NAME = "annotation.json"
_READERS = 16
_MAX_NAMED = 3
_MAX_DETAIL_CHARACTERS = 300


class AnnotationPlan(NamedTuple):
    """What is committed, and the fingerprint of the set if nothing fails."""

    committed: ClipSet | None
    fingerprint: str


class ScorerPlan(NamedTuple):
    """What one scorer has done and has to do."""

    done: dict[str, Measurement]
    todo: tuple[AnnotationUnit, ...]


def plan_annotation(
    clips: ClipSet, scorers: Sequence[ResolvedScorer], *, output_uri: str
) -> AnnotationPlan:
    """Find out whether clips have been annotated in this way before.

    Args:
        clips: The committed clips.
        scorers: Result of `resolve_scorers`.
        output_uri: Root of all data of the run.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    key = fingerprint(
        "annotated-clips",
        SCHEMA_VERSION,
        clips.fingerprint,
        [[item.name, item.fingerprint, getattr(item.config, "replace", "")] for item in scorers],
    )
    return AnnotationPlan(storage.load_record(_set_uri(output_uri, key), ClipSet), key)


def plan_scorer(
    rows: pa.Table, scorer: ResolvedScorer, config: AnnotationConfig, *, output_uri: str
) -> ScorerPlan:
    """Find out which clips a scorer has looked at, and divide the others into units.

    Args:
        rows: All clips, a table of `CLIP_SCHEMA`.
        scorer: A captioner or scorer.
        config: Holds the size of the units.
        output_uri: Root of all data of the run.

    Returns:
        Results by key, and the units to do; equal clip files are looked at once.

    Raises:
        ManifestError: If a committed result is damaged.
        StorageError: If the store refuses or does not answer.
    """
    wanted = {
        scorer.key(clip): place for place, clip in enumerate(each_clip(rows)) if scorer.wants(clip)
    }
    folder_uri = _folder_uri(output_uri, scorer)
    try:
        present = {
            item.uri.rpartition("/")[2].removesuffix(".json")
            for item in storage.list_files(folder_uri, with_etag=False)
        }
    except FileNotFoundError:
        present = set()
    known = [key for key in wanted if key in present]
    with ThreadPoolExecutor(_READERS) as pool:  # of a store each takes a while
        found = pool.map(lambda key: _load(output_uri, scorer, key), known)
        done = {key: item for key, item in zip(known, found, strict=True) if item is not None}
    left = [place for key, place in sorted(wanted.items()) if key not in done]
    size = config.clips_per_unit
    parts = (rows.take(left[at : at + size]) for at in range(0, len(left), size))
    units = (CLIPS.dump_json(tuple(clips_of(part))).decode() for part in parts)
    return ScorerPlan(done, tuple(AnnotationUnit(clips_json=text) for text in units))


class ClipAnnotator:
    """The unit function, with the model of one scorer loaded once a process."""

    def __init__(self, scorer: ResolvedScorer, measure: Measure, *, output_uri: str) -> None:
        """Take a scorer over.

        Args:
            scorer: The captioner or scorer.
            measure: Result of `load_scorer`.
            output_uri: Root of all data of the run.
        """
        self._scorer = scorer
        self._measure = measure
        self._output_uri = output_uri
        # a clip on which the decoder crashes or hangs is a failure of this clip
        self._reader = ClipReader()

    def __call__(self, unit: AnnotationUnit) -> AnnotatedUnit:
        """Look at the clips of a unit and commit each result as soon as it is there.

        Args:
            unit: A unit of the plan.

        Returns:
            Results, also those that were committed before, and clips on which the scorer failed.

        Raises:
            ConfigError: If a server refuses the key or knows no such model.
            ServiceError: If a server cannot be reached or stays busy.
            StorageError: If the store refuses or does not answer.
        """
        results: dict[str, Measurement] = {}
        failed: list[FailedAnnotation] = []
        waiting: list[tuple[Clip, Future[Measurement]]] = []
        with ThreadPoolExecutor(self._scorer.concurrency) as pool:
            for clip in unit.clips:
                key = self._scorer.key(clip)
                known = _load(self._output_uri, self._scorer, key)
                if known is not None:
                    results[key] = known
                    continue
                try:
                    frames = read_pictures(clip, self._scorer.config, self._reader.read)
                except AnnotationError as error:
                    failed.append(self._failure(clip, error))
                else:
                    waiting.append((clip, pool.submit(self._done, clip, frames)))
            try:
                for clip, future in waiting:
                    try:
                        results[self._scorer.key(clip)] = future.result()
                    except AnnotationError as error:
                        failed.append(self._failure(clip, error))
            except UrsaError:  # holds for all clips: ask no more
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return AnnotatedUnit(results=results, failed=tuple(failed))

    def _done(self, clip: Clip, frames: np.ndarray) -> Measurement:
        try:
            found = _checked(self._measure(SeenClip(frames, clip.caption)))
        except UrsaError:
            raise
        except Exception as error:  # what a library of models raises says nothing of other clips
            raise CrashedError(f"{type(error).__name__}: {error}") from error
        record = Annotation(
            scorer_fingerprint=self._scorer.fingerprint,
            media_sha256=clip.media_sha256,
            measurement=found,
        )
        uri = _result_uri(self._output_uri, self._scorer, self._scorer.key(clip))
        return storage.commit_record(uri, record).measurement

    def _failure(self, clip: Clip, error: AnnotationError) -> FailedAnnotation:
        detail = clean_caption(str(error))[:_MAX_DETAIL_CHARACTERS]
        logger.warning(
            "%s: clip %s of %s: %s", self._scorer.name, clip.clip_id, clip.source_uri, detail
        )
        return FailedAnnotation(
            scorer=self._scorer.name,
            key=self._scorer.key(clip),
            clip_id=clip.clip_id,
            source_uri=clip.source_uri,
            reason=error.reason,
            detail=detail,
        )


def read_pictures(
    clip: Clip, config: CaptionerConfig | ScorerConfig, read: ReadFrames = read_frames_at
) -> np.ndarray:
    """Return frames of a clip, each from the middle of an equal part of it, none cut off.

    Args:
        clip: A clip whose file must have the hash that is known of it.
        config: Number of frames and their largest side.
        read: Reads frames of a local file.

    Returns:
        RGB frames, shape (T, H, W, 3), uint8; fewer than asked for of a clip with fewer.

    Raises:
        AnnotationError: If the file is missing, damaged or cannot be read.
        StorageError: If the store refuses or does not answer.
    """
    count = min(config.num_frames, clip.info.num_frames)
    indices = [int((part + 0.5) * clip.info.num_frames / count) for part in range(count)]
    scale = min(1.0, config.max_side_px / max(clip.info.height_px, clip.info.width_px))
    try:
        with local_clip(clip) as path:
            size = FrameSize(
                max(1, round(clip.info.height_px * scale)),
                max(1, round(clip.info.width_px * scale)),
            )
            return read(path, indices, [size])[0]
    except VideoDecodeError as error:
        raise UnreadableError(str(error)) from error


def apply_annotations(
    rows: pa.Table,
    scorer: ResolvedScorer,
    results: Mapping[str, Measurement],
    failed: Sequence[FailedAnnotation],
    config: AnnotationConfig,
) -> pa.Table:
    """Return the clips with the results of a scorer on them.

    Args:
        rows: All clips, a table of `CLIP_SCHEMA`.
        scorer: A captioner or scorer.
        results: By key, those of the plan and of all units.
        failed: The failures of all units.
        config: Holds the failure budget.

    Raises:
        FailureBudgetExceeded: If the scorer failed on too large a share of the clips that it was
            to look at.
    """
    keys = {item.key for item in failed}
    is_failed = [scorer.key(clip) in keys for clip in each_clip(rows) if scorer.wants(clip)]
    num_failed, num_wanted = sum(is_failed), len(is_failed)
    if num_failed > config.max_failed_fraction * num_wanted:
        reasons = Counter(item.reason for item in failed)
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        named = "; ".join(f"{item.source_uri}: {item.detail}" for item in failed[:_MAX_NAMED])
        raise FailureBudgetExceeded(
            f"{scorer.name} failed on {num_failed} of {num_wanted} clips ({counted}), more than "
            f"annotation.max_failed_fraction {config.max_failed_fraction:g} allows: {named}"
        )
    annotated = (
        _annotated(clip, scorer, results[scorer.key(clip)])
        if scorer.wants(clip) and scorer.key(clip) in results
        else clip
        for clip in each_clip(rows)
    )
    return pa.Table.from_batches(
        batches_of(CLIP_SCHEMA, map(clip_row, annotated)), schema=CLIP_SCHEMA
    )


def commit_annotations(
    clips: ClipSet,
    rows: pa.Table,
    plan: AnnotationPlan,
    report: AnnotationReport,
    *,
    output_uri: str,
) -> ClipSet:
    """Commit the annotated clips as a set of their own, with a report beside it.

    Args:
        clips: The set that was annotated.
        rows: Its clips with all results, a table of `CLIP_SCHEMA`.
        plan: Its fingerprint. A set in which a scorer failed on clips gets another one, so that
            the next plan tries these again.
        report: Scorers and failures.
        output_uri: Root of all data of the run.

    Returns:
        The committed set; of several committers all get the first one's.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    key = plan.fingerprint
    if report.failed:
        without = sorted({f"{item.scorer}:{item.key}" for item in report.failed})
        key = fingerprint("annotated-clips-without", key, without)
    manifest_uri = _set_uri(output_uri, key)
    folder_uri = manifest_uri.rpartition("/")[0]
    clips_uri = put_batches(folder_uri, "clips", CLIP_SCHEMA, rows.to_batches())
    failures = map(failure_row, read_failures(clips))
    failures_uri = put_table(folder_uri, "failures", FAILURE_SCHEMA, failures)
    storage.commit_record(storage.join(folder_uri, REPORT_NAME), report)
    changes = {
        "manifest_uri": manifest_uri,
        "clips_uri": clips_uri,
        "failures_uri": failures_uri,
        "fingerprint": key,
    }
    return storage.commit_record(manifest_uri, clips.model_copy(update=changes))


def read_report(clips: ClipSet) -> AnnotationReport | None:
    """Return what was done to a set of clips; None if nothing was.

    Args:
        clips: A committed set.

    Raises:
        ManifestError: If the report is damaged.
        StorageError: If the store refuses or does not answer.
    """
    folder_uri = clips.manifest_uri.rpartition("/")[0]
    return storage.load_record(storage.join(folder_uri, REPORT_NAME), AnnotationReport)


def has_failures(clips: ClipSet) -> bool:
    """Whether a scorer failed on clips of a set, so that the next run tries them again.

    Args:
        clips: A committed set.

    Raises:
        ManifestError: If the report beside it is damaged.
        StorageError: If the store refuses or does not answer.
    """
    report = read_report(clips)
    return report is not None and bool(report.failed)


def _annotated(clip: Clip, scorer: ResolvedScorer, found: Measurement) -> Clip:
    changes: dict[str, object] = {}
    if found.scores:
        added = {f"{scorer.name}/{name}": value for name, value in found.scores.items()}
        changes["extra_scores"] = clip.extra_scores | added
    if found.caption is not None:
        changes |= {
            "caption": found.caption,
            "caption_long": found.caption_long,
            "caption_source": "captioner",
            "caption_model": scorer.model_name,
        }
    return clip.model_copy(update=changes)


def _checked(found: Measurement) -> Measurement:
    """Return a result whose numbers are finite and whose captions are clean lines of text."""
    for name, value in found.scores.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}, expected a finite number")
    texts = {
        name: clean_caption(text)
        for name in ("caption", "caption_long")
        if (text := getattr(found, name)) is not None
    }
    empty = next((name for name, text in texts.items() if not text), None)
    if empty is not None:
        raise AnnotationError(f"the {empty} is empty")
    return found.model_copy(update=texts)


def _load(output_uri: str, scorer: ResolvedScorer, key: str) -> Measurement | None:
    record = storage.load_record(_result_uri(output_uri, scorer, key), Annotation)
    return None if record is None else record.measurement


def _folder_uri(output_uri: str, scorer: ResolvedScorer) -> str:
    return storage.join(output_uri, "annotations", scorer.config.kind, scorer.fingerprint[:32])


def _result_uri(output_uri: str, scorer: ResolvedScorer, key: str) -> str:
    return storage.join(_folder_uri(output_uri, scorer), f"{key}.json")


def _set_uri(output_uri: str, key: str) -> str:
    return storage.join(output_uri, "clips", "sets", key[:16], "manifest.json")
