"""Verify the small records: of ingested files, annotations, data set versions, and all others.

A record holds the hash of its own file, so that every changed bit of it is found. In those that
older code wrote without one, only what is no JSON, or does not fit to the rest, is found.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ursa import storage
from ursa.annotation.records import Annotation, AnnotationReport
from ursa.annotation.units import REPORT_NAME
from ursa.artifacts import CheckpointRef, ExportedModel, IngestedVideo, TokenizerRef
from ursa.config import FrozenModel, fingerprint
from ursa.data.clips import read_table
from ursa.data.versions import (
    CHANGE_SCHEMA,
    FILE_SCHEMA,
    DatasetVersion,
    read_changes,
    version_fingerprint,
)
from ursa.decisions import Decision
from ursa.errors import ManifestError, SchemaVersionError, ShardFormatError
from ursa.inspection.problems import ProblemKind, Tally, remake_hint, repair_hint
from ursa.inspection.root import CLIP_SETS, MANIFEST_NAME, Record, list_below
from ursa.inspection.verify_folders import (
    CHECKPOINTS,
    MERGED,
    checkpoint_hint,
    verify_checkpoint,
    verify_model,
    verify_stage,
    verify_tokenizer,
)
from ursa.sources.committed import SourceListing, table_beside

OTHER_FOLDERS = (
    "prepared",
    "trained",
    "drift",
    "schedules",
    "scores",
    "evaluations",
)
"""Where manifests lie that nothing else here reads, and that name no files."""
LOST_DECISION = (
    "put it back from a copy, if there is one; else leave it where it is: its number stays taken, "
    "and `ursa models` goes on without it"
)
LOST_VERSION = (
    "put it back from a copy, if there is one; else leave it where it is: its number stays taken, "
    "and runs, lists and later versions go on without it"
)
_READERS = 16
_BATCH = 1000


def verify_records(tally: Tally, media: Mapping[str, str], *, with_media: bool) -> None:
    """Verify all records that are not read with the tables and shards that they name.

    Args:
        tally: Collects counts and problems.
        media: sha256 by URI of the clip files that have been looked at.
        with_media: Read further clip files, models and checkpoints and compare their hashes; else
            they must be there.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    reader = _Reader(tally)
    _verify_units(reader, media, with_media=with_media)
    _verify_annotations(reader)
    _verify_reports(reader)
    _verify_versions(reader)
    _verify_decisions(reader)
    _verify_listings(reader)
    _verify_others(reader)
    _verify_models(reader, with_media=with_media)
    _verify_tokenizers(reader, with_media=with_media)
    _verify_checkpoints(reader, with_media=with_media)
    reader.tell()


def record_error(uri: str, record: FrozenModel) -> str | None:
    """Return why a whole record cannot be the one that belongs where it is; None if it can.

    Args:
        uri: Where it is.
        record: An `IngestedVideo` or an `Annotation`.
    """
    if not isinstance(record, Annotation):
        return None
    *_, kind, folder, name = uri.split("/")
    if not record.scorer_fingerprint.startswith(folder):
        return f"{uri} is of the scorer {record.scorer_fingerprint[: len(folder)]}"
    key = name.removesuffix(".json")
    if kind != "similarity" and not record.media_sha256.startswith(key):
        return f"{uri} is of the clip file {record.media_sha256[: len(key)]}"
    if not all(map(math.isfinite, record.measurement.scores.values())):
        return f"{uri} holds a score that is no finite number"
    return None


class _Reader:
    """Reads records, and counts those of which not everything can be known."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self._num_without_hash = 0
        self._num_of_other_versions = 0

    def read(
        self, uris: Sequence[str], kind: type[Record] | None
    ) -> Iterator[tuple[str, Record | ManifestError | None]]:
        """Yield each with its record, or what is wrong with it; a store answers many at once.

        Args:
            uris: The records.
            kind: Their class; with None they are checked, but None is yielded for a whole one.

        Yields:
            URI, and record or error; nothing of what has gone or is of another schema version.
        """
        for start in range(0, len(uris), _BATCH):
            batch = uris[start : start + _BATCH]
            with ThreadPoolExecutor(_READERS if storage.is_remote(batch[0]) else 1) as pool:
                contents = list(pool.map(_content, batch))
            for uri, data in zip(batch, contents, strict=True):
                if data is None:
                    continue
                self.tally.num_records += 1
                try:
                    has_hash = storage.holds_hash(uri, data)
                    record = None if kind is None else storage.parse_record(uri, data, kind)
                except SchemaVersionError:
                    self._num_of_other_versions += 1
                except ManifestError as error:
                    yield uri, error
                else:
                    self._num_without_hash += not has_hash
                    yield uri, record

    def tell(self) -> None:
        """Note what was not checked."""
        if self._num_without_hash:
            self.tally.not_checked.append(
                f"every bit of {self._num_without_hash} records that were written without a hash"
            )
        if self._num_of_other_versions:
            self.tally.not_checked.append(
                f"{self._num_of_other_versions} records of other schema versions, which nothing "
                "reads any more"
            )


def _content(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:  # it has been removed since it was listed
        return None


def _records_below(root_uri: str, *folder: str) -> list[str]:
    found = list_below(storage.join(root_uri, *folder))
    return [item.uri for item in found if item.uri.endswith(".json")]


def _removal_hint(root_uri: str) -> str:
    return f"{repair_hint(root_uri)}, which removes it: a run that needs it makes it again"


def _verify_units(reader: _Reader, media: Mapping[str, str], *, with_media: bool) -> None:
    """Read what became of each file, and look for clips that only these records name."""
    tally = reader.tally
    hashes: dict[str, str] = {}
    units_of: defaultdict[str, list[str]] = defaultdict(list)
    for uri, unit in reader.read(_records_below(tally.root_uri, "clips", "units"), IngestedVideo):
        if isinstance(unit, ManifestError):
            tally.add(ProblemKind.RECORD, uri, str(unit), _removal_hint(tally.root_uri))
            continue
        for clip in unit.clips if unit is not None else ():
            if clip.media_uri not in media:
                hashes[clip.media_uri] = clip.media_sha256
                units_of[clip.media_uri].append(uri)
    folder_uri = storage.join(tally.root_uri, "clips", "media")
    present = {item.uri.rpartition("/")[2] for item in list_below(folder_uri)} if hashes else set()
    for media_uri, sha256 in sorted(hashes.items()):
        detail = None
        if with_media:
            detail = storage.damage_of(media_uri, sha256)
        elif media_uri.rpartition("/")[2] not in present and not storage.exists(media_uri):
            detail = "it is missing"
        if detail is not None:
            names = " and ".join(units_of[media_uri])
            hint = f"delete {names} and run the pipeline again: this file alone is ingested again"
            tally.add(ProblemKind.CONTENT, media_uri, f"{detail}; a run would take it", hint)


def _verify_annotations(reader: _Reader) -> None:
    tally = reader.tally
    for uri, found in reader.read(_records_below(tally.root_uri, "annotations"), Annotation):
        detail = record_error(uri, found) if isinstance(found, Annotation) else str(found)
        if detail is not None:
            tally.add(ProblemKind.RECORD, uri, detail, _removal_hint(tally.root_uri))


def _verify_reports(reader: _Reader) -> None:
    """Read the reports beside sets of annotated clips."""
    tally = reader.tally
    uris = _records_below(tally.root_uri, *CLIP_SETS)
    reports = [uri for uri in uris if uri.endswith(f"/{REPORT_NAME}")]
    for uri, found in reader.read(reports, AnnotationReport):
        if isinstance(found, ManifestError):
            hint = remake_hint(f"{uri.rpartition('/')[0]}/{MANIFEST_NAME}", uri)
            tally.add(ProblemKind.MANIFEST, uri, str(found), hint)


def _verify_versions(reader: _Reader) -> None:
    tally = reader.tally
    files = [item.uri for item in list_below(storage.join(tally.root_uri, "datasets"))]
    uris = [uri for uri in files if re.search(r"/[0-9]{6}\.json$", uri)]
    named: set[str] = set()
    for uri, version in reader.read(uris, DatasetVersion):
        tally.num_versions += 1
        if isinstance(version, ManifestError):
            tally.add(ProblemKind.VERSION, uri, str(version), LOST_VERSION)
        elif version is not None and tally.is_in_place(uri, version.manifest_uri):
            named |= {item.rpartition("/")[2] for item in (version.files_uri, version.changes_uri)}
            for detail in _version_errors(version, set(uris)):
                tally.add(ProblemKind.VERSION, uri, detail, LOST_VERSION)
            _verify_version_tables(tally, version)
    tables = (uri for uri in files if uri.endswith(".parquet"))
    for uri in (uri for uri in tables if uri.rpartition("/")[2] not in named):
        try:
            read_table(uri, FILE_SCHEMA if "/files-" in uri else CHANGE_SCHEMA, None)
        except ShardFormatError as error:
            hint = f"delete {uri}: no version that can be read names it"
            tally.add(ProblemKind.TABLE, uri, str(error), hint)


def _version_errors(version: DatasetVersion, uris: set[str]) -> Iterator[str]:
    """Yield in what a version contradicts its place, its parts or the one before."""
    folder, name = version.manifest_uri.split("/")[-2:]
    if not fingerprint("source", version.source_uri).startswith(folder):
        yield f"is of the source {version.source_uri}, whose versions are elsewhere"
    if name != f"{version.number:06d}.json":
        yield f"says that its number is {version.number}"
    if version_fingerprint(version) != version.fingerprint:
        yield f"does not have the fingerprint {version.fingerprint} that it states"
    is_there = version.parent_uri is None or any(
        uri.split("/")[-2:] == version.parent_uri.split("/")[-2:] for uri in uris
    )
    if not is_there:
        yield f"its parent {version.parent_uri} is missing"
    for part in (
        version.clips,
        version.selection,
        version.visual_tokenizer,
        version.text_tokenizer,
    ):
        try:
            committed = storage.load_record(part.manifest_uri, type(part))
        except ManifestError:
            continue  # named where these are verified
        if committed not in (None, part):
            yield f"differs from {part.manifest_uri}: one of both is damaged"


def _verify_version_tables(tally: Tally, version: DatasetVersion) -> None:
    hint = repair_hint(tally.root_uri)
    try:
        read_table(version.files_uri, FILE_SCHEMA, version.num_files)
        tally.num_files += 1
    except ShardFormatError as error:
        tally.add(ProblemKind.VERSION_TABLE, version.files_uri, str(error), hint)
    try:
        counts = Counter(item.change for item in read_changes(version))
        tally.num_files += 1
    except ShardFormatError as error:
        tally.add(ProblemKind.VERSION_TABLE, version.changes_uri, str(error), hint)
    else:
        if counts != Counter(version.changes):
            detail = f"counts {dict(version.changes)}, its table of changes {dict(counts)}"
            tally.add(ProblemKind.VERSION, version.manifest_uri, detail, LOST_VERSION)


def _verify_decisions(reader: _Reader) -> None:
    uris = _records_below(reader.tally.root_uri, "releases")
    for uri, found in reader.read(uris, Decision):
        if isinstance(found, ManifestError):
            reader.tally.add(ProblemKind.VERSION, uri, str(found), LOST_DECISION)


def _verify_listings(reader: _Reader) -> None:
    for uri, listing in _manifests(reader, "sources", SourceListing):
        try:
            reader.tally.num_files += table_beside(uri, listing) is not None
        except ShardFormatError as error:
            hint = f"run the pipeline again on {listing.source_uri}: a run writes it again"
            table_uri = f"{uri.rpartition('/')[0]}/{listing.table_name}"
            reader.tally.add(ProblemKind.TABLE, table_uri, str(error), hint)


def _verify_others(reader: _Reader) -> None:
    for folder in OTHER_FOLDERS:
        for _ in _manifests(reader, folder, None):
            pass


def _manifests(
    reader: _Reader, folder: str, kind: type[Record] | None
) -> Iterator[tuple[str, Record]]:
    """Yield the whole manifests below a folder, and note the others."""
    uris = _records_below(reader.tally.root_uri, folder)
    manifests = [uri for uri in uris if uri.endswith(f"/{MANIFEST_NAME}")]
    for uri, found in reader.read(manifests, kind):
        if isinstance(found, ManifestError):
            reader.tally.add(ProblemKind.MANIFEST, uri, str(found), remake_hint(uri))
        elif found is not None:
            yield uri, found


def _verify_models(reader: _Reader, *, with_media: bool) -> None:
    tally, count = reader.tally, 0
    for uri, model in _manifests(reader, "models", ExportedModel):
        count += 1
        if tally.is_in_place(uri, model.manifest_uri):
            verify_model(tally, model, with_media=with_media)
    if count and not with_media:
        tally.not_checked.append(f"the bytes of {count} models (--media reads them)")


def _verify_tokenizers(reader: _Reader, *, with_media: bool) -> None:
    tally, count, num_without = reader.tally, 0, 0
    for uri, tokenizer in _manifests(reader, "tokenizers", TokenizerRef):
        count += 1
        num_without += not tokenizer.sha256
        if tally.is_in_place(uri, tokenizer.manifest_uri):
            verify_tokenizer(tally, tokenizer, with_media=with_media)
    if count and not with_media:
        tally.not_checked.append(f"the bytes of {count} tokenizers (--media reads them)")
    if num_without:
        tally.not_checked.append(
            f"every bit of {num_without} tokenizers: no hash of their files is recorded"
        )


def _verify_checkpoints(reader: _Reader, *, with_media: bool) -> None:
    tally, count = reader.tally, 0
    uris = [
        uri for folder in (CHECKPOINTS, MERGED) for uri in _records_below(tally.root_uri, folder)
    ]
    if not uris:
        return
    from ursa.training.checkpoint import (  # noqa: PLC0415  (torch takes seconds)
        MARKER_FILE,
        STATE_FILE,
        CheckpointMarker,
    )

    markers = [uri for uri in uris if uri.endswith(f"/{MARKER_FILE}")]
    for uri, marker in reader.read(markers, CheckpointMarker):
        count += 1
        if isinstance(marker, ManifestError):
            tally.add(ProblemKind.MANIFEST, uri, str(marker), checkpoint_hint(uri))
        elif marker is not None:
            state_uri = storage.join(uri.rpartition("/")[0], STATE_FILE)
            verify_checkpoint(tally, uri, state_uri, marker.state_sha256, with_media=with_media)
    for uri, checkpoint in _manifests(reader, CHECKPOINTS, CheckpointRef):
        verify_stage(tally, uri, checkpoint, MARKER_FILE)
    if count and not with_media:
        tally.not_checked.append(f"the bytes of {count} checkpoints (--media reads them)")
