import pytest

from tests import media
from ursa.errors import DataError
from ursa.ingestion import (
    commit_clips,
    ingest_video,
    notes_digest,
    plan_ingestion,
)
from ursa.sources.listing import discover_videos

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
