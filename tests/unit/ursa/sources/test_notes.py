import json
import logging
import os
import tarfile

import pytest

from tests import factories
from ursa.artifacts import VideoInfo
from ursa.sources.listing import discover_videos
from ursa.sources.notes import SourceNotes

INFO = VideoInfo(width_px=64, height_px=48, fps=8.0, num_frames=16, duration_s=2.0, codec="h264")


@pytest.fixture
def said_of(tmp_path):
    """Return what a clip of each video of a source is given: caption, its source, licence."""

    def said_of(source_uri):
        sources = discover_videos(str(source_uri))
        notes = SourceNotes.read(str(source_uri), sources)
        clip = factories.clip_of(_small_file(tmp_path / "clip"), caption="none", info=INFO)
        clips = [
            notes.applied_to(clip.model_copy(update={"source_uri": item.uri})) for item in sources
        ]
        return {
            clip.source_uri.rpartition("/")[2]: (clip.caption, clip.caption_source, clip.license)
            for clip in clips
        }

    return said_of


def _small_file(path):
    path.write_bytes(b"clip")
    return path


def _raw(folder, name, data):
    with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123
        file.write(data)


def test_names_that_are_no_utf8_are_told_apart(tmp_path, said_of):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in (b"v_\xe8.mp4", b"v_\xe9.mp4", b"v_\xea.mp4"):
        _raw(folder, name, name)
    _raw(folder, b"v_\xe8.json", b'{"caption": "eight", "license": "CC0"}')
    _raw(folder, b"captions.jsonl", b'{"path": "v_\xe9.mp4", "caption": "nine"}')
    assert said_of(folder) == {
        "v_%E8.mp4": ("eight", "sidecar", "CC0"),
        "v_%E9.mp4": ("nine", "manifest", None),
        "v_%EA.mp4": ("a video of v", "template", None),
    }


def test_a_caption_file_that_is_too_large_is_named(tmp_path, said_of, caplog):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "red bus.mp4").write_bytes(b"video")
    (folder / "captions.jsonl").touch()
    os.truncate(folder / "captions.jsonl", (256 << 20) + 1)
    assert said_of(folder) == {"red%20bus.mp4": ("a video of red bus", "template", None)}
    assert "captions.jsonl is left out: 268435457 bytes, expected at most 268435456" in caplog.text


def test_members_whose_names_are_no_utf8_have_their_own_texts(tmp_path, said_of):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("è.mp4", b"a"), ("è.txt", b"eight"), ("é.mp4", b"b"), ("é.txt", b"9")):
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", arcname=name)
    assert said_of(path) == {
        "x.tar#%E8.mp4": ("eight", "tar", None),
        "x.tar#%E9.mp4": ("9", "tar", None),
    }


def test_a_caption_file_names_videos_as_a_manifest_does(tmp_path, said_of, caplog):
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name in ("A.mp4", "B.mp4", "C.mp4", "sub/D.mp4"):
        (folder / name).write_bytes(name.encode())
    rows = [
        {"uri": "A.mp4", "caption": "a"},
        {"path": "./B.mp4", "caption": "b"},
        {"path": str(folder / "C.mp4"), "caption": "c"},
        {"path": (folder / "sub" / "D.mp4").as_uri(), "caption": "d"},
        {"path": "../videos-2/A.mp4", "caption": "leads out"},
        {"path": "\ud800", "caption": "no file can have this name"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {name: said[:2] for name, said in said_of(folder).items()} == {
        "A.mp4": ("a", "manifest"),
        "B.mp4": ("b", "manifest"),
        "C.mp4": ("c", "manifest"),
        "D.mp4": ("d", "manifest"),
    }
    sources = discover_videos(str(folder))
    with caplog.at_level(logging.WARNING, "ursa"):
        SourceNotes.read(str(folder), sources).warn_about_unused_rows()
    assert "2 rows for files that are no videos of this source" in caplog.text


def test_the_texts_beside_a_single_file_are_read(tmp_path, said_of):
    for name in ("A.mp4", "B.mp4", "C.mp4", "D" * 251 + ".mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "B.txt").write_text("beside")
    rows = [{"path": name, "caption": name, "license": "CC0"} for name in ("A.mp4", "C.mp4")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert said_of(tmp_path / "B.mp4") == {"B.mp4": ("beside", "sidecar", None)}
    assert said_of(tmp_path / "C.mp4") == {"C.mp4": ("C.mp4", "manifest", "CC0")}
    # the name of a text beside it would be too long
    ((_, source, _),) = said_of(tmp_path / ("D" * 251 + ".mp4")).values()
    assert source == "template"


def test_the_caption_file_beside_a_tar_file_names_its_members(tmp_path, said_of):
    (tmp_path / "member").write_bytes(b"a")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "member", arcname="a.mp4")
    (tmp_path / "captions.jsonl").write_text('{"path": "x.tar#a.mp4", "caption": "a"}')
    expected = {"x.tar#a.mp4": ("a", "manifest", None)}
    (tmp_path / "member").unlink()
    assert said_of(tmp_path / "x.tar") == expected
