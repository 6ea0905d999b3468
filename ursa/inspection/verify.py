"""Verify a data root: every committed file is there, whole, and fits to the others.

Tables and shards are read one by one, so memory is bounded by the largest of them. Nothing is
written.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import ClipSelection, ClipSet
from ursa.config import RunConfig
from ursa.data.clips import read_clip_table, read_failures, read_selection_tables
from ursa.errors import ManifestError, ShardFormatError
from ursa.inspection.problems import ProblemKind, Tally, Verification, remake_hint, repair_hint
from ursa.inspection.root import (
    CLIP_SETS,
    SELECTIONS,
    check_root,
    iter_records,
    known_configs,
    list_below,
)
from ursa.inspection.verify_records import verify_records
from ursa.inspection.verify_tokens import verify_token_sets


def verify_root(
    root_uri: str, *, with_media: bool = False, config: RunConfig | None = None
) -> Verification:
    """Verify clips, selections, token data sets, versions and all records below a data root.

    Args:
        root_uri: The data root.
        with_media: Read every clip file, model and checkpoint and compare its hash; else they only
            must be there.
        config: What to try for data sets that have no recipe beside them; None tries the presets.

    Returns:
        What was looked at and what is wrong with it.

    Raises:
        DataError: If nothing is committed there.
        StorageError: If the store refuses or does not answer.
    """
    check_root(root_uri)
    tally = Tally(root_uri)
    media = _verify_clip_sets(tally, with_media=with_media)
    _verify_selections(tally)
    verify_token_sets(tally, [item.tokenization for item in known_configs(config)])
    verify_records(tally, media, with_media=with_media)
    return tally.result()


def clip_media(tables: Iterable[pa.Table]) -> dict[str, str]:
    """Return the sha256 of every clip file by its URI, each once.

    Args:
        tables: Tables of `CLIP_SCHEMA`.
    """
    return {
        uri: sha256
        for table in tables
        for uri, sha256 in zip(
            table["media_uri"].to_pylist(), table["media_sha256"].to_pylist(), strict=True
        )
    }


def _verify_clip_sets(tally: Tally, *, with_media: bool) -> dict[str, str]:
    """Read all tables of clips; return the sha256 of every clip file by its URI."""
    media: dict[str, str] = {}
    for uri, record in iter_records(tally.root_uri, CLIP_SETS, ClipSet):
        tally.num_clip_sets += 1
        if isinstance(record, ManifestError):
            tally.add(ProblemKind.MANIFEST, uri, str(record), remake_hint(uri))
            continue
        if not tally.is_at(uri, record.manifest_uri, record.fingerprint):
            continue
        try:
            table = read_clip_table(record)
        except ShardFormatError as error:
            hint = remake_hint(uri, record.clips_uri)
            tally.add(ProblemKind.TABLE, record.clips_uri, str(error), hint)
        else:
            media |= clip_media([table])
            tally.num_clips += table.num_rows
            tally.num_files += 1
            tally.num_bytes += storage.size_bytes(record.clips_uri)
        _verify_failures(tally, record)
    _verify_media(tally, media, with_media=with_media)
    return media


def _verify_failures(tally: Tally, record: ClipSet) -> None:
    hint = remake_hint(record.manifest_uri, "the failures-*.parquet beside it")
    try:
        counts = Counter(video.failure for video in read_failures(record))
    except ShardFormatError as error:
        tally.add(ProblemKind.TABLE, record.manifest_uri, str(error), hint)
        return
    tally.num_files += 1
    if counts != record.failures:
        detail = f"counts {dict(record.failures)} failures, its table holds {dict(counts)}"
        tally.add(ProblemKind.CONTENT, record.manifest_uri, detail, hint)


def _verify_media(tally: Tally, media: dict[str, str], *, with_media: bool) -> None:
    folder_uri = storage.join(tally.root_uri, "clips", "media")
    present = {item.uri.rpartition("/")[2]: item.num_bytes for item in list_below(folder_uri)}
    hint = repair_hint(tally.root_uri)
    for uri, sha256 in sorted(media.items()):
        name = uri.rpartition("/")[2]
        if with_media:
            detail = storage.damage_of(uri, sha256)
        else:
            is_there = name in present or storage.exists(uri)
            detail = None if is_there else "it is missing"
        if detail is not None:
            tally.add(ProblemKind.MEDIA, uri, detail, hint)
        else:
            tally.num_files += 1
            tally.num_bytes += present.get(name, 0)
    if media and not with_media:
        tally.not_checked.append(f"the bytes of {len(media)} clips (--media reads them)")


def _verify_selections(tally: Tally) -> None:
    for uri, record in iter_records(tally.root_uri, SELECTIONS, ClipSelection):
        tally.num_selections += 1
        if isinstance(record, ManifestError):
            tally.add(ProblemKind.MANIFEST, uri, str(record), remake_hint(uri))
            continue
        if not tally.is_at(uri, record.manifest_uri, record.fingerprint):
            continue
        hint = remake_hint(uri, record.selection_uri)
        _verify_parent(tally, record, hint)
        try:
            clips, verdicts = read_selection_tables(record)
        except ShardFormatError as error:
            if str(error).startswith(record.selection_uri):  # that of the clips is named above
                tally.add(ProblemKind.TABLE, record.selection_uri, str(error), hint)
            continue
        tally.num_files += 1
        tally.num_bytes += storage.size_bytes(record.selection_uri)
        for detail in _selection_errors(record, clips, verdicts):
            tally.add(ProblemKind.CONTENT, record.selection_uri, detail, hint)


def _verify_parent(tally: Tally, record: ClipSelection, hint: str) -> None:
    """Compare the record of the clips in a selection with the one that is committed."""
    uri = record.clips.manifest_uri
    try:
        if storage.load_record(uri, ClipSet) != record.clips:
            detail = f"differs from the record of its clips at {uri}: one of both is damaged"
            tally.add(ProblemKind.CONTENT, record.manifest_uri, detail, hint)
    except ManifestError:
        return  # named where clips are verified


def _selection_errors(record: ClipSelection, clips: pa.Table, verdicts: pa.Table) -> Sequence[str]:
    """Return what does not fit in a selection."""
    errors = []
    kept = verdicts["kept"]
    if not kept.equals(verdicts["split"].is_valid()) or kept.equals(verdicts["reason"].is_valid()):
        errors.append("a kept clip has no split, or a rejected one no reason")
    splits = Counter(verdicts.filter(kept)["split"].to_pylist())
    expected = {"train": record.num_train, "validation": record.num_validation}
    if splits != Counter(expected):
        errors.append(f"{dict(splits)} clips are kept, the manifest says {expected}")
    reasons = Counter(verdicts.filter(pc.invert(kept))["reason"].to_pylist())
    if reasons != Counter(record.rejections):
        errors.append(f"rejections are {dict(reasons)}, the manifest says {record.rejections}")
    sources = [
        set(clips.filter(pc.equal(verdicts["split"], split))["source_sha256"].to_pylist())
        for split in ("train", "validation")
    ]
    if both := sources[0] & sources[1]:
        errors.append(f"sources are in both splits, such as the one with sha256 {min(both)}")
    return errors
