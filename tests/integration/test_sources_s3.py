"""Sources in an object store: manifests, tar files, and what counts as the same video."""

import io
import json
import tarfile

import pytest

from tests import media
from ursa import ingestion, storage
from ursa.artifacts import FailureReason
from ursa.data.clips import read_clips
from ursa.ingestion import commit_clips, ingest_video, plan_ingestion
from ursa.sources import listing
from ursa.sources.listing import discover_videos

pytest.importorskip("moto.server")

CONFIG = media.ingestion_config(clip_height_px=72)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    media.save_video(folder / "a.mp4", media.panning(30, step=2, height=72, width=128), 24.0)
    media.save_video(
        folder / "b.mp4", media.panning(36, step=2, height=72, width=128, seed=5), 24.0
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """Demuxers of the files that were decoded."""
    calls = []

    def normalise(folder, demuxer, config):
        calls.append(demuxer)
        return original(folder, demuxer, config)

    original = ingestion.normalise_video
    monkeypatch.setattr(ingestion, "normalise_video", normalise)
    return calls


def ingest(source_uri, output):
    sources = discover_videos(source_uri)
    plan = plan_ingestion(source_uri, sources, str(output), CONFIG)
    new = [ingest_video(video, str(output), CONFIG) for video in plan.todo]
    return commit_clips(source_uri, [*plan.done, *new], str(output), plan, CONFIG)


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(prefix, **objects):
    for name, data in objects.items():
        storage.write_bytes(storage.join(prefix, name.replace("_", ".")), data)


def test_an_object_is_its_content(s3_prefix, videos, decoded, tmp_path):
    put(s3_prefix, a_mp4=videos["a.mp4"])
    first = ingest(s3_prefix, tmp_path)
    assert len(decoded) == 1
    # under another name, and with an etag that is not that of the content
    storage.remove_file(f"{s3_prefix}/a.mp4")
    multipart(f"{s3_prefix}/d/renamed.mp4", videos["a.mp4"])
    put(s3_prefix, b_mp4=videos["b.mp4"])
    second = ingest(s3_prefix, tmp_path)
    assert len(decoded) == 2
    clip, _ = read_clips(second)[::-1]
    assert clip.source_uri == f"{s3_prefix}/d/renamed.mp4"
    assert clip.clip_id == read_clips(first)[0].clip_id
    # the next run knows the new etag and does not even fetch it
    sources = discover_videos(s3_prefix)
    assert plan_ingestion(s3_prefix, sources[:1], str(tmp_path), CONFIG).todo == ()


def multipart(uri, data):
    import boto3

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=data)
    client.complete_multipart_upload(
        Bucket=bucket,
        Key=key,
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )


@pytest.mark.parametrize("size", [10, 100_000])
def test_an_object_that_changes_is_not_kept(s3_prefix, videos, tmp_path, size):
    put(s3_prefix, a_mp4=videos["a.mp4"])
    (source,) = discover_videos(s3_prefix)
    put(s3_prefix, a_mp4=videos["b.mp4"][:size])
    video = ingest_video(source, str(tmp_path / "data"), CONFIG)
    assert (video.failure, video.detail) == (
        FailureReason.UNAVAILABLE,
        "it has changed since it was listed",
    )
    assert not (tmp_path / "data").exists()


def test_tar_files_are_read_in_place(s3_prefix, videos, decoded, tmp_path):
    notes = json.dumps({"caption": "A pan.", "license": "CC0"}).encode()
    filler = {f"{i:02d}.txt": b"x" * 9000 for i in range(60)}  # more than is read at once
    tar = tar_of({"a.mp4": videos["a.mp4"], "a.json": notes, **filler, "b.mp4": videos["b.mp4"]})
    put(s3_prefix, s_tar=tar[:-1024], page_mp4=b"<html>")
    clips = ingest(s3_prefix, tmp_path)
    assert clips.failures == {FailureReason.NOT_A_VIDEO: 1}
    said = {
        clip.source_uri.removeprefix(s3_prefix): (clip.caption, clip.license)
        for clip in read_clips(clips)
    }
    assert said == {
        "/s.tar#a.mp4": ("A pan.", "CC0"),
        "/s.tar#b.mp4": ("a video of b", None),
    }
    assert len(decoded) == 2
    # another tar file with the same members: fetched, not decoded
    put(s3_prefix, t_tar=tar_of({"z.mp4": videos["b.mp4"]}))
    assert ingest(s3_prefix, tmp_path).num_clips == 3
    assert len(decoded) == 2


@pytest.mark.parametrize("max_single_lookups", [0, 100])
def test_a_manifest_in_the_store(
    s3_prefix, videos, decoded, tmp_path, monkeypatch, max_single_lookups
):
    monkeypatch.setattr(listing, "_MAX_SINGLE_LOOKUPS", max_single_lookups)
    put(s3_prefix, a_mp4=videos["a.mp4"], s_tar=tar_of({"b.mp4": videos["b.mp4"]}))
    rows = [
        {"path": "a.mp4", "caption": "A pan."},
        {"uri": f"{s3_prefix}/s.tar", "licence": "CC0"},
        {"path": "gone.mp4"},
        {"path": "none/gone.mp4"},
    ]
    put(s3_prefix, list_jsonl="\n".join(map(json.dumps, rows)).encode())
    clips = ingest(f"{s3_prefix}/list.jsonl", tmp_path)
    assert clips.failures == {FailureReason.MISSING: 2}
    assert [(clip.caption, clip.license) for clip in read_clips(clips)] == [
        ("A pan.", None),
        ("a video of b", "CC0"),
    ]
