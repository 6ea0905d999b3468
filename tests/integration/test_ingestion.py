"""From a directory of foreign videos to selected clips, each decoded in a process of its own."""

import json
import logging
import os

import pytest

from tests import media
from ursa import storage
from ursa.artifacts import FailureReason, RejectReason
from ursa.config import SelectionConfig
from ursa.data.clips import read_clips, read_failures, read_selection
from ursa.errors import DataError, FailureBudgetExceeded, ShardFormatError, StorageError
from ursa.ingestion import (
    commit_clips,
    has_unstable_failures,
    ingest_video,
    plan_ingestion,
    select_clips,
)
from ursa.sources.listing import discover_videos
from ursa.video import fork_server

CONFIG = media.ingestion_config(clip_height_px=72)


def ingest(source, output, config=CONFIG):
    sources = discover_videos(str(source))
    plan = plan_ingestion(str(source), sources, str(output), config)
    if plan.committed:
        return plan.committed
    videos = [*plan.done, *(ingest_video(video, str(output), config) for video in plan.todo)]
    return commit_clips(str(source), videos, str(output), plan, config)


def selection_config(**changes):
    values = dict.fromkeys(SelectionConfig.model_fields) | {
        "min_motion_px_per_s": 2.0,
        "max_motion_px_per_s": None,
        "min_sharpness": None,
        "min_luminance": None,
        "max_luminance": None,
        "max_black_border_fraction": None,
        "rules": [],
        "drop_duplicates": True,
        "validation_fraction": 0.4,
        "split_seed": 0,
    }
    return SelectionConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """A source with good and bad files, and what became of it."""
    root = tmp_path_factory.mktemp("ingested")
    source, output = root / "source", root / "data"
    (source / "sub dir").mkdir(parents=True)
    frames = media.panning(36, step=2, height=72, width=128)
    media.save_video(source / "pan_One.mp4", frames, 24.0)
    (source / "pan two.mp4").write_bytes((source / "pan_One.mp4").read_bytes())
    media.save_video(
        source / "sub dir" / "-x\n#1%20?.mkv", media.panning(60, step=1, seed=5, height=72), 24.0
    )
    media.save_video(source / "still.mp4", media.still(36, height=72), 24.0)
    # a name that is no UTF-8, and content that is a copy of another file's
    strange = os.fsencode(source) + b"/latin1_\xe9.mp4"
    with open(strange, "wb") as file:  # noqa: PTH123
        file.write((source / "still.mp4").read_bytes())
    (source / "page.mp4").write_text("<html>")
    (source / "empty.mp4").touch()
    os.mkfifo(source / "fifo.mp4")
    (source / "readme.txt").write_text("not a video")
    (source / "still.txt").write_text(" A pattern\nthat does not move.\n")
    (source / ".hidden.mp4").write_bytes(b"x")
    (source / "loop").symlink_to(source)
    (source / "link.mp4").symlink_to(source / "still.mp4")
    rows = [
        {"path": "sub dir/-x\n#1%20?.mkv", "caption": "A slow pan.", "start_s": 0, "end_s": 9},
        {"path": "gone.mp4", "caption": "Nothing."},
    ]
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return source, output, ingest(source, output)


def test_every_file_is_clips_or_a_failure(ingested):
    source, _, clips = ingested
    sources = discover_videos(str(source))
    assert clips.num_videos == len(sources) == 10
    assert clips.failures == {
        FailureReason.EMPTY_FILE: 1,
        FailureReason.NOT_A_VIDEO: 1,
        FailureReason.NOT_REGULAR_FILE: 3,  # a pipe, a link to a file, a link to a directory
    }
    assert len(read_failures(clips)) == 5
    rows = read_clips(clips)
    assert len(rows) == clips.num_clips == 5
    assert len({clip.source_uri for clip in rows}) + clips.num_failed == clips.num_videos
    for clip in rows:
        assert storage.sha256_file(storage.local_path(clip.media_uri)) == clip.media_sha256


def test_captions_come_from_manifest_sidecar_or_name(ingested):
    _, _, clips = ingested
    captions = {
        clip.source_uri.rsplit("/", 1)[-1]: (clip.caption, clip.caption_source)
        for clip in read_clips(clips)
    }
    assert captions == {
        "pan_One.mp4": ("a video of pan one", "template"),
        "pan%20two.mp4": ("a video of pan two", "template"),
        "-x%0A%231%2520%3F.mkv": ("A slow pan.", "manifest"),
        "still.mp4": ("A pattern that does not move.", "sidecar"),
        "latin1_%E9.mp4": ("a video of latin 1", "template"),
    }


def test_nothing_is_done_twice(ingested):
    source, output, clips = ingested
    sources = discover_videos(str(source))
    plan = plan_ingestion(str(source), sources, str(output), CONFIG)
    assert plan.committed == clips
    assert ingest(source, output) == clips


def test_changed_captions_make_another_set_from_the_same_units(ingested, caplog):
    source, output, clips = ingested
    sidecar = source / "pan_One.txt"
    sidecar.write_text("A pattern that moves.")
    try:
        sources = discover_videos(str(source))
        plan = plan_ingestion(str(source), sources, str(output), CONFIG)
        assert plan.committed is None
        assert plan.fingerprint != clips.fingerprint
        assert plan.todo == ()
        with caplog.at_level(logging.WARNING, "ursa"):
            other = commit_clips(str(source), plan.done, str(output), plan, CONFIG)
        assert "gone.mp4" in caplog.text
    finally:
        sidecar.unlink()
    texts = {clip.caption for clip in read_clips(other)}
    assert "A pattern that moves." in texts


def test_selection_judges_every_clip_and_splits_by_source(ingested):
    _, output, clips = ingested
    selection = select_clips(clips, selection_config(), output_uri=str(output))
    selected = read_selection(selection)
    assert [item.clip for item in selected] == read_clips(clips)
    assert selection.rejections == {RejectReason.TOO_STATIC: 2, RejectReason.DUPLICATE: 1}
    assert selection.num_kept + sum(selection.rejections.values()) == clips.num_clips
    assert (selection.num_train, selection.num_validation) == (1, 1)
    splits = {}
    for item in selected:
        assert item.kept == (item.reason is None) == (item.split is not None)
        if item.kept:
            splits.setdefault(item.clip.source_sha256, set()).add(item.split)
    assert all(len(split) == 1 for split in splits.values())
    again = select_clips(clips, selection_config(), output_uri=str(output))
    assert again == selection


def test_selection_that_keeps_nothing_says_why(ingested):
    _, output, clips = ingested
    config = selection_config(min_motion_px_per_s=1e6)
    with pytest.raises(DataError, match="5 too_static"):
        select_clips(clips, config, output_uri=str(output))


def test_damaged_table_is_refused(ingested, tmp_path):
    _, _, clips = ingested
    data = bytearray(storage.read_bytes(clips.clips_uri))
    data[len(data) // 2] ^= 1
    path = tmp_path / clips.clips_uri.rsplit("/", 1)[-1]
    path.write_bytes(data)
    with pytest.raises(ShardFormatError, match="damaged"):
        read_clips(clips.model_copy(update={"clips_uri": str(path)}))
    with pytest.raises(ShardFormatError, match="missing"):
        read_clips(clips.model_copy(update={"clips_uri": str(tmp_path / "none.parquet")}))
    with pytest.raises(ShardFormatError, match="expected 4"):
        read_clips(clips.model_copy(update={"num_clips": 4}))


def test_too_many_failures_stop_the_run(ingested, tmp_path):
    source, output, _ = ingested
    config = CONFIG.model_copy(update={"max_failed_fraction": 0.3})
    with pytest.raises(FailureBudgetExceeded, match=r"5 of 10 files.*3 not_regular_file"):
        ingest(source, output, config)


def test_single_file_is_a_source(tmp_path):
    path = media.save_video(tmp_path / "a b.mp4", media.panning(30, step=2, height=72), 24.0)
    clips = ingest(path, tmp_path / "data")
    assert (clips.num_videos, clips.num_clips) == (1, 1)
    assert read_clips(clips)[0].caption == "a video of a b"


def test_file_that_changes_or_goes_is_a_failure_that_is_not_kept(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    (source,) = discover_videos(str(tmp_path))
    original = path.read_bytes()
    path.write_bytes(original + b"\x00\x00\x00\x08free")
    data = str(tmp_path / "data")
    changed = ingest_video(source, data, CONFIG)
    assert changed.failure is FailureReason.UNAVAILABLE
    assert "changed" in changed.detail
    path.rename(tmp_path / "elsewhere")
    gone = ingest_video(source, data, CONFIG)
    assert gone.failure is FailureReason.UNAVAILABLE
    (tmp_path / "elsewhere").rename(path)
    path.write_bytes(original)
    assert plan_ingestion(str(tmp_path), [source], data, CONFIG).todo == (source,)
    assert ingest_video(source, data, CONFIG).failure is None


def test_a_set_without_files_that_failed_for_now_is_not_final(tmp_path):
    media.save_video(tmp_path / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    root, data = str(tmp_path), str(tmp_path / "data")
    (source,) = discover_videos(root)
    plan = plan_ingestion(root, [source], data, CONFIG)
    video = ingest_video(source, data, CONFIG)
    other = video.model_copy(update={"clips": (), "failure": FailureReason.OUT_OF_MEMORY})
    config = CONFIG.model_copy(update={"max_failed_fraction": 0.9})
    torn = commit_clips(root, [video, other], data, plan, config)
    assert has_unstable_failures(torn)
    bad = video.model_copy(update={"clips": (), "failure": FailureReason.NOT_A_VIDEO})
    assert not has_unstable_failures(
        commit_clips(root, [video, bad], data, plan._replace(fingerprint="f" * 64), config)
    )


def test_captions_are_those_of_the_plan(tmp_path):
    """What is edited while files are ingested belongs to the next plan."""
    source = tmp_path / "in"
    source.mkdir()
    media.save_video(source / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    (source / "a.txt").write_text("before")
    root, data = str(source), str(tmp_path / "data")
    sources = discover_videos(root)
    plan = plan_ingestion(root, sources, data, CONFIG)
    videos = [ingest_video(video, data, CONFIG) for video in plan.todo]
    (source / "a.txt").unlink()
    (clip,) = read_clips(commit_clips(root, videos, data, plan, CONFIG))
    assert (clip.caption, clip.caption_source) == ("before", "sidecar")
    after = plan_ingestion(root, sources, data, CONFIG)
    assert (after.committed, after.todo) == (None, ())
    (clip,) = read_clips(commit_clips(root, after.done, data, after, CONFIG))
    assert clip.caption_source == "template"


def test_timeout_is_not_kept_as_done(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "_POLL_S", 0.01)
    media.save_video(tmp_path / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    (source,) = discover_videos(str(tmp_path))
    hasty = CONFIG.model_copy(update={"child_timeout_s": 0.001})
    data = str(tmp_path / "data")
    assert ingest_video(source, data, hasty).failure is FailureReason.TIMEOUT
    plan = plan_ingestion(str(tmp_path), [source], data, hasty)
    assert plan.todo == (source,)


def test_set_without_a_file_that_timed_out_is_not_the_last_word(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mp4"):
        video = media.panning(30 + 6 * (name == "b.mp4"), step=2, height=72)
        media.save_video(tmp_path / "in" / name, video, 24.0)
    root, data = str(tmp_path / "in"), str(tmp_path / "data")
    sources = discover_videos(root)
    plan = plan_ingestion(root, sources, data, CONFIG)
    good, other = (ingest_video(source, data, CONFIG) for source in sources)
    hurried = other.model_copy(update={"clips": (), "failure": FailureReason.TIMEOUT})
    config = CONFIG.model_copy(update={"max_failed_fraction": 0.9})
    first = commit_clips(root, [good, hurried], data, plan, config)
    again = plan_ingestion(root, sources, data, CONFIG)
    assert again.committed is None
    second = commit_clips(root, again.done, data, again, config)
    assert (first.num_failed, second.num_failed) == (1, 0)
    assert first.fingerprint != second.fingerprint


def test_store_that_cannot_be_written_is_no_failure_of_the_file(tmp_path):
    media.save_video(tmp_path / "a.mp4", media.panning(30, step=2, height=72), 24.0)
    (source,) = discover_videos(str(tmp_path))
    (tmp_path / "data").write_text("a file where a directory should be")
    with pytest.raises((StorageError, FileExistsError)):
        ingest_video(source, str(tmp_path / "data"), CONFIG)
