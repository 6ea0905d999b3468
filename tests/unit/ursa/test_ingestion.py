import gc
import io
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import many_clips, media
from ursa import ingestion, storage
from ursa.artifacts import FailureReason, SourceVideo
from ursa.data.clips import CLIP_SCHEMA, clip_row, read_failures
from ursa.errors import DataError, ManifestError
from ursa.ingestion import (
    DoneVideos,
    IngestPlan,
    commit_clips,
    ingest_video,
    notes_digest,
    plan_ingestion,
    select_clips,
)
from ursa.sources.listing import discover_videos
from ursa.sources.notes import SourceNotes

CONFIG = media.ingestion_config(clip_height_px=72)


def test_source_without_clips_is_an_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "page.mp4").write_text("<html>")
    data = str(tmp_path / "data")
    plan = plan_ingestion(str(source), discover_videos(str(source)), data, CONFIG)
    videos = [ingest_video(video, data, CONFIG) for video in plan.todo]
    with pytest.raises(DataError, match=r"no clip in 1 files.*1 not_a_video"):
        commit_clips(str(source), videos, data, plan, CONFIG)


def test_missing_or_empty_source_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        discover_videos(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no files"):
        discover_videos(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds 1 files, but none"):
        discover_videos(str(tmp_path))


def test_captions_belong_to_the_source(tmp_path):
    media.save_video(tmp_path / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    sources = discover_videos(str(tmp_path))
    without = notes_digest(str(tmp_path), sources)
    (tmp_path / "a.txt").write_text("a moving texture")
    assert discover_videos(str(tmp_path)) == sources
    assert notes_digest(str(tmp_path), sources) != without


def test_units_of_objects_are_of_one_name_and_size():
    """Stores may say the same etag of two objects, or none; only the content joins them."""
    same = "00000000000000000000000000000000-1"
    sources = [
        SourceVideo(uri=f"s3://b/{name}.mp4", num_bytes=num_bytes, etag=etag)
        for name, num_bytes, etag in (
            *(("a", 1, same), ("b", 1, same), ("a", 2, same)),
            *(("a", 1, f"{'d' * 32}-2"), ("a", 1, f"{'d' * 32}-3"), ("a", 1, ""), ("a", 2, "")),
            *(("a", 1, "e" * 64), ("b", 1, "e" * 64)),
        )
    ]
    names = [ingestion._unit_name(source) for source in sources]
    assert len(set(names)) == len(names)
    local = SourceVideo(uri="file:///a.mp4", num_bytes=1, etag="e" * 64)
    moved = local.model_copy(update={"uri": "file:///b.mp4"})
    assert ingestion._unit_name(local) == ingestion._unit_name(moved)


def test_tables_do_not_depend_on_the_order_of_the_results(tmp_path):
    """What is committed has the bytes of a table of all clips in the order of their files."""
    data, names = str(tmp_path / "data"), [f"{place:02}.mp4" for place in range(40)]
    videos = [
        many_clips.video_of(Path(f"/source/{name}"), data, place, place % 4)
        for place, name in enumerate(names)
    ]
    failed = videos[7].model_copy(update={"clips": (), "failure": FailureReason.UNREADABLE})
    videos[7] = failed
    notes = SourceNotes([video.source for video in videos])
    plan = IngestPlan(None, DoneVideos(), (), "f" * 64, notes)
    rows = [clip_row(notes.applied_to(clip)) for video in videos for clip in video.clips]
    random.Random(0).shuffle(videos)
    clips = commit_clips("file:///source", iter(videos), data, plan, CONFIG)
    whole = pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd")
    assert storage.read_bytes(clips.clips_uri) == buffer.getvalue()
    assert (clips.num_videos, clips.num_failed, clips.num_clips) == (40, 1, len(rows))
    assert [video.source for video in read_failures(clips)] == [failed.source]


def test_a_unit_that_has_gone_since_the_plan_is_named(tmp_path):
    source, data = tmp_path / "source", str(tmp_path / "data")
    many_clips.write_videos(source, data, 3)
    sources = discover_videos(str(source))
    plan = plan_ingestion(str(source), sources, data, many_clips.config())
    assert (len(plan.done), plan.todo) == (3, ())
    assert [video.source for video in plan.done] == list(sources)
    (gone, *_) = sorted((tmp_path / "data" / "clips" / "units").rglob("*.json"))
    gone.unlink()
    with pytest.raises(ManifestError, match=rf"{gone.name} is gone since this run began"):
        commit_clips(str(source), plan.done, data, plan, many_clips.config())
    assert len(plan_ingestion(str(source), sources, data, many_clips.config()).todo) == 1


def test_memory_does_not_grow_by_clips_as_objects(tmp_path):
    _peaks(8, str(tmp_path / "first"))  # imports, and what is held once
    peaks = [_peaks(number, str(tmp_path / str(number))) for number in (2048, 4096)]
    commit, select = ((large - small) / 2048 for small, large in zip(*peaks, strict=True))
    # a clip as objects has 5,000; the search for footage takes some times its hashes of 320
    # and of 128 beside borders
    assert commit < 1000, commit
    assert select < 4500, select


def _peaks(number: int, data: str) -> list[int]:
    """Return the peaks of committing and of selecting, bytes over what is held before."""
    paths = [Path(f"/source/{place:06}.mp4") for place in range(number // 8)]

    def videos():
        for place, path in enumerate(paths):
            yield many_clips.video_of(path, data, place, 8)

    notes = SourceNotes(
        [many_clips.video_of(path, data, place, 0).source for place, path in enumerate(paths)]
    )
    plan = IngestPlan(None, DoneVideos(), (), "f" * 64, notes)
    peaks = []
    tracemalloc.start()
    try:
        clips = commit_clips("file:///", videos(), data, plan, CONFIG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        found = select_clips(clips, many_clips.CONFIG.selection, output_uri=data)
        assert found.num_kept == number
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return peaks
