"""Lost clips come back from sources of every kind, or it is said why not."""

import io
import tarfile
from pathlib import Path

import pytest

from tests import media
from tests.https_server import running_https_server
from ursa import storage
from ursa.artifacts import FailureReason
from ursa.data.clips import read_clips, read_failures
from ursa.errors import DataError
from ursa.ingestion import commit_clips, ingest_video, plan_ingestion
from ursa.inspection.repair import repair_root
from ursa.sources import https
from ursa.sources.listing import discover_videos, look_up_video

CONFIG = media.ingestion_config(clip_height_px=72)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The bytes of two videos of one clip each."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        media.save_video(
            folder / f"{seed}.mp4", media.panning(30, step=2, height=72, width=128, seed=seed), 24.0
        ).read_bytes()
        for seed in range(2)
    ]


def write_tar(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def ingest(source, output, config=CONFIG):
    sources = discover_videos(source, allow_https=config.allow_https)
    plan = plan_ingestion(source, sources, output, config)
    made = [*plan.done, *(ingest_video(video, output, config) for video in plan.todo)]
    return commit_clips(source, made, output, plan, config)


def lose_clips(output):
    """Remove all clips; return what they were."""
    lost = {path: path.read_bytes() for path in Path(output, "clips", "media").iterdir()}
    for path in lost:
        path.unlink()
    return lost


def check_they_come_back(source, output, num_clips, config=CONFIG):
    clips = ingest(source, output, config)
    assert clips.num_clips == num_clips
    lost = lose_clips(output)
    assert len(lost) > 0
    report = repair_root(output)
    assert [repair.detail for repair in report.repairs if not repair.is_repaired] == []
    assert {path: path.read_bytes() for path in lost} == lost
    return clips


def test_hidden_files_hash_signs_and_names_that_are_twice(videos, tmp_path):
    source, output = tmp_path / "in #1", str(tmp_path / "data")
    (source / ".hidden").mkdir(parents=True)
    (source / ".hidden" / ".a#b.mp4").write_bytes(videos[0])
    members = (("c#d.mp4", videos[1]), ("c#d.mp4", videos[0]))
    (source / "s#1.tar#2.tar").write_bytes(write_tar(*members))
    (source / "list.csv").write_text("path\n.hidden/.a#b.mp4\ns#1.tar#2.tar\n")
    clips = check_they_come_back(str(source / "list.csv"), output, 2)
    names = [clip.source_uri.removeprefix(f"{source.as_uri()}/") for clip in read_clips(clips)]
    assert names == [".hidden/.a%23b.mp4", "s%231.tar%232.tar#c%23d.mp4"]
    (refused,) = read_failures(clips)
    assert refused.failure is FailureReason.REFUSED
    assert refused.detail == "another member of this name comes before it"
    assert refused.source.uri.startswith(f"{source.as_uri()}/s%231.tar%232.tar#c%23d.mp4%40")


def test_members_that_take_the_name_of_a_refused_one(videos, tmp_path):
    """All have their own URI, whatever names somebody has chosen."""
    first = write_tar(("a.mp4", b"1"), ("a.mp4", b"2"))
    (tmp_path / "one.tar").write_bytes(first)
    name = discover_videos(str(tmp_path / "one.tar"))[1].uri.rpartition("%40")[2]
    orders = (
        [f"a.mp4@{name}", "a.mp4", "a.mp4"],
        ["a.mp4", "a.mp4", f"a.mp4@{name}", f"a.mp4@{int(name) + 1024}"],
    )
    for number, order in enumerate(orders):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(write_tar(*((item, b"x") for item in order)))
        uris = [source.uri for source in discover_videos(str(path))]
        assert len(set(uris)) == len(uris) == len(order)


def test_https_addresses(videos, tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    output = str(tmp_path / "data")
    allowed = CONFIG.model_copy(update={"allow_https": True})
    files = {"/a.mp4?x=1": videos[0], "/b.mp4": videos[1]}
    with running_https_server(tmp_path, files) as (address, rules):
        monkeypatch.setattr(https, "RULES", rules)
        (tmp_path / "list.txt").write_text(f"{address}/a.mp4?x=1#t=3\n{address}/b.mp4\n")
        clips = check_they_come_back(str(tmp_path / "list.txt"), output, 2, allowed)
        # one is gone, the other is another video now
        del files["/a.mp4?x=1"]
        files["/b.mp4"] = videos[0]
        lose_clips(output)
        report = repair_root(output)
    left = {Path(repair.uri): repair.detail for repair in report.repairs}
    details = [left[Path(clip.media_uri)] for clip in read_clips(clips)]
    assert "is gone; put it back and try again" in details[0]
    assert "does not give it: it has changed" in details[1]
    with pytest.raises(DataError, match="allow_https is false"):
        look_up_video(f"{address}/b.mp4")


def test_objects_with_a_hash_sign(videos, tmp_path, s3_prefix):
    """Of `x.tar#y.mp4` only the store knows whether it is an object or a member."""
    output = str(tmp_path / "data")
    storage.write_bytes(f"{s3_prefix}/a#b.mp4", videos[0])
    storage.write_bytes(f"{s3_prefix}/.h.mp4", videos[1])
    storage.write_bytes(f"{s3_prefix}/x.tar#y.mp4", videos[0])
    storage.write_bytes(f"{s3_prefix}/z.tar", write_tar(("y.mp4", videos[1])))
    check_they_come_back(s3_prefix, output, 3)
    (hidden,) = look_up_video(f"{s3_prefix}/.h.mp4")
    assert hidden.problem is None
    # both at once: two files of one name
    storage.write_bytes(f"{s3_prefix}/x.tar", write_tar(("y.mp4", videos[1])))
    assert len(look_up_video(f"{s3_prefix}/x.tar#y.mp4")) == 2
    with pytest.raises(DataError, match=r"two files of the URI .*/x\.tar#y\.mp4.*rename one"):
        discover_videos(s3_prefix)
    lost = lose_clips(output)
    assert repair_root(output).num_left == 0
    assert {path: path.read_bytes() for path in lost} == lost


def test_an_object_prefix_has_one_spelling(s3_prefix):
    """What `storage.absolute_uri` takes for the same is the same for the store."""
    storage.write_bytes(f"{s3_prefix}/videos/a.mp4", b"x")
    bucket, _, key = s3_prefix.removeprefix("s3://").partition("/")
    for spelling in (f"s3://{bucket}//{key}/videos", f"{s3_prefix}/videos/", f"{s3_prefix}/videos"):
        assert storage.absolute_uri(spelling) == f"{s3_prefix}/videos"
        assert [item.uri for item in discover_videos(spelling)] == [f"{s3_prefix}/videos/a.mp4"]
