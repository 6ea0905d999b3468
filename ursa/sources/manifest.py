"""Manifests: files that name the videos of a source, one row each, and what is said about them.

A manifest ends in .csv, .jsonl, .parquet or .txt (one name a line). It is read as a whole or
refused as a whole: a row that cannot be read would be a lost video.
"""

import csv
import io
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ursa import storage
from ursa.errors import DataError
from ursa.sources.names import is_https, resolve_name
from ursa.video.captions import (
    MAX_LINE_CHARACTERS,
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
MANIFEST_LIMIT_ROWS = 5_000_000
"""A row takes a kilobyte once it is read, in the file it may be two bytes or none."""

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
        except (DataError, ValueError, TypeError, RecursionError) as error:
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
    _check_count(manifest_uri, max(map(text.count, "\n\r")), "lines")
    read = {"csv": _csv_values, "jsonl": _jsonl_values, "txt": _line_values}[suffix]
    yield from enumerate(read(manifest_uri, text), start=1)


def _csv_values(manifest_uri: str, text: str) -> Iterator[dict[str, Any]]:
    lines = enumerate(io.StringIO(text, newline=""), start=1)
    reader = csv.reader((_checked_line(manifest_uri, *line) for line in lines), strict=True)
    whole = 0
    try:
        names = next(reader, [])
        _refuse_repeated_columns(manifest_uri, names)
        places = {name: place for place, name in enumerate(names) if name in _KNOWN_KEYS}
        # columns that are not used are named, once: there may be more of them than rows
        others = dict.fromkeys(name for name in names if name not in _KNOWN_KEYS)
        whole = reader.line_num
        for values in reader:
            whole = reader.line_num
            if not values:
                continue
            if len(values) > len(names):
                raise DataError(
                    f"{manifest_uri}: line {whole} has more values than the header has "
                    "columns; put values that hold commas in double quotes"
                )
            known = (values[place] if place < len(values) else None for place in places.values())
            yield {**others, **dict(zip(places, known, strict=True))}
            others = {}
    except csv.Error as error:
        raise DataError(f"{manifest_uri}: no CSV after line {whole} ({error})") from error


def _checked_line(manifest_uri: str, number: int, line: str) -> str:
    if len(line) > MAX_LINE_CHARACTERS:
        raise DataError(
            f"{manifest_uri}: line {number} has {len(line)} characters, expected at most "
            f"{MAX_LINE_CHARACTERS}; leave out what is not used"
        )
    return line


def _jsonl_values(manifest_uri: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_object(_checked_line(manifest_uri, number, line))
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
        schema = pq.ParquetFile(pa.BufferReader(data)).schema_arrow
        _refuse_repeated_columns(manifest_uri, schema.names)
        known = [name for name in schema.names if name in _KNOWN_KEYS]
        for name in known:
            _check_column(manifest_uri, schema.field(name))
        # a text that many rows share stays one text
        texts = [name for name in known if not _is_number(schema.field(name).type)]
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
        _check_parquet_size(manifest_uri, file, known)
        # columns that are not used are named, not read
        others = dict.fromkeys(name for name in schema.names if name not in _KNOWN_KEYS)
        if not known:
            yield others
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, known, use_threads=False)
            # value by value: as Python's texts, a few thousand rows may take gigabytes
            for values in zip(*table.columns, strict=True):
                yield {**others, **{k: v.as_py() for k, v in zip(known, values, strict=True)}}
                others = {}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{manifest_uri} is no Parquet file ({error})") from error


def _check_parquet_size(manifest_uri: str, file: pq.ParquetFile, known: list[str]) -> None:
    """Refuse a file whose rows are too many or too large, before there is one of them.

    What the file says of its size counts a text once that any number of its rows share.

    Args:
        manifest_uri: The file, for errors.
        file: The file, its texts read as dictionaries.
        known: Columns that are used.

    Raises:
        DataError: If it is too large.
    """
    _check_count(manifest_uri, file.metadata.num_rows, "rows")
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    _check_unpacked(manifest_uri, sum(group.total_byte_size for group in groups))
    num_bytes = 0
    # one column at a time: what the file states may be too little
    for group, name in itertools.product(range(file.num_row_groups), known):
        column = file.read_row_group(group, [name], use_threads=False).column(0)
        num_bytes += sum(map(_num_bytes, column.chunks))
        _check_unpacked(manifest_uri, num_bytes)


def _num_bytes(values: pa.Array) -> int:
    """Return what the values of a column take without sharing, bytes."""
    if not pa.types.is_dictionary(values.type):
        return int(values.nbytes)
    lengths = pc.binary_length(values.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(values.indices)).as_py() or 0


def _check_unpacked(manifest_uri: str, num_bytes: int) -> None:
    if num_bytes > UNPACKED_LIMIT_BYTES:
        raise DataError(
            f"{manifest_uri}: {num_bytes} bytes unpacked, expected at most "
            f"{UNPACKED_LIMIT_BYTES}; split it or leave out other columns"
        )


def _check_count(manifest_uri: str, count: int, what: str) -> None:
    if count > MANIFEST_LIMIT_ROWS:
        raise DataError(
            f"{manifest_uri}: {count} {what}, expected at most {MANIFEST_LIMIT_ROWS}; split it"
        )


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
    is_number = _is_number(plain) and (field.name in _NUMBER_KEYS or pa.types.is_null(plain))
    if not (is_number or pa.types.is_string(plain) or pa.types.is_large_string(plain)):
        raise DataError(
            f"{manifest_uri}: column {field.name!r} is of type {field.type}, expected "
            f"{'a number' if field.name in _NUMBER_KEYS else 'text'}"
        )


def _is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers, or all null: their size is that of their type."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return any(test(kind) for test in tests)
