"""Hostile and damaged files against the limits of the decoding process."""

import contextlib
import ctypes
import json
import os
import struct
import subprocess
import sys
import time

import pytest

from tests import media
from ursa.artifacts import FailureReason
from ursa.config import load_config
from ursa.data.clips import read_clips
from ursa.ingestion import commit_clips, ingest_video, plan_ingestion
from ursa.sources.listing import discover_videos
from ursa.video.probe import QuarantinedError, copy_foreign_file, normalise_video

LIMIT_S = 20.0


def quarantine(path, folder, **changes):
    """Return the reason, which is found within the time limit."""
    config = media.ingestion_config(**changes)
    folder.mkdir()
    start_s = time.monotonic()
    _, demuxer = copy_foreign_file(path, folder, config)
    with pytest.raises(QuarantinedError) as caught:
        normalise_video(folder, demuxer, config)
    assert time.monotonic() - start_s < LIMIT_S
    return caught.value.reason


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A small file with 16 pictures of 67 million pixels each."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.mp4"
    media.save_bomb(path, side=8192, num_frames=16)
    assert path.stat().st_size < 4_000_000
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, FailureReason.RESOLUTION_TOO_HIGH),
        ({"max_side_px": 8192, "pixel_budget": 400_000_000}, FailureReason.PIXEL_BUDGET),
        (
            {"max_side_px": 8192, "child_memory_bytes": 600 << 20},
            FailureReason.OUT_OF_MEMORY,
        ),
        ({"max_side_px": 8192, "child_timeout_s": 0.3}, FailureReason.TIMEOUT),
        ({"max_side_px": 8192, "child_cpu_s": 1}, FailureReason.TIMEOUT),
    ],
)
def test_decompression_bomb_is_stopped_by_each_limit(bomb, tmp_path, changes, reason):
    assert quarantine(bomb, tmp_path / "work", **changes) is reason


def test_header_that_lies_about_the_size_allocates_nothing(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.panning(48, step=1), 24.0)
    data = bytearray(path.read_bytes())
    place = data.index(b"avc1", data.index(b"stsd")) + 28
    assert int.from_bytes(data[place : place + 2], "big") == 256
    data[place : place + 4] = b"\xea\x60\xea\x60"
    place = data.index(b"tkhd") + 4 + 40 + 36
    data[place : place + 8] = b"\xea\x60\0\0\xea\x60\0\0"
    path.write_bytes(data)
    config = media.ingestion_config(child_memory_bytes=1 << 30)
    (source,) = discover_videos(str(path))
    video = ingest_video(source, str(tmp_path / "data"), config)
    if video.info is None:
        assert video.failure in (FailureReason.RESOLUTION_TOO_HIGH, FailureReason.TOO_SHORT)
    else:
        assert (video.info.width_px, video.info.height_px) == (256, 144)


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_always_ends_as_clips_or_a_reason(tmp_path, seed):
    import numpy as np

    random = np.random.default_rng(seed)
    suffix = (".mp4", ".mkv", ".ts", ".avi")[seed % 4]
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    frames = media.panning(48, step=2, height=96, width=128)
    path = media.save_video(tmp_path / f"a{suffix}", frames, 24.0, codec=codec)
    data = bytearray(path.read_bytes())
    for place in random.integers(16, len(data), 200):
        data[place] = random.integers(0, 256)
    path.write_bytes(data[: random.integers(len(data) // 2, len(data))])
    config = media.ingestion_config()
    (source,) = discover_videos(str(path))
    video = ingest_video(source, str(tmp_path / "data"), config)
    assert (video.failure is None) == bool(video.clips)
    assert video.failure is not FailureReason.CRASHED


@contextlib.contextmanager
def opened_below(folder):
    """Names of files of a folder and of its folders that any process opens meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        assert libc.inotify_add_watch(watch, os.fsencode(place), 0x20) >= 0, "IN_OPEN"
    names = set()
    try:
        yield names
        while True:
            with contextlib.suppress(BlockingIOError):
                data = os.read(watch, 1 << 16)
                while data:
                    length = struct.unpack_from("iIII", data)[3]
                    names.add(os.fsdecode(data[16 : 16 + length].rstrip(b"\0")))
                    data = data[16 + length :]
                continue
            break
    finally:
        os.close(watch)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_playlists_do_not_reach_other_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    secret = media.save_video(tmp_path / "secret.mp4", media.panning(48, step=2), 24.0)
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"
    playlists = {
        "hls.mp4": hls,
        "hls_url.mp4": hls.replace(str(secret), f"file://{secret}"),
        "hls_late.mp4": f"\n \n{hls}",
        "hls_marked.mp4": f"\ufeff{hls}",
        "hls_key.mkv": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{secret}"\n#EXTINF:2,\nx\n',
        "concat.mkv": f"ffconcat version 1.0\nfile '{secret}'\n",
        "concat.mp4": f"ffconcat version 1.0\nfile 'concat:{secret}|{secret}'\n",
        "protocol.webm": f"concat:{secret}|{secret}",
        "subfile.mp4": f"subfile,,start,0,end,0,,:{secret}",
        "data.mp4": f"data:video/mp4;base64,AAAAIGZ0eXBpc29t\n{secret}",
        "dash.mp4": f"<?xml version='1.0'?><MPD><BaseURL>file://{secret}</BaseURL></MPD>",
        "smil.mov": f"<smil><body><video src='{secret}'/></body></smil>",
        "pls.avi": f"[playlist]\nFile1={secret}\nNumberOfEntries=1\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "url.mp4": "http://127.0.0.1:9/video.mp4",
        "path.mp4": str(secret),
    }
    for name, text in playlists.items():
        (source / name).write_text(text, "utf-8")
    wide = hls.encode("utf-16")
    (source / "hls_wide.mp4").write_bytes(wide)
    config = media.ingestion_config()
    with opened_below(tmp_path) as opened:
        for video in discover_videos(str(source)):
            result = ingest_video(video, str(tmp_path / "data"), config)
            assert result.failure is FailureReason.NOT_A_VIDEO, video.uri
        (source / "hls.mp4").read_bytes()
    assert "hls.mp4" in opened
    assert secret.name not in opened


def test_a_folder_of_trouble_loses_no_file(tmp_path):
    source, output = tmp_path / "source", str(tmp_path / "data")
    source.mkdir()
    good = media.save_video(source / "good.mp4", media.panning(36, step=2), 24.0)
    names = [
        "ünïcode_видео_视频_🎬.mp4",
        "with space and (brackets) [x] 'q' & %20 #1 ?.mp4",
        "new\nline.mp4",
        "-dash-first.mp4",
        "UPPER.MP4",
        "no_extension",
        "x" * 250 + ".mp4",
        "trailing_space .mp4",
        "semi;colon|pipe$(touch pwned)`id`.mp4",
    ]
    for name in names:
        (source / name).write_bytes(good.read_bytes())
    with open(os.fsencode(source) + b"/latin1_\xe9.mp4", "wb") as file:  # noqa: PTH123
        file.write(good.read_bytes())
    media.save_video(source / "short.mp4", media.panning(12, step=2), 24.0)
    media.save_video(source / "tiny.mp4", media.panning(36, step=1, height=16, width=32), 24.0)
    media.save_sound(source / "sound.mp4")
    (source / "cut.mp4").write_bytes(good.read_bytes()[:-3000])
    (source / "zero.mp4").touch()
    (source / "picture.mp4").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    os.mkfifo(source / "fifo.mp4")
    (source / "dir.mp4").mkdir()
    (source / "dir.mp4" / "self").symlink_to(source)
    (source / "dangling.mp4").symlink_to("nowhere")

    config = media.ingestion_config()
    sources = discover_videos(str(source))
    plan = plan_ingestion(str(source), sources, output, config)
    videos = [ingest_video(item, output, config) for item in plan.todo]
    clips = commit_clips(str(source), videos, output, plan, config)
    assert clips.num_videos == len(names) + 2 + 9
    assert clips.failures == {
        FailureReason.EMPTY_FILE: 1,
        FailureReason.NOT_A_VIDEO: 1,
        FailureReason.NOT_REGULAR_FILE: 3,
        FailureReason.NO_VIDEO_STREAM: 1,
        FailureReason.RESOLUTION_TOO_LOW: 1,
        FailureReason.TOO_SHORT: 1,
        FailureReason.UNREADABLE: 1,
    }
    rows = read_clips(clips)
    assert clips.num_clips == len(rows) == len(names) + 2
    assert len({clip.clip_id for clip in rows}) == 1
    assert not list(tmp_path.rglob("pwned"))


def cost(path):
    """What it costs to find out about a file with the limits of the presets, in a process."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.quarantine_cost", path], capture_output=True, check=True
    )
    return json.loads(answer.stdout)


def check_cost(path, reason):
    found = cost(path)
    assert found["reason"] == reason, found
    assert 50 << 20 <= found["child_bytes"] <= 10**9, found
    assert found["parent_bytes"] <= 50 << 20, found
    assert 0.05 <= found["child_cpu_s"] <= 8, found
    return found


BOMBS = {
    # the number of pictures is in the header, or found out by decoding
    "claimed.mp4": {"side": 7680, "num_frames": 60, "fps": 120},
    "unclaimed.mkv": {"side": 7680, "num_frames": 60},
    "unclaimed.ts": {"side": 5120, "num_frames": 150, "fps": 60},
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_within_the_other_limits_is_over_the_pixel_budget(tmp_path, name):
    path = media.save_bomb(tmp_path / name, **BOMBS[name])
    found = check_cost(path, FailureReason.PIXEL_BUDGET)
    assert found["wall_s"] <= 10, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_bomb_that_is_slow_for_its_pixels_uses_up_its_processor_time(tmp_path):
    options = {"side": 2048, "num_frames": 40, "codec": "jpeg2000", "noise": True}
    path = media.save_bomb(tmp_path / "slow.mkv", **options)
    found = check_cost(path, FailureReason.TIMEOUT)
    # ten on a machine with a processor to spare, else the wall time of the preset and a little
    assert found["wall_s"] <= LIMIT_S, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_bomb_that_makes_the_decoder_keep_sixteen_pictures_is_out_of_memory(tmp_path):
    path = media.save_bomb(tmp_path / "kept.mp4", side=7680, num_frames=18, num_kept=16)
    found = check_cost(path, FailureReason.OUT_OF_MEMORY)
    assert found["wall_s"] <= 10, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_large_video_of_honest_length_is_taken_with_the_presets(tmp_path, suffix):
    path = media.save_bomb(tmp_path / f"a{suffix}", side=1440, num_frames=1350, fps=30)
    assert load_config("tiny").ingestion.pixel_budget < 1440**2 * 1350
    found = cost(path)
    assert found["reason"] == "ok", found
    assert 50 << 20 <= found["child_bytes"] <= 10**9, found


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_second_adds_to_the_pixel_budget(tmp_path, suffix):
    path = media.save_video(tmp_path / f"a{suffix}", media.panning(96, step=1), 24.0)
    budgets = {"pixel_budget": 144 * 256 * 48, "pixel_budget_per_s": 144 * 256 * 16}
    folder, config = tmp_path / "accepted", media.ingestion_config(**budgets)
    folder.mkdir()
    _, demuxer = copy_foreign_file(path, folder, config)
    assert normalise_video(folder, demuxer, config).info.num_frames == 96
    budgets["pixel_budget_per_s"] //= 2
    assert quarantine(path, tmp_path / "work", **budgets) is FailureReason.PIXEL_BUDGET


def write_bare_gif(path, *, side, num_frames, delay_s, num_more_bytes=0):
    """Write a GIF of huge pictures in each of which one pixel is drawn anew: 23 bytes a picture."""
    data = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    for index in range(num_frames):
        data += b"\x21\xf9\x04" + struct.pack("<BHBB", 4, round(delay_s * 100), 0, 0)
        data += b"\x2c" + struct.pack("<HHHHB", index % side, 0, 1, 1, 0) + b"\2\2\x4c\1\0"
    path.write_bytes(data + b"\x3b" + bytes(num_more_bytes))
    return path


def test_a_file_claims_no_more_pixels_than_its_bytes_earn(tmp_path):
    limits = {"max_side_px": 4096, "pixel_budget": 4000**2, "pixel_budget_per_s": 10**9}
    gif = {"side": 4000, "num_frames": 8, "delay_s": 0.2}
    path = write_bare_gif(tmp_path / "a.gif", **gif)
    assert quarantine(path, tmp_path / "work", **limits) is FailureReason.PIXEL_BUDGET
    # so it is the bytes that decide
    path = write_bare_gif(tmp_path / "b.gif", **gif, num_more_bytes=200)
    folder, config = tmp_path / "accepted", media.ingestion_config(**limits)
    folder.mkdir()
    _, demuxer = copy_foreign_file(path, folder, config)
    assert normalise_video(folder, demuxer, config).info.num_frames == 8


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_presets_take_hours_of_4k(preset):
    config = load_config(preset).ingestion
    assert config.pixel_budget_per_s >= 3840 * 2160 * 60
    assert config.max_duration_s >= 7200
