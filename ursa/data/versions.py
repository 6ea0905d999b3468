"""Versions of a data set: what each run found new, changed or gone at a source, for good.

A version is an immutable record that names its parent, so that all of a source form one chain. The
records are numbered and put if absent: of two runs at once one takes a number, and the other finds
that its version is there already or takes the next.

A record that is damaged keeps its number and is passed over with a warning: the next version gets
the next free number, and its parent is the newest version that can be read.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    ClipSelection,
    ClipSet,
    FailureReason,
    TokenDatasets,
    TokenizerRef,
)
from ursa.config import FrozenModel, RunConfig, fingerprint
from ursa.data.clips import (
    SELECTION_SCHEMA,
    put_table,
    read_clip_table,
    read_failures,
    read_table,
)
from ursa.data.units import MODALITIES, SPLITS
from ursa.errors import ManifestError, ShardFormatError

logger = logging.getLogger(__name__)

DATA_SECTIONS = (
    "seed",
    "ingestion",
    "annotation",
    "selection",
    "visual_tokenizer",
    "tokenization",
    "text_tokenizer",
)
"""The parts of a configuration that decide a data set."""
_OK = "ok"
_ETAG = "etag:"
_METADATA = {b"ursa.schema_version": str(SCHEMA_VERSION).encode()}
FILE_SCHEMA = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_clips", pa.int64(), nullable=False),
    ],
    metadata={b"ursa.kind": b"files", **_METADATA},
)
"""A row a file: `content` is its sha256, or `etag:...` where it was never read as a whole; `status`
is "ok" or why it was quarantined."""
CHANGE_SCHEMA = pa.schema(
    [
        pa.field("change", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("previous_uri", pa.string()),
        pa.field("previous_content", pa.string()),
    ],
    metadata={b"ursa.kind": b"changes", **_METADATA},
)
"""A row a file that differs from the version before; of a removed one what it was."""
NOTE_COLUMNS = (
    "caption",
    "caption_long",
    "caption_source",
    "caption_model",
    "license",
    "attribution",
)
"""Columns of the clips that hold what is said: they make another version without other bytes."""
_COMPARED = ("source_uri", "clip_id", "source_sha256", *NOTE_COLUMNS)


class Change(StrEnum):
    """What became of a file since the version before."""

    ADDED = "added"
    RENAMED = "renamed"
    EDITED = "edited"
    REMOVED = "removed"
    RECAPTIONED = "recaptioned"
    """The same bytes under the same name, with another caption, licence or attribution."""


class FileChange(NamedTuple):
    """A file that differs from the version before.

    Attributes:
        change: What became of it.
        source_uri: Where it is; where it was, if it is removed.
        content: Its sha256 or `etag:...`; what it was, if it is removed.
        previous_uri: Where it was, if it is renamed.
        previous_content: What it was, if it is edited.
    """

    change: Change
    source_uri: str
    content: str
    previous_uri: str | None = None
    previous_content: str | None = None


class DatasetVersion(FrozenModel):
    """A version of the data set of a source, committed; it never changes."""

    manifest_uri: str
    number: int
    parent_uri: str | None
    source_uri: str
    config: dict[str, Any]
    """`DATA_SECTIONS` of the configuration."""
    code: dict[str, str]
    """Version of the package and, where known, the commit."""
    files_uri: str
    changes_uri: str
    num_files: int
    num_unchanged: int
    changes: dict[Change, int]
    clips: ClipSet
    selection: ClipSelection
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef
    tokens_uri: str
    tokens_fingerprint: str
    num_samples: dict[str, int]
    num_tokens: int
    num_shard_bytes: int
    fingerprint: str


def commit_version(
    root_uri: str,
    config: RunConfig,
    selection: ClipSelection,
    tokenizers: tuple[TokenizerRef, TokenizerRef],
    datasets: TokenDatasets,
    *,
    code: Mapping[str, str],
) -> DatasetVersion:
    """Commit the next version of a data set, unless the newest is the same.

    Args:
        root_uri: The data root.
        config: The run.
        selection: The committed selection.
        tokenizers: The visual and the text tokenizer.
        datasets: The committed token data sets.
        code: What made it: version of the package, commit.

    Returns:
        The new version, or the newest if it is of the same configuration, files and tokens.

    Raises:
        ManifestError: If the record that another run has just put there is damaged.
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    clips = selection.clips
    visual, text = tokenizers
    settings = data_config(config)
    table = read_clip_table(clips, _COMPARED)
    files = list_source_files(clips, table)
    print_ = _fingerprint(settings, selection, datasets.fingerprint, text)
    folder_uri = _folder_uri(root_uri, clips.source_uri)
    files_uri = put_table(folder_uri, "files", FILE_SCHEMA, files)
    sets = {
        f"{modality}_{split}": datasets.of(modality, split)
        for modality in MODALITIES
        for split in SPLITS
    }
    while True:
        newest, number = _newest_and_next(folder_uri)
        if newest is not None and newest.fingerprint == print_:
            return newest
        changes = find_changes(newest, clips, table, files)
        version = DatasetVersion(
            manifest_uri=_manifest_uri(folder_uri, number),
            number=number,
            parent_uri=None if newest is None else newest.manifest_uri,
            source_uri=clips.source_uri,
            config=settings,
            code=dict(code),
            files_uri=files_uri,
            changes_uri=put_table(
                folder_uri, "changes", CHANGE_SCHEMA, (change._asdict() for change in changes)
            ),
            num_files=len(files),
            # what a manifest names but nobody found is no file, here as in the changes
            num_unchanged=len(_contents(files))
            - sum(item.change != Change.REMOVED for item in changes),
            changes={kind: sum(item.change == kind for item in changes) for kind in Change},
            clips=clips,
            selection=selection,
            visual_tokenizer=visual,
            text_tokenizer=text,
            tokens_uri=datasets.manifest_uri,
            tokens_fingerprint=datasets.fingerprint,
            num_samples={
                name: sum(part.num_samples for part in parts) for name, parts in sets.items()
            },
            num_tokens=sum(part.num_tokens for part in datasets.parts()),
            num_shard_bytes=sum(
                shard.num_bytes for part in datasets.parts() for shard in part.shards
            ),
            fingerprint=print_,
        )
        if storage.commit_record(version.manifest_uri, version) == version:
            return version
        # another run has taken the number: look again at what is the newest now


def version_fingerprint(version: DatasetVersion) -> str:
    """Return the fingerprint that a version must have: of all that makes it another one.

    Args:
        version: The version.
    """
    text = version.text_tokenizer
    return _fingerprint(version.config, version.selection, version.tokens_fingerprint, text)


def _fingerprint(
    settings: Mapping[str, Any], selection: ClipSelection, tokens: str, text: TokenizerRef
) -> str:
    return fingerprint(
        "dataset-version",
        SCHEMA_VERSION,
        selection.clips.source_uri,
        settings,
        selection.clips.fingerprint,
        selection.fingerprint,
        tokens,
        text.fingerprint,
    )


def find_changes(
    parent: DatasetVersion | None,
    clips: ClipSet,
    table: pa.Table,
    files: Iterable[Mapping[str, Any]],
) -> list[FileChange]:
    """Return in which files a set of clips differs from a version, by URI.

    Args:
        parent: The version; None for a first one.
        clips: The committed set.
        table: Its clips, with the columns that are compared.
        files: Result of `list_source_files` for it.

    Raises:
        ShardFormatError: If the files of the version are not known any more.
        StorageError: If the store refuses or does not answer.
    """
    before = _contents(read_version_files(parent)) if parent is not None else {}
    changes = compare_files(before, _contents(files))
    if parent is not None and parent.clips.fingerprint != clips.fingerprint:
        changes += _recaptioned(parent.clips, table)
    return sorted(changes, key=lambda item: (item.source_uri, item.change))


def data_config(config: RunConfig) -> dict[str, Any]:
    """Return the parts of a configuration that decide a data set.

    Args:
        config: The run.
    """
    values = config.model_dump(mode="json")
    return {name: values[name] for name in DATA_SECTIONS if name in values}


def changed_settings(version: DatasetVersion, parent: DatasetVersion) -> list[str]:
    """Return the dotted names of the settings in which a version differs from another, sorted.

    Args:
        version: A version.
        parent: The one before.
    """
    new, old = dict(_leaves(version.config)), dict(_leaves(parent.config))
    return sorted(name for name in new | old if new.get(name) != old.get(name))


def newest_version(root_uri: str, source_uri: str) -> DatasetVersion | None:
    """Return the newest version of the data set of a source that can be read; None if none can.

    Args:
        root_uri: The data root.
        source_uri: The source, as the clips name it.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return _newest_and_next(_folder_uri(root_uri, source_uri))[0]


def _newest_and_next(folder_uri: str) -> tuple[DatasetVersion | None, int]:
    """Return the newest version that can be read, and the next number, from one listing.

    The number of a damaged record stays taken: it may be written down elsewhere.
    """
    numbers = _numbers(folder_uri)
    found = (_load(_manifest_uri(folder_uri, number)) for number in reversed(numbers))
    newest = next((version for version in found if version is not None), None)
    return newest, max(numbers, default=0) + 1


def iter_ancestors(version: DatasetVersion | None) -> Iterator[DatasetVersion]:
    """Yield a version, its parent, and so on to the first; damaged ones are passed over.

    Args:
        version: Where to begin; None yields nothing.

    Yields:
        Versions, newest first.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    while version is not None:
        yield version
        parent = re.fullmatch(r"(.+)/([0-9]{6})\.json", version.parent_uri or "")
        if parent is None:
            return
        newest = min(int(parent[2]), version.number - 1)
        found = (_load(_manifest_uri(parent[1], number)) for number in range(newest, 0, -1))
        version = next((item for item in found if item is not None), None)


def iter_versions(root_uri: str) -> Iterator[tuple[str, DatasetVersion | ManifestError]]:
    """Yield the URI of every version below a data root with its record, or what is wrong with it.

    Args:
        root_uri: The data root.

    Yields:
        URI, and record or error, sorted by URI.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    try:
        listed = storage.list_files(storage.join(root_uri, "datasets"), with_etag=False)
    except FileNotFoundError:
        return
    for uri in (item.uri for item in listed):
        if not re.search(r"/[0-9]{6}\.json$", uri):
            continue
        try:
            record = storage.load_lasting(uri, DatasetVersion)
        except ManifestError as error:
            yield uri, error
        else:
            if record is not None:  # else it has been removed since it was listed
                yield uri, record


def list_versions(root_uri: str) -> list[DatasetVersion]:
    """Return all versions below a data root that can be read: by source, oldest first.

    A damaged one is named in a warning.

    Args:
        root_uri: The data root.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    versions = []
    for _, found in iter_versions(root_uri):
        if isinstance(found, ManifestError):
            _warn(found)
        else:
            versions.append(found)
    return sorted(versions, key=lambda version: (version.source_uri, version.number))


def recorded_source(root_uri: str, source_uri: str) -> str:
    """Return the one spelling of a source for which a data root has versions.

    Args:
        root_uri: The data root.
        source_uri: The source, however it is written.

    Returns:
        `storage.absolute_uri` of it; another spelling of the same place if the root has versions of
        that alone, as runs of older code wrote sources as they were given.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    wanted = storage.absolute_uri(source_uri)
    if _numbers(_folder_uri(root_uri, wanted)):
        return wanted
    counts = Counter(version.source_uri for version in list_versions(root_uri))
    same = [item for item in counts.items() if storage.absolute_uri(item[0]) == wanted]
    return max(same, key=lambda item: (item[1], item[0]), default=(wanted, 0))[0]


def _load(uri: str) -> DatasetVersion | None:
    """Return a version; None if it is missing, or damaged, which is said."""
    try:
        return storage.load_lasting(uri, DatasetVersion)
    except ManifestError as error:
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    logger.warning("a data set version is passed over: %s", error)


def read_version_files(version: DatasetVersion) -> list[dict[str, Any]]:
    """Return the files of a version as rows of `FILE_SCHEMA`, by URI.

    Where the table is missing or damaged, they are counted again in the clips of the version.

    Args:
        version: The version.

    Raises:
        ShardFormatError: If the tables of the clips are missing or damaged as well.
        StorageError: If the store refuses or does not answer.
    """
    rows: list[dict[str, Any]] = _file_table(version).to_pylist()
    return rows


def _file_table(version: DatasetVersion) -> pa.Table:
    try:
        return read_table(version.files_uri, FILE_SCHEMA, version.num_files)
    except ShardFormatError as error:
        logger.warning("%s", error)
        return pa.Table.from_pylist(list_source_files(version.clips), schema=FILE_SCHEMA)


def read_changes(version: DatasetVersion) -> list[FileChange]:
    """Return in which files a version differs from its parent, by URI.

    Args:
        version: The version.

    Raises:
        ShardFormatError: If the table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    table = read_table(version.changes_uri, CHANGE_SCHEMA, sum(version.changes.values()))
    return [FileChange(**{**row, "change": Change(row["change"])}) for row in table.to_pylist()]


def compare_files(before: Mapping[str, str], after: Mapping[str, str]) -> list[FileChange]:
    """Return in which files two versions differ, by URI.

    A file is what its bytes are: the same bytes under another name are renamed, also where another
    file was; other bytes under the same name are edited, or added where the old ones have moved on.
    Of bytes that are gone from one name and there under two new ones, the first new name is renamed
    and the second added. Bytes over which others were moved are removed. Where the bytes of one of
    both are not known, as nobody could read them, a file is taken for the same.

    Args:
        before: Content by URI.
        after: Content by URI.
    """
    known_once = {
        uri
        for uri in before.keys() & after.keys()
        if before[uri].startswith(_ETAG) != after[uri].startswith(_ETAG)
    }
    before, after = (
        {uri: content for uri, content in side.items() if uri not in known_once}
        for side in (before, after)
    )
    left: defaultdict[str, list[str]] = defaultdict(list)
    for uri, content in sorted(before.items(), reverse=True):
        if after.get(uri) != content:
            left[content].append(uri)
    origins = {
        uri: left[content].pop()
        for uri, content in sorted(after.items())
        if before.get(uri) != content and left[content]
    }
    moved = set(origins.values())
    changes = [
        FileChange(Change.RENAMED, uri, after[uri], previous_uri=origin)
        for uri, origin in origins.items()
    ]
    for uri, content in after.items():
        known = before.get(uri)
        if known == content or uri in origins:
            continue
        if known is None or uri in moved:
            changes.append(FileChange(Change.ADDED, uri, content))
        else:
            changes.append(FileChange(Change.EDITED, uri, content, previous_content=known))
    edited = {item.source_uri for item in changes if item.change == Change.EDITED}
    changes += [
        FileChange(Change.REMOVED, uri, content)
        for uri, content in before.items()
        if after.get(uri) != content and uri not in moved | edited
    ]
    return sorted(changes, key=lambda item: (item.source_uri, item.change))


def _recaptioned(before: ClipSet, after: pa.Table) -> list[FileChange]:
    """Return the files that have clips of which other things are said than before, by URI."""
    try:
        old = read_clip_table(before, _COMPARED)
    except ShardFormatError as error:
        logger.warning("captions are not compared with those of the version before: %s", error)
        return []
    return compare_notes(old, after)


def compare_notes(before: pa.Table, after: pa.Table) -> list[FileChange]:
    """Return the files with clips that are the same in two tables, but not what is said of them.

    Args:
        before: A table with the columns of `CLIP_SCHEMA` that are compared, or all of them.
        after: Another one.

    Returns:
        Changes of the kind `RECAPTIONED`, by URI.
    """
    keys = ["source_uri", "clip_id"]
    joined = after.select(_COMPARED).join(
        before.select([*keys, *NOTE_COLUMNS]), keys, join_type="inner", right_suffix="_before"
    )
    is_other = pa.chunked_array([pa.repeat(False, joined.num_rows)])  # noqa: FBT003
    for name in NOTE_COLUMNS:
        new, old = joined[name], joined[f"{name}_before"]
        differs = pc.or_(
            pc.xor(new.is_valid(), old.is_valid()),
            pc.fill_null(pc.not_equal(new, old), fill_value=False),
        )
        is_other = pc.or_(is_other, differs)
    rows = joined.filter(is_other).select(["source_uri", "source_sha256"]).to_pylist()
    found = {row["source_uri"]: row["source_sha256"] for row in rows}
    return [FileChange(Change.RECAPTIONED, uri, content) for uri, content in sorted(found.items())]


def list_source_files(clips: ClipSet, table: pa.Table | None = None) -> list[dict[str, Any]]:
    """Return the files of a set of clips as rows of `FILE_SCHEMA`, by URI.

    Args:
        clips: The committed set.
        table: Its clips, or those of their columns that versions compare; None reads them.

    Raises:
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    table = read_clip_table(clips, _COMPARED) if table is None else table
    counted = table.group_by(["source_uri", "source_sha256"]).aggregate([([], "count_all")])
    rows = [
        {
            "source_uri": row["source_uri"],
            "content": row["source_sha256"],
            "status": _OK,
            "num_clips": row["count_all"],
        }
        for row in counted.to_pylist()
    ]
    rows += [
        {
            "source_uri": video.source.uri,
            "content": video.source_sha256 or _content_of(video.source.etag),
            "status": str(video.failure),
            "num_clips": 0,
        }
        for video in read_failures(clips)
    ]
    return sorted(rows, key=lambda row: str(row["source_uri"]))


def find_kept_tokenizer(
    root_uri: str,
    selection: ClipSelection,
    config: RunConfig,
    kind: str,
) -> TokenizerRef | None:
    """Return the tokenizer of an earlier version that is still good for grown data.

    That is the newest one of the same settings, while the clips to train on are fewer than
    `refit_growth` times those it was made from.

    Args:
        root_uri: The data root.
        selection: The committed selection of this run.
        config: The run.
        kind: "visual_tokenizer" or "text_tokenizer".

    Returns:
        The tokenizer; None where one has to be made.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    growth: float | None = getattr(config, kind).refit_growth
    if growth == 1:
        return None
    settings = _tokenizer_settings(data_config(config), kind)
    found: TokenizerRef | None = None
    num_clips = 0
    for version in iter_ancestors(newest_version(root_uri, selection.clips.source_uri)):
        if _tokenizer_settings(version.config, kind) != settings:
            continue
        tokenizer: TokenizerRef = getattr(version, kind)
        if found is None:
            found = tokenizer
        if tokenizer.fingerprint == found.fingerprint:  # the oldest that has it was made for it
            num_clips = version.selection.num_train
    if found is None or not storage.exists(found.manifest_uri):
        return None
    if growth is not None and selection.num_train >= growth * num_clips:
        return None
    return found


def _tokenizer_settings(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return what decides a tokenizer beside the clips."""
    settings = {name: value for name, value in values[kind].items() if name != "refit_growth"}
    if kind == "visual_tokenizer":
        sizes = ("fps", "num_frames", "height_px", "width_px")
        settings["samples"] = [values["tokenization"][name] for name in sizes]
    return settings


def find_uses(root_uri: str, *what: str) -> list[tuple[DatasetVersion, dict[str, Any]]]:
    """Return the versions that hold a file, with its row: where content was used.

    Args:
        root_uri: The data root.
        *what: URIs of the file as it may be listed, of a tar file for all of its members, or a
            sha256. All content that ever was at a URI counts, under any name.

    Returns:
        Version and row of `FILE_SCHEMA`, by source and number. Versions that are damaged, or whose
        files are not known any more, are named in a warning.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    tables = []
    for version in list_versions(root_uri):
        try:
            tables.append((version, _file_table(version)))
        except ShardFormatError as error:
            logger.warning("the files of %s are not known: %s", version.manifest_uri, error)
    contents = {name for item in what for name in (item, item.lower())}
    for _, table in tables:
        names = table["source_uri"]
        for item in what:
            own = pc.or_(pc.equal(names, item), pc.starts_with(names, f"{item}#"))
            contents |= set(table.filter(own)["content"].to_pylist())
    wanted = pa.array(sorted(contents))
    return [
        (version, row)
        for version, table in tables
        for row in table.filter(pc.is_in(table["content"], wanted)).to_pylist()
    ]


def count_kept_clips(version: DatasetVersion) -> Counter[str] | None:
    """Count the clips that the selection of a version has kept, by file.

    Models are trained, and tokenizers fitted, with these alone.

    Args:
        version: The version.

    Returns:
        Numbers by `source_uri`; None if the verdicts cannot be read, which a warning says.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    columns = ["source_uri", "kept"]
    try:
        table = read_table(version.selection.selection_uri, SELECTION_SCHEMA, None, columns)
    except ShardFormatError as error:
        logger.warning("which clips were kept is not known: %s", error)
        return None
    return Counter(table.filter(table["kept"])["source_uri"].to_pylist())


def find_fitted_uses(
    root_uri: str, holders: Iterable[DatasetVersion]
) -> list[tuple[DatasetVersion, tuple[str, ...]]]:
    """Return the versions whose tokenizers were fitted with the clips of other versions.

    A tokenizer is kept while the data grow (`find_kept_tokenizer`), or taken from a directory, so a
    version may have one that was fitted with a file which it does not hold itself.

    Args:
        root_uri: The data root.
        holders: Versions that have kept clips of a file.

    Returns:
        Other versions, by source and number, and which of "visual" and "text" it is.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    versions = list_versions(root_uri)
    holding = {version.manifest_uri for version in holders}
    seen: set[tuple[str, Any]] = set()
    fitted = set()
    for version in versions:
        for kind, content in _tokenizer_contents(version).items():
            # the oldest of a source that has it was made for it
            is_first = (version.source_uri, content) not in seen
            seen.add((version.source_uri, content))
            is_own = version.config[f"{kind}_tokenizer"].get("directory_uri") is None
            if is_first and is_own and version.manifest_uri in holding:
                fitted.add(content)
    found = []
    for version in versions:
        contents = _tokenizer_contents(version)
        kinds = tuple(kind for kind, content in contents.items() if content in fitted)
        if kinds and version.manifest_uri not in holding:
            found.append((version, kinds))
    return found


def _tokenizer_contents(version: DatasetVersion) -> dict[str, frozenset[tuple[str, str]]]:
    """Return by kind what tells a tokenizer from others, wherever it lies."""
    tokenizers = {"visual": version.visual_tokenizer, "text": version.text_tokenizer}
    return {
        # records of older releases have no hashes
        kind: frozenset((item.sha256 or {"fingerprint": item.fingerprint}).items())
        for kind, item in tokenizers.items()
    }


def _contents(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    # what a manifest names but nobody found is no file
    missing = FailureReason.MISSING
    return {row["source_uri"]: row["content"] for row in rows if row["status"] != missing}


def _content_of(etag: str) -> str:
    """Return the content that an etag stands for: of local files it is the sha256."""
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else f"{_ETAG}{etag}"


def _folder_uri(root_uri: str, source_uri: str) -> str:
    return storage.join(root_uri, "datasets", fingerprint("source", source_uri)[:16])


def _manifest_uri(folder_uri: str, number: int) -> str:
    return storage.join(folder_uri, f"{number:06d}.json")


def _numbers(folder_uri: str) -> list[int]:
    """Return the numbers of the versions in a folder, ascending."""
    try:
        listed = storage.list_files(folder_uri, with_etag=False)
    except FileNotFoundError:
        return []
    names = [item.uri.rpartition("/")[2] for item in listed]
    return sorted(int(name[:6]) for name in names if re.fullmatch(r"[0-9]{6}\.json", name))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
