"""Clips and their verdicts as Parquet: the schemas, and reading them back.

Clips are written by `ursa.ingestion`; readers are the fitting of the tokenizers, tokenization and
evaluation.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Clip,
    ClipScores,
    ClipSelection,
    ClipSet,
    CroppedPixels,
    IngestedVideo,
    SelectedClip,
    SourceVideo,
    Split,
    VideoInfo,
)
from ursa.config import TokenizationConfig
from ursa.data.schema import schema_difference
from ursa.errors import ClipUnavailableError, ShardFormatError

_POOL = pa.default_memory_pool()
_ROWS_AT_ONCE = 1024  # a clip is ten times its row
_VERSION_METADATA = {b"ursa.schema_version": str(SCHEMA_VERSION).encode()}
_INFO_FIELDS = (
    pa.field("width_px", pa.int32(), nullable=False),
    pa.field("height_px", pa.int32(), nullable=False),
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("num_frames", pa.int32(), nullable=False),
    pa.field("duration_s", pa.float64(), nullable=False),
    pa.field("codec", pa.string(), nullable=False),
)
_SCORE_FIELDS = (
    pa.field("motion_px_per_s", pa.float64()),
    pa.field("camera_motion_px_per_s", pa.float64()),
    pa.field("object_motion_px_per_s", pa.float64()),
    pa.field("sharpness", pa.float64()),
    pa.field("luminance", pa.float64()),
    pa.field("dark_fraction", pa.float64()),
    pa.field("bright_fraction", pa.float64()),
    pa.field("black_fraction", pa.float64()),
    pa.field("black_border_fraction", pa.float64()),
    pa.field("freeze_fraction", pa.float64()),
    pa.field("slideshow_fraction", pa.float64()),
    pa.field("distinct_fps", pa.float64()),
    pa.field("flicker", pa.float64()),
    pa.field("text_area_fraction", pa.float64()),
    pa.field("static_overlay_fraction", pa.float64()),
    pa.field("perceptual_hash", pa.string()),
    pa.field("frame_hashes", pa.large_binary()),  # of millions of clips more than 2 GiB
)
CLIP_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("media_uri", pa.string(), nullable=False),
        pa.field("media_sha256", pa.string(), nullable=False),
        *_INFO_FIELDS,
        pa.field(
            "cropped_px",
            pa.struct(
                [
                    pa.field(side, pa.int32(), nullable=False)
                    for side in ("left", "top", "right", "bottom")
                ]
            ),
            nullable=False,
        ),
        *_SCORE_FIELDS,
        pa.field(
            "extra_scores",
            pa.list_(
                pa.field(
                    "element",
                    pa.struct(
                        [
                            pa.field("name", pa.string(), nullable=False),
                            pa.field("value", pa.float64(), nullable=False),
                        ]
                    ),
                    nullable=False,
                )
            ),
            nullable=False,
        ),
        pa.field("caption", pa.string()),
        pa.field("caption_long", pa.string()),
        pa.field("caption_source", pa.string()),
        pa.field("caption_model", pa.string()),
        pa.field("license", pa.string()),
        pa.field("attribution", pa.string()),
    ],
    metadata={b"ursa.kind": b"clips", **_VERSION_METADATA},
)
"""A row is a `Clip`; `info` and `scores` are spread over columns of their field names."""
_LATER_COLUMNS = ("frame_hashes",)
"""Columns that tables of this version may lack: null in all rows."""
FAILURE_SCHEMA = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string()),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata={b"ursa.kind": b"failures", **_VERSION_METADATA},
)
SELECTION_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("split", pa.string()),
    ],
    metadata={b"ursa.kind": b"selection", **_VERSION_METADATA},
)
"""Rows are in the order of the clips they judge."""


@contextlib.contextmanager
def _returned_memory() -> Iterator[None]:
    """Let Arrow take memory that goes back to the system when it is freed.

    Its usual pool keeps so much of it that a table takes several times its size.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(_POOL)


def read_clips(clips: ClipSet) -> list[Clip]:
    """Return all clips of a committed set, in order of source and time.

    Args:
        clips: The committed set.

    Raises:
        ShardFormatError: If the table is damaged, incomplete or of another schema version.
        StorageError: If the store refuses or does not answer.
    """
    return clips_of(read_clip_table(clips))


def read_clip_table(clips: ClipSet, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all clips of a committed set as a table: a tenth of the memory of `read_clips`.

    Args:
        clips: The committed set.
        columns: Names of those to return; None returns all.

    Returns:
        A table of `CLIP_SCHEMA`, or of some of its columns, in order of source and time.

    Raises:
        ShardFormatError: If the table is damaged, incomplete or of another schema version.
        StorageError: If the store refuses or does not answer.
    """
    return read_table(clips.clips_uri, CLIP_SCHEMA, clips.num_clips, columns)


def read_selection(selection: ClipSelection) -> list[SelectedClip]:
    """Return the verdict on every clip, in the order of `read_clips`.

    Args:
        selection: The committed selection.

    Raises:
        ShardFormatError: If a table is damaged or does not belong to the clips.
        StorageError: If the store refuses or does not answer.
    """
    return list(iter_selection(selection))


def iter_selection(selection: ClipSelection) -> Iterator[SelectedClip]:
    """Yield what `read_selection` returns, with few of the clips in memory at a time.

    Args:
        selection: The committed selection.

    Raises:
        ShardFormatError: If a table is damaged or does not belong to the clips.
        StorageError: If the store refuses or does not answer.
    """
    clips, verdicts = read_selection_tables(selection)
    for start in range(0, clips.num_rows, _ROWS_AT_ONCE):
        part = clips_of(clips.slice(start, _ROWS_AT_ONCE))
        rows = verdicts.slice(start, _ROWS_AT_ONCE).to_pylist()
        for clip, row in zip(part, rows, strict=True):
            yield SelectedClip(
                clip=clip, kept=row["kept"], reason=row["reason"], split=row["split"]
            )


def read_selection_tables(selection: ClipSelection) -> tuple[pa.Table, pa.Table]:
    """Return the clips and the verdicts on them as tables, row by row the same clips.

    Args:
        selection: The committed selection.

    Returns:
        A table of `CLIP_SCHEMA` and one of `SELECTION_SCHEMA`.

    Raises:
        ShardFormatError: If a table is damaged or does not belong to the clips.
        StorageError: If the store refuses or does not answer.
    """
    clips = read_clip_table(selection.clips)
    verdicts = read_table(selection.selection_uri, SELECTION_SCHEMA, clips.num_rows)
    if not verdicts["clip_id"].equals(clips["clip_id"]):
        raise ShardFormatError(f"{selection.selection_uri}: judges other clips than its parent's")
    return clips, verdicts


def clips_of(table: pa.Table) -> list[Clip]:
    """Return the rows of a table of `CLIP_SCHEMA` as clips.

    Args:
        table: Whole, or some of its rows.
    """
    return [_clip_of(row) for row in table.to_pylist()]


def unchecked_clips(table: pa.Table) -> list[Clip]:
    """Return the rows of a table as clips whose values are not validated again: much faster.

    Args:
        table: A table of `CLIP_SCHEMA`, whose types and hash are right.
    """
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["extra_scores"] = [_extra_scores(pairs) for pairs in columns["extra_scores"]]
    columns["cropped_px"] = [CroppedPixels(**row) for row in columns["cropped_px"]]
    parts = []
    for kind in (VideoInfo, ClipScores):
        names = tuple(kind.model_fields)
        values = zip(*(columns.pop(name) for name in names), strict=True)
        parts.append([kind.model_construct(**dict(zip(names, row, strict=True))) for row in values])
    names = tuple(columns)
    return [
        Clip.model_construct(info=info, scores=scores, **dict(zip(names, row, strict=True)))
        for info, scores, row in zip(*parts, zip(*columns.values(), strict=True), strict=True)
    ]


def each_clip(table: pa.Table) -> Iterator[Clip]:
    """Yield what `unchecked_clips` returns, with few of the clips in memory at a time.

    Args:
        table: A table of `CLIP_SCHEMA`, whose types and hash are right.
    """
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield from unchecked_clips(table.slice(start, _ROWS_AT_ONCE))


def iter_clips(clips: ClipSet) -> Iterator[Clip]:
    """Yield all clips of a committed set; neither they nor their table are in memory as a whole.

    Args:
        clips: The committed set.

    Yields:
        Clips in order of source and time, whose values are not validated again.

    Raises:
        ShardFormatError: If the table is damaged, incomplete or of another schema version.
        StorageError: If the store refuses or does not answer.
    """
    with _returned_memory():
        file = _open_table(clips.clips_uri, CLIP_SCHEMA, clips.num_clips)
        batches = file.iter_batches(_ROWS_AT_ONCE, use_threads=False)
        del file
    for batch in batches:
        yield from unchecked_clips(_completed(pa.Table.from_batches([batch]), CLIP_SCHEMA))
    del batches
    # what was read lies between what the reader has kept
    pa.default_memory_pool().release_unused()


def read_failures(clips: ClipSet) -> list[IngestedVideo]:
    """Return the quarantined files of a committed set with their reasons, in order of source.

    Args:
        clips: The committed set.

    Raises:
        ShardFormatError: If the table is missing, damaged or of another schema version.
        StorageError: If the store refuses or does not answer.
    """
    uri = clips.failures_uri or _table_beside(clips)
    return [
        IngestedVideo(
            source=SourceVideo(uri=row["source_uri"], num_bytes=row["num_bytes"], etag=row["etag"]),
            source_sha256=row["source_sha256"],
            info=None,
            clips=(),
            failure=row["reason"],
            detail=row["detail"],
        )
        for row in read_table(uri, FAILURE_SCHEMA, clips.num_failed).to_pylist()
    ]


def _table_beside(clips: ClipSet) -> str:
    """Return the table of failures of a set whose record does not name it."""
    folder_uri = clips.manifest_uri.rpartition("/")[0]
    for item in storage.list_files(folder_uri, with_etag=False):
        if item.uri.rpartition("/")[2].startswith("failures-"):
            return item.uri
    raise ShardFormatError(f"{folder_uri}: the table of failures is missing")


def clip_windows(clip: Clip, samples: TokenizationConfig) -> Iterator[tuple[float, list[int]]]:
    """Yield the samples that fit into a clip.

    Args:
        clip: A normalised clip.
        samples: Frame rate, length and distance of the samples.

    Yields:
        Start of the sample in the clip in seconds, and its `num_frames` frame numbers.
    """
    step = clip.info.fps / samples.fps
    stride = max(1.0, samples.window_stride_s * clip.info.fps)
    offsets = np.round(np.arange(samples.num_frames) * step).astype(int)
    start = 0.0
    while round(start) + offsets[-1] < clip.info.num_frames:
        first = round(start)
        yield first / clip.info.fps, [int(first + offset) for offset in offsets]
        start += stride


def clip_frames(clip: Clip, stride_s: float) -> Iterator[tuple[float, int]]:
    """Yield single frames of a clip.

    Args:
        clip: A normalised clip.
        stride_s: Distance of two frames, seconds; less than a frame counts as one.

    Yields:
        Time in the clip in seconds, and frame number.
    """
    stride = max(1.0, stride_s * clip.info.fps)
    for place in np.arange(0, clip.info.num_frames, stride):
        yield float(round(place) / clip.info.fps), round(float(place))


def read_table(
    uri: str, schema: pa.Schema, num_rows: int | None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a table written by `put_table`; whatever is wrong with it is one error.

    Args:
        uri: Where it is; the name holds the hash.
        schema: Columns and metadata that it must have.
        num_rows: Number of rows that it must have; None takes any.
        columns: Names of those to return; None returns all.

    Returns:
        The table.

    Raises:
        ShardFormatError: If it is missing, damaged, of another schema or number of rows.
        StorageError: If the store refuses or does not answer.
    """
    with _returned_memory():
        file = _open_table(uri, schema, num_rows)
        # threads keep what they have freed, each for itself
        table = file.read(columns, use_threads=False)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return _completed(table, wanted)


def _open_table(uri: str, schema: pa.Schema, num_rows: int | None) -> pq.ParquetFile:
    """Open a table of which hash, schema and number of rows are right."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ShardFormatError(
            f"{uri} is missing; `ursa data repair` mends it or says what to do"
        ) from error
    if not uri.endswith(f"-{hashlib.sha256(data).hexdigest()[:16]}.parquet"):
        raise ShardFormatError(
            f"{uri} is damaged: its bytes do not have the hash in its name; `ursa data repair` "
            "mends it or says what to do"
        )
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise ShardFormatError(f"{uri} is no Parquet file ({error})") from error
    completed = _completed(file.schema_arrow.empty_table(), schema)
    difference = schema_difference(completed.schema, schema)
    if difference:
        raise ShardFormatError(f"{uri}: {difference}")
    found = file.metadata.num_rows
    if num_rows not in (None, found):
        raise ShardFormatError(f"{uri}: {found} rows, expected {num_rows}")
    return file


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns, all null, that one of an older release may lack."""
    for name in _LATER_COLUMNS:
        if name in schema.names and name not in table.column_names:
            field = schema.field(name)
            nulls = pa.nulls(table.num_rows, field.type)
            table = table.add_column(schema.get_field_index(name), field, nulls)
    return table


def put_table(folder_uri: str, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as one Parquet file whose name holds the hash of its bytes.

    Args:
        folder_uri: Where the file goes.
        name: What its name begins with: it becomes `<name>-<sha256[:16]>.parquet`.
        schema: Columns and metadata of the table.
        rows: Values by column name.

    Returns:
        URI of the file.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    return put_batches(folder_uri, name, schema, batches_of(schema, rows))


def put_batches(
    folder_uri: str,
    name: str,
    schema: pa.Schema,
    batches: list[pa.RecordBatch],
    order: np.ndarray | None = None,
) -> str:
    """Write batches as `put_table` writes their rows.

    Args:
        folder_uri: Where the file goes.
        name: What its name begins with.
        schema: Columns and metadata of the table.
        batches: Result of `batches_of`; emptied, so that no column is held twice.
        order: Places of the rows in the order of the file, int64; None leaves them as they are.

    Returns:
        URI of the file.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    data = _batches_bytes(schema, batches, order)
    uri = storage.join(folder_uri, f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.parquet")
    storage.put_named_by_hash(uri, data)
    return uri


def table_bytes(schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> bytes:
    """Return rows as a Parquet file.

    Args:
        schema: Columns and metadata of the table.
        rows: Values by column name.
    """
    return _batches_bytes(schema, batches_of(schema, rows))


def batches_of(schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> list[pa.RecordBatch]:
    """Return rows as columns, some at a time: a row as a dictionary is ten times its values.

    Args:
        schema: Columns and metadata of the table.
        rows: Values by column name.
    """
    remaining = iter(rows)
    parts = iter(lambda: list(islice(remaining, _ROWS_AT_ONCE)), [])
    batches = []
    for part in parts:
        with _returned_memory():
            batches.append(pa.RecordBatch.from_pylist(part, schema=schema))
    return batches


@_returned_memory()
def _batches_bytes(
    schema: pa.Schema, batches: list[pa.RecordBatch], order: np.ndarray | None = None
) -> bytes:
    columns: list[Any] = [
        [batch.column(place) for batch in batches] or [pa.array([], field.type)]
        for place, field in enumerate(schema)
    ]
    batches.clear()
    # in one piece, or the pages of the file, and so its hash, would depend on the size of the
    # parts; column by column, or all values would be there twice
    for place, parts in enumerate(columns):
        whole = pa.concat_arrays(parts)
        columns[place] = whole if order is None else whole.take(pa.array(order))
        del parts, whole
        # many small pieces: the allocator keeps what is free between those of other columns
        pa.default_memory_pool().release_unused()
    table = pa.Table.from_arrays(columns, schema=schema)
    columns.clear()
    # on disk, or it would be in memory beside the table, and twice where it grows
    with storage.scratch_directory("table") as folder:
        path = folder / "table.parquet"
        with path.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
        del table
        pa.default_memory_pool().release_unused()
        return path.read_bytes()


def clip_row(clip: Clip) -> dict[str, Any]:
    """Return a clip as a row of `CLIP_SCHEMA`.

    Args:
        clip: A normalised clip.
    """
    row = clip.model_dump(mode="json", exclude={"info", "scores"})
    row["extra_scores"] = [
        {"name": name, "value": value} for name, value in sorted(clip.extra_scores.items())
    ]
    return row | clip.info.model_dump() | clip.scores.model_dump()


def failure_row(video: IngestedVideo) -> dict[str, Any]:
    """Return a quarantined file as a row of `FAILURE_SCHEMA`.

    Args:
        video: A file with a `failure`.
    """
    return {
        "source_uri": video.source.uri,
        "source_sha256": video.source_sha256,
        "num_bytes": video.source.num_bytes,
        "etag": video.source.etag,
        "reason": str(video.failure),
        "detail": video.detail,
    }


def selection_rows(
    table: pa.Table, reasons: Iterable[str | None], splits: Iterable[Split | None]
) -> Iterator[dict[str, Any]]:
    """Yield verdicts as rows of `SELECTION_SCHEMA`.

    Args:
        table: The clips, a table of `CLIP_SCHEMA`.
        reasons: Why each is rejected; None keeps it.
        splits: What each clip that is kept is for.
    """
    names = zip(table["clip_id"], table["source_uri"], strict=True)
    for (clip_id, source_uri), reason, split in zip(names, reasons, splits, strict=True):
        yield {
            "clip_id": clip_id.as_py(),
            "source_uri": source_uri.as_py(),
            "kept": reason is None,
            "reason": reason,
            "split": split,
        }


def _clip_of(row: dict[str, Any]) -> Clip:
    info = VideoInfo(**{name: row.pop(name) for name in VideoInfo.model_fields})
    scores = ClipScores(**{name: row.pop(name) for name in ClipScores.model_fields})
    row["extra_scores"] = _extra_scores(row["extra_scores"])
    return Clip(info=info, scores=scores, **row)


def _extra_scores(pairs: list[dict[str, Any]]) -> dict[str, float]:
    return {pair["name"]: pair["value"] for pair in pairs}


@contextlib.contextmanager
def local_clip(clip: Clip) -> Iterator[Path]:
    """Yield a local path of a clip's file, after a look at its hash.

    Args:
        clip: A normalised clip.

    Yields:
        The path; it must not be written to.

    Raises:
        ClipUnavailableError: If the file is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(storage.local_copy(clip.media_uri))
            digest = storage.sha256_file(path)
        except FileNotFoundError:
            raise ClipUnavailableError(
                f"{clip.media_uri} is missing; run `ursa data repair`"
            ) from None
        if digest != clip.media_sha256:
            raise ClipUnavailableError(
                f"{clip.media_uri} is damaged: its bytes do not have the hash of the clip; run "
                "`ursa data repair`"
            )
        yield path
