"""What another release, another run or a hand has written is refused with the reason (F12).

Unknown parameters of a flow: tests/integration/test_prefect.py.
"""

import hashlib
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import factories
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, ShardInfo, SourceVideo
from ursa.config import load_config
from ursa.data.clips import CLIP_SCHEMA, read_table
from ursa.data.schema import token_schema
from ursa.data.shards import read_shard, shard_bytes
from ursa.errors import ConfigError, ManifestError, ShardFormatError, UrsaError

CODES = 60
OTHER_RELEASE = (
    "read it with the release of ursa that wrote it, or let this one make the data again"
)


def shard_of(table: pa.Table, folder: Path) -> ShardInfo:
    """A shard as a release of another schema would have written it: name and hash are right."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"video-{digest[:16]}.parquet"
    path.write_bytes(data)
    return ShardInfo(uri=str(path), num_samples=table.num_rows, num_bytes=len(data), sha256=digest)


def plain() -> pa.Table:
    rows = factories.token_rows("video", 3)
    return pq.read_table(pa.BufferReader(shard_bytes(rows, codebook_size=CODES)))


def with_field(table: pa.Table, name: str, field: pa.Field) -> pa.Table:
    place = table.schema.get_field_index(name)
    schema = table.schema.set(place, field)
    return pa.Table.from_arrays(
        [each.cast(kind.type) for each, kind in zip(table.columns, schema, strict=True)],
        schema=schema,
    )


def with_metadata(table: pa.Table, **values: str) -> pa.Table:
    changed = {f"ursa.{key}".encode(): value.encode() for key, value in values.items()}
    return table.replace_schema_metadata(table.schema.metadata | changed)


def added(table: pa.Table) -> pa.Table:
    return table.append_column(pa.field("bitrate", pa.float64()), pa.array([1.0] * len(table)))


def turned(table: pa.Table) -> pa.Table:
    return table.select([*table.column_names[1:], table.column_names[0]])


SHARD_DRIFTS = {
    "column added": (added, "column bitrate is unknown"),
    "column removed": (
        lambda table: table.drop_columns(["variant"]),
        "column variant is missing",
    ),
    "type changed": (
        lambda table: with_field(table, "fps", pa.field("fps", pa.float32(), nullable=False)),
        "column fps is float not null, expected double not null",
    ),
    "nulls allowed": (
        lambda table: with_field(table, "caption", pa.field("caption", pa.string())),
        "column caption is string, expected string not null",
    ),
    "dictionary of captions": (
        lambda table: with_field(
            table,
            "caption",
            pa.field("caption", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        ),
        "column caption is dictionary",
    ),
    "other order of columns": (turned, "columns stand as clip_id, "),
    "other codebook": (
        lambda table: with_metadata(table, codebook_size="61"),
        "ursa.codebook_size is 61, expected 60",
    ),
    "newer release": (
        lambda table: with_metadata(added(table), schema_version="99"),
        f"ursa.schema_version is 99, expected {SCHEMA_VERSION}; column bitrate is unknown",
    ),
}


@pytest.mark.parametrize("drift", SHARD_DRIFTS)
def test_a_shard_of_another_schema_is_refused_by_name(tmp_path, drift):
    change, reason = SHARD_DRIFTS[drift]
    shard = shard_of(change(plain()), tmp_path)
    with pytest.raises(ShardFormatError, match=re.escape(reason)) as caught:
        read_shard(shard, codebook_size=CODES)
    assert shard.uri in str(caught.value)
    assert OTHER_RELEASE in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [Path(shard.uri).name]


def test_a_shard_of_this_schema_is_read(tmp_path):
    shard = shard_of(plain(), tmp_path)
    assert read_shard(shard, codebook_size=CODES).schema.equals(token_schema(CODES))


def test_a_clip_table_of_another_release_is_refused_by_name(tmp_path):
    older = CLIP_SCHEMA.remove(CLIP_SCHEMA.get_field_index("flicker")).with_metadata(
        {b"ursa.kind": b"clips", b"ursa.schema_version": b"2"}
    )
    buffer = io.BytesIO()
    pq.write_table(older.empty_table(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = tmp_path / f"clips-{digest[:16]}.parquet"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ShardFormatError, match="schema_version is 2, expected") as caught:
        read_table(str(path), CLIP_SCHEMA, None)
    assert "column flicker is missing" in str(caught.value)
    assert OTHER_RELEASE in str(caught.value)


RECORD_DRIFTS = {
    "older record": (
        {"schema_version": SCHEMA_VERSION - 1, "kind": "SourceVideo", "record": {}},
        f"schema version {SCHEMA_VERSION - 1}",
        "begin in an empty root",
    ),
    "newer record": (
        {"schema_version": SCHEMA_VERSION + 1, "kind": "SourceVideo", "record": {"new": 1}},
        f"schema version {SCHEMA_VERSION + 1}",
        "begin in an empty root",
    ),
    "unknown field": (
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "SourceVideo",
            "record": {"uri": "a", "num_bytes": 1, "etag": "", "colour": "red"},
        },
        "colour",
        "is damaged",
    ),
    "record of another kind": (
        {"schema_version": SCHEMA_VERSION, "kind": "Clip", "record": {}},
        "holds Clip",
        "expected SourceVideo",
    ),
}


@pytest.mark.parametrize("drift", RECORD_DRIFTS)
def test_a_record_of_another_schema_is_refused_and_kept(tmp_path, drift):
    content, cause, advice = RECORD_DRIFTS[drift]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content), "utf-8")
    before = path.read_bytes()
    record = SourceVideo(uri="a", num_bytes=1, etag="x")
    for use in (
        lambda: storage.load_record(str(path), SourceVideo),
        lambda: storage.commit_record(str(path), record),
    ):
        with pytest.raises(ManifestError) as caught:
            use()
        assert cause in str(caught.value)
        assert advice in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_key_of_the_configuration_is_refused_by_name():
    with pytest.raises(ConfigError, match="max_motion_px_per_s") as caught:
        load_config("tiny", {"selection": {"max_motion_px_s": 1.0}})
    assert "max_motion_px_s" in str(caught.value)
    assert isinstance(caught.value, UrsaError)
