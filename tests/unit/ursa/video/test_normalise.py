import itertools
from fractions import Fraction

import cv2
import numpy as np
import pytest

from tests import media
from ursa.artifacts import NOT_CROPPED, CroppedPixels, FailureReason
from ursa.errors import StorageConfigurationError
from ursa.video.decode import read_frames
from ursa.video.normalise import answer, normalise, plan_geometry
from ursa.video.probe import (
    DISK_FULL,
    ChildRequest,
    QuarantinedError,
    copy_foreign_file,
)


def normalised(path, folder, **changes):
    """Run the work of the child in this process: the files of these tests are our own."""
    config = media.ingestion_config(**changes)
    folder.mkdir()
    _, demuxer = copy_foreign_file(path, folder, config)
    return normalise(folder, ChildRequest(demuxer=demuxer, config=config))


def reason_of(path, folder, **changes):
    with pytest.raises(QuarantinedError) as caught:
        normalised(path, folder, **changes)
    return caught.value.reason


def read_clip(folder, clip, indices=None):
    info = clip.info
    return read_frames(
        folder / clip.file_name,
        range(info.num_frames) if indices is None else indices,
        height_px=info.height_px,
        width_px=info.width_px,
    )


NUM_BARS, BAR_PX = 7, 32


def numbered(num_frames):
    """Seven bars spell the number of the frame in binary."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(NUM_BARS)) & 1
    bars = np.repeat(110 + 40 * bits, BAR_PX, axis=1).astype(np.uint8)
    return np.repeat(np.repeat(bars[:, None, :, None], 64, axis=1), 3, axis=3)


def numbers_in(frames):
    bars = frames.mean(axis=(1, 3)).reshape(len(frames), NUM_BARS, BAR_PX)
    bars = bars[:, :, 8:-8].mean(axis=2)
    return ((bars > 130) @ (1 << np.arange(NUM_BARS))).tolist()


def test_frames_are_sampled_by_time(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", numbered(72), 24.0)
    video = normalised(path, tmp_path / "work")
    (clip,) = video.clips
    assert (clip.start_s, clip.end_s) == (0.0, 3.0)
    assert (video.info.num_frames, video.info.fps) == (72, pytest.approx(24))
    assert numbers_in(read_clip(tmp_path / "work", clip)) == list(range(0, 72, 2))


def test_variable_frame_rate_shows_what_a_player_shows(tmp_path):
    times = [0.0, 0.1, 0.2, 0.9, 1.0, 1.5, 1.6, 1.9]
    path = media.save_video(tmp_path / "a.mkv", numbered(8), 10.0, times_s=times)
    video = normalised(path, tmp_path / "work", clip_fps=10.0, min_fps=1.0)
    (clip,) = video.clips
    shown = numbers_in(read_clip(tmp_path / "work", clip))
    expected = [max(i for i, time in enumerate(times) if time <= k / 10 + 1e-6) for k in range(20)]
    assert shown == expected[: len(shown)]
    assert len(shown) in (19, 20)


def test_shots_are_cut_and_short_ones_dropped(tmp_path):
    frames = np.concatenate(
        [
            media.panning(48, step=1, height=64, seed=1),
            255 - media.panning(12, step=1, height=64, seed=2) // 2,
            media.panning(120, step=1, height=64, seed=3) // 2,
        ]
    )
    path = media.save_video(tmp_path / "a.mp4", frames, 24.0)
    video = normalised(path, tmp_path / "work")
    assert [(clip.start_s, clip.end_s) for clip in video.clips] == [
        (0.0, 2.0),
        (2.5, 5.0),
        (5.0, 7.5),
    ]
    assert video.num_dropped_shots == 1


def test_long_shot_is_cut_in_blocks_without_loss(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", numbered(127), 12.0)
    video = normalised(path, tmp_path / "work", max_clip_s=1.0, min_clip_s=0.5)
    spans = [(clip.start_s, clip.end_s) for clip in video.clips]
    assert spans[0][0] == 0.0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] == pytest.approx(127 / 12)
    shown = [n for clip in video.clips for n in numbers_in(read_clip(tmp_path / "work", clip))]
    assert shown == list(range(127))
    assert video.num_dropped_shots == 0


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_once(tmp_path, degrees):
    upright = np.zeros((30, 128, 192, 3), np.uint8)
    upright[:, :64, :96] = (200, 30, 30)
    upright[:, 64:, 96:] = (30, 200, 30)
    upright = upright + 20
    # the camera stores the picture turned the other way and notes the angle
    stored = np.rot90(upright, degrees // 90, axes=(1, 2))
    path = media.save_video(tmp_path / "a.mp4", stored, 12.0)
    media.set_rotation(path, degrees)
    video = normalised(path, tmp_path / "work", clip_height_px=128)
    assert (video.info.width_px, video.info.height_px) == (192, 128)
    frames = read_clip(tmp_path / "work", video.clips[0], [5])
    assert np.abs(frames[0].astype(int) - upright[5]).mean() < 6


def test_pixels_become_square(tmp_path):
    path = media.save_video(
        tmp_path / "a.mp4", media.panning(30, step=1), 12.0, pixel_aspect=Fraction(16, 11)
    )
    video = normalised(path, tmp_path / "work")
    assert video.info.width_px == round(256 * 16 / 11)
    assert video.clips[0].info.width_px == 372
    assert video.clips[0].info.height_px == 144


@pytest.mark.parametrize(
    ("size", "aspect", "turn", "expected"),
    [
        ((1920, 1080), Fraction(1), 0, (256, 144)),
        ((1920, 1080), Fraction(1), 90, (80, 144)),
        ((321, 101), Fraction(1), 0, (320, 100)),
        ((720, 576), Fraction(16, 11), 180, (262, 144)),
        ((200, 100), Fraction(1, 1000), 0, (200, 100)),
    ],
)
def test_geometry(size, aspect, turn, expected):
    geometry = plan_geometry(*size, pixel_aspect=aspect, rotation_deg=turn, max_height_px=144)
    assert (geometry.width_px, geometry.height_px) == expected


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        (".mkv", "libx264", "yuv444p"),
        (".webm", "libvpx-vp9", "yuv420p"),
        (".avi", "mpeg4", "yuv420p"),
        (".mov", "mjpeg", "yuvj420p"),
        (".mpg", "mpeg2video", "yuv420p"),
        (".ts", "libx264", "yuv420p"),
        (".flv", "flv1", "yuv420p"),
        (".gif", "gif", "rgb8"),
    ],
)
def test_containers_and_codecs(tmp_path, suffix, codec, pix_fmt):
    frames = media.panning(36, step=1, height=64, width=128)
    path = media.save_video(tmp_path / f"a{suffix}", frames, 24.0, codec=codec, pix_fmt=pix_fmt)
    video = normalised(path, tmp_path / "work")
    assert video.info.num_frames in (35, 36)
    (clip,) = video.clips
    assert clip.info.num_frames in (17, 18)
    found = read_clip(tmp_path / "work", clip, [8])[0].astype(int)
    assert np.abs(found - frames[16]).mean() < 20


def test_letterbox_and_motion_are_measured_on_the_clip(tmp_path):
    frames = media.letterboxed(media.panning(48, step=1), 32)
    path = media.save_video(tmp_path / "a.mp4", frames, 24.0)
    limits = {"clip_height_px": 208, "crop_borders": False}
    (clip,) = normalised(path, tmp_path / "work", **limits).clips
    assert (clip.info.height_px, clip.cropped_px) == (208, NOT_CROPPED)
    assert clip.scores.black_border_fraction == pytest.approx(64 / 208, abs=0.02)
    # 24 px/s over the part that is not black
    assert clip.scores.motion_px_per_s == pytest.approx(24 * 144 / 208, rel=0.2)


def test_bars_are_cut_off_before_the_clip_is_measured(tmp_path):
    frames = media.letterboxed(media.panning(48, step=1), 32)
    path = media.save_video(tmp_path / "a.mp4", frames, 24.0)
    # scaled to half: a bar of 16 px
    (clip,) = normalised(path, tmp_path / "work", clip_height_px=104).clips
    assert (clip.info.width_px, clip.info.height_px) == (128, 72)
    assert clip.cropped_px == CroppedPixels(left=0, top=32, right=0, bottom=32)
    assert clip.scores.black_border_fraction == 0.0
    assert clip.scores.motion_px_per_s == pytest.approx(24, rel=0.1)
    found = read_clip(tmp_path / "work", clip, [4])[0].astype(int)
    assert np.abs(found - cv2.resize(frames[8, 32:-32], (128, 72)).astype(int)).mean() < 12


def test_bars_are_cut_off_a_turned_picture_with_wide_pixels(tmp_path):
    upright = np.pad(media.panning(30, step=1), ((0, 0), (0, 0), (20, 20), (0, 0)))
    stored = np.rot90(upright, 1, axes=(1, 2))
    path = media.save_video(tmp_path / "a.mp4", stored, 12.0, pixel_aspect=Fraction(1, 2))
    media.set_rotation(path, 90)
    (clip,) = normalised(path, tmp_path / "work", clip_height_px=72).clips
    # a pixel as stored is half as wide as high: upright, half as high as wide
    assert clip.cropped_px == CroppedPixels(left=20, top=0, right=20, bottom=0)
    assert (clip.info.width_px, clip.info.height_px) == (256, 72)


def test_bars_that_do_not_stay_are_no_bars(tmp_path):
    whole = media.panning(48, step=1)
    frames = np.concatenate([media.letterboxed(whole[:24, 32:-32], 32), whole[24:]])
    path = media.save_video(tmp_path / "a.mp4", frames, 24.0)
    limits = {"shot_threshold": 1e9, "adaptive_threshold": 1e9, "transition_threshold": None}
    (clip,) = normalised(path, tmp_path / "work", **limits).clips
    assert (clip.info.height_px, clip.cropped_px) == (144, NOT_CROPPED)


def test_black_clip_keeps_its_size(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.flat(48, (0, 0, 0)), 24.0)
    (clip,) = normalised(path, tmp_path / "work").clips
    assert (clip.info.height_px, clip.cropped_px) == (144, NOT_CROPPED)
    assert (clip.scores.black_fraction, clip.scores.dark_fraction) == (1.0, 1.0)


def test_dissolve_is_left_out_of_the_clips(tmp_path):
    before, after = (media.panning(72, step=0, seed=seed, grain=16) for seed in (1, 2))
    weight = np.clip((np.arange(72) - 36) / 24, 0, 1)[:, None, None, None]
    frames = ((1 - weight) * before + weight * after).astype(np.uint8)
    path = media.save_video(tmp_path / "a.mp4", np.concatenate([frames, after]), 24.0)
    first, *others = normalised(path, tmp_path / "work").clips
    assert 1.0 <= first.end_s <= 1.6
    assert 2.4 <= others[0].start_s <= 3.0
    found = read_clip(tmp_path / "work", others[0], [0])[0].astype(int)
    assert np.abs(found - after[0]).mean() < 4


def test_cuts_found_late_are_made_at_their_frame_in_long_shots(tmp_path):
    frames = np.concatenate([numbered(61), numbered(127)[61:] // 4])
    path = media.save_video(tmp_path / "a.mp4", frames, 12.0)
    limits = {"max_clip_s": 1.0, "min_clip_s": 0.5, "transition_threshold": 250.0}
    video = normalised(path, tmp_path / "work", **limits)
    ends = [clip.end_s for clip in video.clips]
    assert pytest.approx(61 / 12) in ends
    assert [clip.start_s for clip in video.clips][1:] == ends[:-1]
    assert sum(clip.info.num_frames for clip in video.clips) == 127


def test_truncated_file_gives_what_is_whole(tmp_path):
    whole = media.save_video(tmp_path / "whole.mkv", media.panning(96, step=1, height=64), 24.0)
    path = tmp_path / "a.mkv"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    video = normalised(path, tmp_path / "work")
    assert 40 < video.info.num_frames < 70
    assert len(video.clips) == 1


def test_damaged_packets_are_counted_or_hidden_but_end_nothing(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.panning(96, step=1), 24.0)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    places = np.random.default_rng(0).integers(start, len(data) - 5000, 60)
    for place in places:
        data[place] ^= 0xFF
    path.write_bytes(data)
    assert normalised(path, tmp_path / "work").clips


@pytest.fixture(scope="module")
def two_seconds(tmp_path_factory):
    folder, frames = tmp_path_factory.mktemp("two-seconds"), media.panning(48, step=1)
    return {
        suffix: media.save_video(folder / f"a{suffix}", frames, 24.0) for suffix in (".mp4", ".mkv")
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_side_px": 128}, FailureReason.RESOLUTION_TOO_HIGH),
        ({"min_side_px": 200}, FailureReason.RESOLUTION_TOO_LOW),
        ({"pixel_budget": 256 * 144 * 20}, FailureReason.PIXEL_BUDGET),
        ({"max_duration_s": 1.0}, FailureReason.TOO_LONG),
        ({"min_clip_s": 3.0}, FailureReason.TOO_SHORT),
        ({"min_fps": 30.0}, FailureReason.FPS_TOO_LOW),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_limits(two_seconds, tmp_path, suffix, changes, reason):
    assert reason_of(two_seconds[suffix], tmp_path / "work", **changes) is reason


def test_sound_only(tmp_path):
    path = media.save_sound(tmp_path / "a.mp4")
    assert reason_of(path, tmp_path / "work") is FailureReason.NO_VIDEO_STREAM


def test_truncated_index(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.panning(24, step=1), 24.0)
    path.write_bytes(path.read_bytes()[:-2000])
    assert reason_of(path, tmp_path / "work") is FailureReason.UNREADABLE


def test_full_disk_is_no_fault_of_the_file(tmp_path):
    path = media.save_video(tmp_path / "a.mp4", media.panning(24, step=1), 24.0)
    config = media.ingestion_config()
    folder = tmp_path / "work"
    folder.mkdir()
    _, demuxer = copy_foreign_file(path, folder, config)
    # every write to this device says that there is no room
    (folder / "spool").symlink_to("/dev/full")
    request = ChildRequest(demuxer=demuxer, config=config)
    result = answer(folder, request)
    assert (result.video, result.failure) == (None, DISK_FULL)
    with pytest.raises(StorageConfigurationError, match="TMPDIR"):
        copy_foreign_file(path, folder, config)
