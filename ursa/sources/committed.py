"""The files of a source as they were when a run began: a record, and a table of them beside it.

A record alone would not do: it is one piece of JSON, and there may be a million files.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, SourceVideo
from ursa.config import FrozenModel
from ursa.data.clips import put_table, read_table

_ROWS_AT_ONCE = 1024
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("offset_bytes", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata={
        b"ursa.kind": b"sources",
        b"ursa.schema_version": str(SCHEMA_VERSION).encode(),
    },
)
"""A row is a `SourceVideo`; rows are in the order of the listing."""


class SourceListing(FrozenModel):
    """The files of a source, as they were when a run began.

    Attributes:
        manifest_uri: Where the record itself is.
        source_uri: The source, absolute.
        sources: Its files, sorted by URI; none in a record that names a table of them.
        table_name: Table of `SOURCE_SCHEMA` beside the record; None in records of older code, which
            hold the files.
        notes_digest: Hash of captions and licences.
        fingerprint: Hash of files and captions.
    """

    manifest_uri: str
    source_uri: str
    sources: tuple[SourceVideo, ...] = ()
    table_name: str | None = None
    notes_digest: str
    fingerprint: str


def commit_listing(listing: SourceListing) -> None:
    """Commit a listing: its files as a table, then the record that names it.

    Args:
        listing: With its files.

    Raises:
        ManifestError: If a record stands there that is damaged or of another schema version.
        StorageError: If the store refuses or does not answer.
    """
    folder_uri = listing.manifest_uri.rpartition("/")[0]
    table_uri = put_table(folder_uri, "sources", SOURCE_SCHEMA, _rows(listing.sources))
    name = table_uri.rpartition("/")[2]
    record = listing.model_copy(update={"sources": (), "table_name": name})
    storage.commit_record(listing.manifest_uri, record)


def table_beside(uri: str, listing: SourceListing) -> pa.Table | None:
    """Return the table of a listing's files; None if its record holds them.

    Args:
        uri: Where the record is: it may say another place if the data root was moved.
        listing: The record.

    Raises:
        ShardFormatError: If the table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    if listing.table_name is None:
        return None
    table_uri = storage.join(uri.rpartition("/")[0], listing.table_name)
    return read_table(table_uri, SOURCE_SCHEMA, None)


def load_listing(uri: str) -> SourceListing | None:
    """Return a committed listing with its files.

    Args:
        uri: The record.

    Returns:
        The listing; None if there is none.

    Raises:
        ManifestError: If the record is damaged or of another schema version.
        ShardFormatError: If the table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    listing = storage.load_record(uri, SourceListing)
    table = None if listing is None else table_beside(uri, listing)
    if listing is None or table is None:
        return listing
    return listing.model_copy(update={"sources": tuple(_sources_of(table))})


def _rows(sources: Sequence[SourceVideo]) -> Iterator[dict[str, Any]]:
    return (source.model_dump(mode="json") for source in sources)


def _sources_of(table: pa.Table) -> Iterator[SourceVideo]:
    for batch in table.to_batches(_ROWS_AT_ONCE):
        names, columns = batch.schema.names, (column.to_pylist() for column in batch.columns)
        for row in zip(*columns, strict=True):
            # an object remembers which values it was given: without the nulls it takes half
            pairs = zip(names, row, strict=True)
            yield SourceVideo(**{name: value for name, value in pairs if value is not None})
