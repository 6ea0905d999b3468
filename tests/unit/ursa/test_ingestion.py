import random
import tracemalloc

import pytest

from tests import media
from ursa.artifacts import Clip, ClipScores, IngestedVideo, SourceVideo, VideoInfo
from ursa.config import load_config
from ursa.errors import DataError
from ursa.ingestion import (
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


def test_memory_does_not_grow_by_clips_as_objects(tmp_path):
    _peaks(8, str(tmp_path / "first"))  # imports, and what is held once
    peaks = [_peaks(number, str(tmp_path / str(number))) for number in (2048, 4096)]
    bytes_a_clip = [(large - small) / 2048 for small, large in zip(*peaks, strict=True)]
    # a clip as objects has 5,000; the search for footage takes some times its hashes of 320
    assert bytes_a_clip[0] < 1000, bytes_a_clip
    assert bytes_a_clip[1] < 4000, bytes_a_clip


def _peaks(number: int, data: str) -> list[int]:
    """Return the peaks of committing and of selecting, bytes over what is held before."""
    hashes = random.Random(0)
    scores = dict.fromkeys(ClipScores.model_fields, 0.1)
    scores |= {"motion_px_per_s": 10.0, "sharpness": 50.0, "luminance": 100.0, "distinct_fps": 24.0}
    info = VideoInfo(
        width_px=320, height_px=180, fps=24.0, num_frames=120, duration_s=5.0, codec="h264"
    )
    videos = []
    for place in range(0, number, 8):
        source = SourceVideo(uri=f"file:///{place:06}.mp4", num_bytes=1, etag=str(place))
        clips = [
            Clip(
                clip_id=f"{place + i:032x}",
                source_uri=source.uri,
                source_sha256=f"{place:064x}",
                start_s=i * 5.0,
                end_s=i * 5.0 + 5,
                media_uri=f"{data}/clips/media/{place + i:032x}.mp4",
                media_sha256=f"{place + i:064x}",
                info=info,
                scores=ClipScores(
                    **scores
                    | {
                        "perceptual_hash": f"{hashes.getrandbits(576):0144x}",
                        "frame_hashes": hashes.randbytes(8 * 40),
                    }
                ),
            )
            for i in range(8)
        ]
        videos.append(
            IngestedVideo(
                source=source,
                source_sha256=f"{place:064x}",
                info=info,
                clips=tuple(clips),
                failure=None,
                detail="",
            )
        )
    plan = IngestPlan(None, (), (), "f" * 64, SourceNotes([video.source for video in videos]))
    selection = load_config("tiny", {}).selection
    peaks = []
    tracemalloc.start()
    try:
        clips = commit_clips("file:///", videos, data, plan, CONFIG)
        peaks.append(tracemalloc.get_traced_memory()[1])
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert select_clips(clips, selection, output_uri=data).num_kept == number
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return peaks
