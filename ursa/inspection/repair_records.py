"""Mend what belongs to records: remove damaged ones that are made again, and tables of versions."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

from ursa import storage
from ursa.annotation.records import Annotation
from ursa.artifacts import IngestedVideo
from ursa.data.clips import read_clip_table, table_bytes
from ursa.data.versions import (
    CHANGE_SCHEMA,
    FILE_SCHEMA,
    DatasetVersion,
    find_changes,
    iter_versions,
    list_source_files,
)
from ursa.errors import DataError, ManifestError
from ursa.inspection.problems import OTHER_BYTES, Repair, done, not_done
from ursa.inspection.verify_records import record_error


def remove_records(uris: Sequence[str]) -> Iterator[Repair]:
    """Remove records of files and annotations that are damaged; whole ones are left alone.

    They repeat what a run can find out again: the next one that needs them commits them anew.

    Args:
        uris: What `verify` named.

    Yields:
        What became of each.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    for uri in uris:
        if _is_damaged(uri):
            with contextlib.suppress(FileNotFoundError):  # another repair was faster
                storage.remove_file(uri)
            yield done(uri, "it was damaged and is removed; a run that needs it makes it again")
        else:
            yield done(uri, "it is not damaged any more")


def _is_damaged(uri: str) -> bool:
    kind: type[Annotation | IngestedVideo] = IngestedVideo
    if uri.split("/")[-4] == "annotations":
        kind = Annotation
    try:
        record = storage.load_lasting(uri, kind)
    except ManifestError:
        return True
    return record is not None and record_error(uri, record) is not None


def remake_tables(root_uri: str, uris: Sequence[str]) -> Iterator[Repair]:
    """Make damaged tables of data set versions again, from the tables of their clips.

    Args:
        root_uri: The data root.
        uris: The tables that `verify` named.

    Yields:
        What became of each.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    left = set(uris)
    for _, version in iter_versions(root_uri) if uris else ():
        if isinstance(version, ManifestError):
            continue
        for uri in sorted(left & {version.files_uri, version.changes_uri}):
            left.remove(uri)
            yield _remake_table(version, uri)
    yield from (not_done(uri, "no version that can be read names it") for uri in sorted(left))


def _remake_table(version: DatasetVersion, uri: str) -> Repair:
    try:
        table = read_clip_table(version.clips)
        files = list_source_files(version.clips, table)
        if uri == version.files_uri:
            data = table_bytes(FILE_SCHEMA, files)
        else:
            parent_uri = version.parent_uri
            parent = storage.load_lasting(parent_uri, DatasetVersion) if parent_uri else None
            if parent is None and parent_uri:
                return not_done(uri, f"the version before, {parent_uri}, is missing")
            found = find_changes(parent, version.clips, table, files)
            # older versions knew fewer kinds
            rows = [item._asdict() for item in found if item.change in version.changes]
            data = table_bytes(CHANGE_SCHEMA, rows)
    except (DataError, FileNotFoundError) as error:
        return not_done(uri, f"it cannot be made again: {error}")
    if not uri.endswith(f"-{hashlib.sha256(data).hexdigest()[:16]}.parquet"):
        return not_done(uri, OTHER_BYTES)
    storage.write_bytes(uri, data)
    return done(uri, "made again from the clips of the version")
