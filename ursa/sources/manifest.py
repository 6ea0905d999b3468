"""Manifests: files that name the videos of a source, one row each, and what is said about them.

A manifest ends in .csv, .jsonl, .parquet or .txt (one name a line). It is read as a whole or
refused as a whole: a row that cannot be read would be a lost video.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ursa import storage
from ursa.errors import DataError
from ursa.sources.names import is_https, resolve_name
from ursa.video.captions import (
    CaptionRow,
    name_of,
    parse_notes,
    parse_object,
    parse_span,
    repeated_names,
)

logger = logging.getLogger(__name__)

MANIFEST_LIMIT_BYTES = 256 << 20
UNPACKED_LIMIT_BYTES = 2 << 30
"""A Parquet manifest whose columns take more memory than this is refused."""

_NAME_KEYS = ("path", "uri")
_KNOWN_KEYS = frozenset(
    {
        *_NAME_KEYS,
        *("caption", "caption_long", "license", "licence", "attribution", "start_s", "end_s"),
    }
)
_NUMBER_KEYS = frozenset({"start_s", "end_s"})
_MAX_NAMED = 5


class ManifestRow(NamedTuple):
    """One row: its place in the file (from 1), the file that it names, and what it says."""

    number: int
    uri: str
    said: CaptionRow


def read_manifest(
    manifest_uri: str, *, allow_https: bool = False, is_quiet: bool = False
) -> list[ManifestRow]:
    """Read all rows of a manifest.

    Rows that say the same about the same span of the same file count once.

    Args:
        manifest_uri: A file or object that ends in .csv, .jsonl, .parquet or .txt.
        allow_https: Whether rows may name https addresses.
        is_quiet: Say nothing of columns and rows that are left out: somebody has said it before.

    Returns:
        The rows in their order. Several may name one file, each another span of it.

    Raises:
        DataError: If there is no such file, it is too large or damaged, has no column `path` or
            `uri`, or a row cannot be used; names the rows and what is wrong.
        StorageError: If the store refuses or does not answer.
    """
    rows: list[ManifestRow] = []
    problems: list[str] = []
    keys: set[str] = set()
    for number, values in _read_values(manifest_uri):
        keys.update(values)
        try:
            rows.append(_parse_row(manifest_uri, number, values))
        except (DataError, ValueError, TypeError) as error:
            problems.append(f"row {number}: {error}")
    if not keys.intersection(_NAME_KEYS):
        raise DataError(
            f"{manifest_uri} has no column that names files; expected `path` or `uri`, got "
            f"{', '.join(map(repr, sorted(keys))) or 'no rows'}"
        )
    if (unknown := sorted(keys - _KNOWN_KEYS)) and not is_quiet:
        logger.warning("%s: columns that are not used: %s", manifest_uri, ", ".join(unknown))
    rows, repeated = _without_repeats(rows, problems)
    if repeated and not is_quiet:
        logger.warning(
            "%s: %d rows repeat others and count once, the first is row %d",
            manifest_uri,
            len(repeated),
            repeated[0],
        )
    if problems:
        raise DataError(
            f"{manifest_uri}: {len(problems)} rows cannot be used; correct or remove them. "
            f"{'; '.join(problems[:_MAX_NAMED])}"
        )
    if not allow_https:
        check_https([row.uri for row in rows], manifest_uri)
    return rows


def check_https(uris: list[str], source_uri: str) -> None:
    """Refuse https addresses, saying how to allow them.

    Args:
        uris: All files of a source.
        source_uri: The source.

    Raises:
        DataError: If one of the files is an https address.
    """
    addresses = [uri for uri in uris if is_https(uri)]
    if addresses:
        raise DataError(
            f"{source_uri} names {len(addresses)} https addresses, such as {addresses[0]!r}, and "
            "ingestion.allow_https is false; if this machine may fetch from them, allow it with "
            '--param \'overrides={"ingestion": {"allow_https": true}}\''
        )


def _parse_row(manifest_uri: str, number: int, values: Mapping[str, Any]) -> ManifestRow:
    name = name_of(values)
    said = CaptionRow(name, *parse_span(values), parse_notes(values))
    return ManifestRow(number, resolve_name(manifest_uri, name), said)


def _without_repeats(
    rows: list[ManifestRow], problems: list[str]
) -> tuple[list[ManifestRow], list[int]]:
    """Return each span of each file once, and the rows that say it again.

    Two rows that do not say the same are a problem.
    """
    first: dict[tuple[str, float, float], ManifestRow] = {}
    repeated: list[int] = []
    for row in rows:
        other = first.setdefault((row.uri, row.said.start_s, row.said.end_s), row)
        if other is row:
            continue
        if other.said.notes == row.said.notes:
            repeated.append(row.number)
        else:
            problems.append(
                f"rows {other.number} and {row.number} say different things about {row.uri}"
            )
    return list(first.values()), repeated


def _read_values(manifest_uri: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield every row with its number, from 1, header and empty lines not counted as rows."""
    try:
        num_bytes = storage.stat_file(manifest_uri).num_bytes
        if num_bytes > MANIFEST_LIMIT_BYTES:
            raise DataError(
                f"{manifest_uri}: {num_bytes} bytes, expected at most {MANIFEST_LIMIT_BYTES}; "
                "split it"
            )
        data = storage.read_bytes(manifest_uri)
    except FileNotFoundError as error:
        raise DataError(f"source {manifest_uri!r} does not exist") from error
    suffix = manifest_uri.lower().rpartition(".")[2]
    if suffix == "parquet":
        yield from enumerate(_parquet_values(manifest_uri, data), start=1)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{manifest_uri}: byte {error.start} is no UTF-8; save the manifest as UTF-8"
        ) from error
    read = {"csv": _csv_values, "jsonl": _jsonl_values, "txt": _line_values}[suffix]
    yield from enumerate(read(manifest_uri, text), start=1)


def _csv_values(manifest_uri: str, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _refuse_repeated_columns(manifest_uri, reader.fieldnames or ())
        for values in reader:
            if None in values:
                raise DataError(
                    f"{manifest_uri}: line {reader.line_num} has more values than the header has "
                    "columns; put values that hold commas in double quotes"
                )
            yield values
    except csv.Error as error:
        raise DataError(f"{manifest_uri}: no CSV after line {reader.line_num} ({error})") from error


def _jsonl_values(manifest_uri: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_object(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{manifest_uri}: line {number} is no JSON ({error})") from error
        except ValueError as error:
            raise DataError(f"{manifest_uri}: line {number}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{manifest_uri}: line {number} is no JSON object: {line[:80]!r}")
        yield values


def _line_values(_manifest_uri: str, text: str) -> Iterator[dict[str, Any]]:
    # a name may hold any other character, at its ends too
    for line in text.split("\n"):
        name = line.removesuffix("\r")
        if name.strip() and not name.startswith("#"):
            yield {"path": name}


def _parquet_values(manifest_uri: str, data: bytes) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        _refuse_repeated_columns(manifest_uri, names)
        known = [name for name in names if name in _KNOWN_KEYS]
        for name in known:
            _check_column(manifest_uri, file.schema_arrow.field(name))
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        if num_bytes > UNPACKED_LIMIT_BYTES:
            raise DataError(
                f"{manifest_uri}: {num_bytes} bytes unpacked, expected at most "
                f"{UNPACKED_LIMIT_BYTES}; split it or leave out other columns"
            )
        # columns that are not used are named, not read
        others = dict.fromkeys(name for name in names if name not in _KNOWN_KEYS)
        for batch in file.iter_batches(columns=known):
            for values in batch.to_pylist():
                yield {**others, **values}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{manifest_uri} is no Parquet file ({error})") from error


def _refuse_repeated_columns(manifest_uri: str, names: Iterable[str]) -> None:
    """Refuse two columns of one name: the values of one would be lost in silence."""
    if repeated := repeated_names(name for name in names if name in _KNOWN_KEYS):
        raise DataError(
            f"{manifest_uri} has more than one column {', '.join(map(repr, repeated))}; rename or "
            "remove the others"
        )


def _check_column(manifest_uri: str, field: pa.Field) -> None:
    """Refuse columns that are not plain: values of extension types may run code when read."""
    plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
    is_number = pa.types.is_integer(plain) or pa.types.is_floating(plain)
    if not (is_text or pa.types.is_null(plain) or (is_number and field.name in _NUMBER_KEYS)):
        raise DataError(
            f"{manifest_uri}: column {field.name!r} is of type {field.type}, expected "
            f"{'a number' if field.name in _NUMBER_KEYS else 'text'}"
        )
