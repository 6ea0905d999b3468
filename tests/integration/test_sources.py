"""Sources of every local kind, ingested; and what counts as the same video."""

import io
import json
import os
import tarfile

import pytest

from tests import media
from ursa import storage
from ursa.artifacts import FailureReason, RejectReason
from ursa.config import SelectionConfig
from ursa.data.clips import read_clips, read_failures, read_selection
from ursa.errors import DataError
from ursa.ingestion import commit_clips, ingest_video, plan_ingestion, select_clips
from ursa.sources.listing import discover_videos

CONFIG = media.ingestion_config(clip_height_px=72)


def ingest(source, output, config=CONFIG):
    """Return the committed clips, and how many files were decoded for them."""
    sources = discover_videos(str(source), allow_https=config.allow_https)
    plan = plan_ingestion(str(source), sources, str(output), config)
    if plan.committed:
        return plan.committed, 0
    media_uri = output / "clips" / "media"
    started = {path: path.stat().st_mtime_ns for path in media_uri.glob("*")}
    new = [ingest_video(video, str(output), config) for video in plan.todo]
    # a clip that is made again is written again
    written = [path for path in media_uri.glob("*") if started.get(path) != path.stat().st_mtime_ns]
    clips = commit_clips(str(source), [*plan.done, *new], str(output), plan, config)
    return clips, len(written)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of one clip each."""
    folder = tmp_path_factory.mktemp("videos")
    media.save_video(folder / "a.mp4", media.panning(30, step=2, height=72, width=128), 24.0)
    media.save_video(
        folder / "b.mp4", media.panning(36, step=2, height=72, width=128, seed=5), 24.0
    )
    return folder


def data_of(videos, name):
    return (videos / name).read_bytes()


def names_of(clips):
    return [clip.source_uri.rpartition("/")[2] for clip in read_clips(clips)]


def test_a_video_is_its_content(videos, tmp_path):
    source, output = tmp_path / "in", tmp_path / "data"
    source.mkdir()
    (source / "a.mp4").write_bytes(data_of(videos, "a.mp4"))
    first, decoded = ingest(source, output)
    assert (names_of(first), decoded) == (["a.mp4"], 1)

    (source / "a.mp4").rename(source / "renamed.mp4")
    renamed, decoded = ingest(source, output)
    assert (names_of(renamed), decoded) == (["renamed.mp4"], 0)
    assert [clip.clip_id for clip in read_clips(renamed)] == [
        clip.clip_id for clip in read_clips(first)
    ]

    (source / "copy.mp4").write_bytes(data_of(videos, "a.mp4"))
    copied, decoded = ingest(source, output)
    assert (names_of(copied), decoded) == (["copy.mp4", "renamed.mp4"], 0)
    judged = read_selection(select_clips(copied, selection_config(), output_uri=str(output)))
    assert [(item.kept, item.reason) for item in judged] == [
        (True, None),
        (False, RejectReason.DUPLICATE),
    ]

    status = (source / "renamed.mp4").stat()
    (source / "renamed.mp4").write_bytes(data_of(videos, "b.mp4"))
    os.utime(source / "renamed.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    edited, decoded = ingest(source, output)
    assert (names_of(edited), decoded) == (["copy.mp4", "renamed.mp4"], 1)
    assert len({clip.clip_id for clip in read_clips(edited)}) == 2

    (source / "copy.mp4").unlink()
    removed, decoded = ingest(source, output)
    assert (names_of(removed), decoded) == (["renamed.mp4"], 0)


def selection_config():
    off = dict.fromkeys(SelectionConfig.model_fields)
    return SelectionConfig.model_validate(
        off
        | {
            "rules": [],
            "drop_duplicates": True,
            "validation_fraction": 0.0,
            "split_seed": 0,
        }
    )


def test_a_manifest_names_files_and_says_more(videos, tmp_path):
    folder = tmp_path / "lists"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.mp4").write_bytes(data_of(videos, "b.mp4"))
    os.mkfifo(folder / "pipe.mp4")
    rows = [
        {"path": str(videos / "a.mp4"), "caption": "A pan.", "caption_long": "A slow pan."},
        {"path": "sub/b.mp4", "caption": "Early.", "start_s": 0, "end_s": 0.5, "license": "CC0"},
        {"path": "sub/b.mp4", "caption": "Late.", "start_s": 0.5, "attribution": "Ann"},
        {"path": "gone.mp4", "caption": "Nothing."},
        {"path": "pipe.mp4"},
        {"path": "sub"},
        {"path": "sub/b.mp4/c.mp4"},
    ]
    manifest = folder / "list.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    clips, decoded = ingest(manifest, tmp_path / "data")
    assert decoded == 2
    assert clips.num_videos == 6
    assert clips.failures == {FailureReason.MISSING: 2, FailureReason.NOT_REGULAR_FILE: 2}
    assert {video.source.uri.rpartition("/")[2] for video in read_failures(clips)} == {
        *("gone.mp4", "pipe.mp4", "sub", "c.mp4")
    }
    by_name = {clip.source_uri.rpartition("/")[2]: clip for clip in read_clips(clips)}
    said = [
        (clip.caption, clip.caption_long, clip.caption_source, clip.license, clip.attribution)
        for clip in (by_name["a.mp4"], by_name["b.mp4"])
    ]
    assert said == [
        ("A pan.", "A slow pan.", "manifest", None, None),
        ("Late.", None, "manifest", "CC0", "Ann"),
    ]
    # the same set while the file is missing, another one when it is there
    assert ingest(manifest, tmp_path / "data") == (clips, 0)
    (folder / "gone.mp4").write_bytes(data_of(videos, "a.mp4"))
    more, decoded = ingest(manifest, tmp_path / "data")
    assert (more.num_clips, decoded) == (3, 0)


def test_another_licence_makes_another_set_from_the_same_units(videos, tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,license\n{videos}/a.mp4,CC0\n")
    first, _ = ingest(manifest, tmp_path / "data")
    manifest.write_text(f"path,license\n{videos}/a.mp4,CC-BY-4.0\n")
    second, decoded = ingest(manifest, tmp_path / "data")
    assert decoded == 0
    assert [clip.license for clip in read_clips(first) + read_clips(second)] == ["CC0", "CC-BY-4.0"]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_files_are_read_in_place(videos, tmp_path):
    source, output = tmp_path / "in", tmp_path / "data"
    source.mkdir()
    a, b = data_of(videos, "a.mp4"), data_of(videos, "b.mp4")
    notes = {"caption": "A pan.", "caption_long": "A slow pan.", "license": "CC0"}
    write_tar(
        source / "000.tar",
        {"x.mp4": a, "x.json": json.dumps(notes).encode(), "d/y.mp4": b, "d/y.txt": b"The other."},
    )
    (source / "plain.mp4").write_bytes(a)
    clips, decoded = ingest(source, output)
    assert decoded == 2  # the plain one is the first member
    rows = {clip.source_uri.removeprefix(source.as_uri() + "/"): clip for clip in read_clips(clips)}
    assert {
        name: (clip.caption, clip.caption_long, clip.caption_source, clip.license)
        for name, clip in rows.items()
    } == {
        "000.tar#d/y.mp4": ("The other.", None, "tar", None),
        "000.tar#x.mp4": ("A pan.", "A slow pan.", "tar", "CC0"),
        "plain.mp4": ("a video of plain", None, "template", None),
    }
    assert rows["000.tar#x.mp4"].clip_id == rows["plain.mp4"].clip_id
    # packed anew, with one more member and under another name
    write_tar(source / "new.tar", {"0.mp4": b"no video", "y.mp4": b, "x.mp4": a})
    (source / "000.tar").unlink()
    again, decoded = ingest(source, output)
    assert decoded == 0
    assert again.failures == {FailureReason.NOT_A_VIDEO: 1}
    assert again.num_clips == 3


def test_a_cut_tar_loses_nothing_in_silence(videos, tmp_path):
    a, b = data_of(videos, "a.mp4"), data_of(videos, "b.mp4")
    path = write_tar(tmp_path / "s.tar", {"a.mp4": a, "b.mp4": b})
    os.truncate(path, 1024 + len(a) + len(b) // 2)
    clips, _ = ingest(path, tmp_path / "data")
    assert (clips.num_videos, clips.num_clips) == (3, 1)
    failures = {video.source.uri.rpartition("/")[2]: video for video in read_failures(clips)}
    assert set(failures) == {"s.tar", "s.tar#b.mp4"}
    assert {video.failure for video in failures.values()} == {FailureReason.UNREADABLE}
    assert "cut off" in failures["s.tar#b.mp4"].detail


def test_a_member_that_changes_is_not_kept(videos, tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.mp4": data_of(videos, "a.mp4")})
    (source,) = discover_videos(str(path))
    write_tar(path, {"a.mp4": data_of(videos, "b.mp4") + bytes(len(data_of(videos, "a.mp4")))})
    video = ingest_video(source, str(tmp_path / "data"), CONFIG)
    assert video.failure is FailureReason.UNAVAILABLE
    assert not (tmp_path / "data").exists()


def test_a_large_member_is_not_copied(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.mp4": bytes(5000)})
    (source,) = discover_videos(str(path))
    config = CONFIG.model_copy(update={"max_file_bytes": 4999})
    video = ingest_video(source, str(tmp_path / "data"), config)
    assert video.failure is FailureReason.FILE_TOO_LARGE


def test_https_must_be_allowed(tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri\nhttps://127.0.0.1/a.mp4\n")
    with pytest.raises(DataError, match="allow_https is false"):
        discover_videos(str(manifest))
    (source,) = discover_videos(str(manifest), allow_https=True)
    assert source.problem is FailureReason.REFUSED
    listed = source.model_copy(update={"problem": None})
    assert ingest_video(listed, str(tmp_path / "data"), CONFIG).failure is FailureReason.REFUSED
    allowed = CONFIG.model_copy(update={"allow_https": True})
    video = ingest_video(listed, str(tmp_path / "data"), allowed)
    assert (video.failure, "not public" in video.detail) == (FailureReason.UNAVAILABLE, True)
    assert not (tmp_path / "data").exists()


def test_a_unit_does_not_depend_on_what_may_be_fetched(videos, tmp_path):
    """Switching it on decodes nothing again."""
    ingest(videos, tmp_path / "data")
    allowed = CONFIG.model_copy(update={"allow_https": True})
    clips, decoded = ingest(videos, tmp_path / "data", allowed)
    assert decoded == 0
    assert storage.exists(clips.manifest_uri)
