import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import factories, many_clips
from ursa import storage
from ursa.artifacts import FailureReason, IngestedVideo, SourceVideo
from ursa.data.clips import (
    CLIP_SCHEMA,
    FAILURE_SCHEMA,
    SELECTION_SCHEMA,
    batches_of,
    clip_row,
    failure_row,
    iter_clips,
    iter_selection,
    put_batches,
    put_table,
    read_failures,
    read_table,
    table_bytes,
)
from ursa.errors import ShardFormatError


@pytest.mark.parametrize("number", [0, 1025, 30_000])
def test_a_table_made_in_parts_has_the_bytes_of_one_made_whole(number):
    rows = [
        {"clip_id": f"{i:032x}", "source_uri": f"file:///{i // 7}", "kept": i % 3 > 0}
        for i in range(number)
    ]
    whole = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)
    pq.write_table(table, whole, compression="zstd")
    assert table_bytes(SELECTION_SCHEMA, iter(rows)) == whole.getvalue()


def test_batches_are_written_in_the_order_that_is_asked_for(tmp_path):
    """The bytes are those of one table: names of files hold their hash."""
    clips = [
        clip
        for number in range(300)
        for clip in many_clips.video_of(tmp_path / f"{number}.mp4", "/data", number, 5).clips
    ]
    rows = [clip_row(clip) for clip in clips]
    whole = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), whole, compression="zstd")
    places = np.random.default_rng(0).permutation(len(rows))
    batches = batches_of(CLIP_SCHEMA, (rows[place] for place in places))
    uri = put_batches(str(tmp_path), "clips", CLIP_SCHEMA, batches, np.argsort(places))
    assert storage.read_bytes(uri) == whole.getvalue()
    assert not batches
    names = ("start_s", "clip_id")
    assert read_table(uri, CLIP_SCHEMA, None, names).to_pylist() == [
        {name: row[name] for name in names} for row in rows
    ]


def test_clips_are_read_some_at_a_time(tmp_path):
    clips = list(many_clips.video_of(tmp_path / "a.mp4", "/data", 0, 1500).clips)
    selection = factories.commit_selection(str(tmp_path), clips, num_validation=100)
    assert list(iter_clips(selection.clips)) == clips
    assert [item.clip for item in iter_selection(selection)] == clips
    other = selection.clips.model_copy(update={"num_clips": 1})
    with pytest.raises(ShardFormatError, match="1500 rows, expected 1"):
        next(iter_clips(other))


def _put_failures(folder, *names):
    rows = [
        failure_row(
            IngestedVideo(
                source=SourceVideo(uri=f"file:///{name}", num_bytes=1, etag=name),
                source_sha256=None,
                info=None,
                clips=(),
                failure=FailureReason.MISSING,
                detail="",
            )
        )
        for name in names
    ]
    return put_table(str(folder), "failures", FAILURE_SCHEMA, rows)


def _names(clips):
    return [video.source.uri.rpartition("/")[2] for video in read_failures(clips)]


def test_only_the_table_that_the_record_names_is_read(tmp_path):
    tables = {name: _put_failures(tmp_path, name) for name in ("a", "b")}
    clips = factories.commit_selection(str(tmp_path), []).clips
    for name, uri in tables.items():
        changes = {"failures_uri": uri, "num_failed": 1}
        assert _names(clips.model_copy(update=changes)) == [name]
    storage.remove_file(uri)
    with pytest.raises(ShardFormatError, match="is missing"):
        read_failures(clips.model_copy(update=changes))


def test_a_record_that_names_no_table_has_the_one_beside_it(tmp_path):
    clips = factories.commit_selection(str(tmp_path), []).clips
    clips = clips.model_copy(update={"num_failed": 2})
    with pytest.raises(ShardFormatError, match="the table of failures is missing"):
        read_failures(clips)
    _put_failures(tmp_path, "a", "b")
    assert clips.failures_uri is None
    assert _names(clips) == ["a", "b"]
