import numpy as np
import pytest

from tests.media import panning, still
from ursa.errors import VideoDecodeError
from ursa.video import decode
from ursa.video.decode import (
    fit_frames,
    read_frames,
    verify_clip,
    video_info,
    write_gif,
    write_video,
)


def numbered(num_frames, height=64, width=96):
    """Grey value tells the number of the frame."""
    values = (np.arange(num_frames) * 5 + 20).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (num_frames, height, width, 3))


@pytest.fixture(params=["decord", "pyav"])
def reader(request, monkeypatch):
    if request.param == "decord":
        pytest.importorskip("decord")
    monkeypatch.setattr(decode, "_HAS_DECORD", request.param == "decord")


@pytest.mark.usefixtures("reader")
def test_random_access_is_exact(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(43), 12.0)
    indices = [42, 0, 7, 7, 25, 24, 23, 1]
    frames = read_frames(path, indices, height_px=64, width_px=96)
    assert frames.shape == (8, 64, 96, 3)
    assert frames.dtype == np.uint8
    found = (frames.mean(axis=(1, 2, 3)) - 20) / 5
    assert np.round(found).astype(int).tolist() == indices


@pytest.mark.usefixtures("reader")
def test_written_clip_counts_exactly(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(37), 12.0)
    verify_clip(path, num_frames=37, height_px=64, width_px=96)
    with pytest.raises(VideoDecodeError, match="37 frames, expected 36"):
        verify_clip(path, num_frames=36, height_px=64, width_px=96)
    info = video_info(path)
    assert (info.width_px, info.height_px, info.num_frames, info.codec) == (96, 64, 37, "h264")
    assert info.fps == 12.0
    assert info.duration_s == pytest.approx(37 / 12)


@pytest.mark.parametrize("width", [32, 40, 48, 56, 66])
def test_narrow_clips_have_three_channels(tmp_path, width):
    path = tmp_path / "clip.mp4"
    frames = panning(5, step=1, height=64, width=width)
    write_video(path, frames, 12.0)
    found = read_frames(path, range(5), height_px=64, width_px=width)
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).mean() < 8


def test_crop_keeps_the_centre_and_the_aspect():
    frames = np.zeros((1, 60, 120, 3), np.uint8)
    frames[:, :, 30:90] = 200
    fitted = fit_frames(frames, height_px=30, width_px=30)
    assert fitted.shape == (1, 30, 30, 3)
    assert (fitted == 200).all()
    tall = fit_frames(frames.transpose(0, 2, 1, 3), height_px=80, width_px=80)
    assert tall.shape == (1, 80, 80, 3)
    assert (tall == 200).all()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("indices", [[], [-1], [5]])
def test_frames_that_do_not_exist_are_refused(tmp_path, indices):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(5), 12.0)
    with pytest.raises(VideoDecodeError):
        read_frames(path, indices, height_px=64, width_px=96)


@pytest.mark.usefixtures("reader")
def test_damaged_clip_is_one_error(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"nothing like a video")
    with pytest.raises(VideoDecodeError):
        read_frames(path, [0], height_px=64, width_px=96)
    with pytest.raises(VideoDecodeError):
        video_info(path)
    with pytest.raises(VideoDecodeError):
        read_frames(tmp_path / "missing.mp4", [0], height_px=64, width_px=96)


def test_same_frames_give_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, panning(10, step=2), 12.0)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_odd_sides_and_no_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "odd.mp4", still(2, height=63), 12.0)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "none.mp4", still(2)[:0], 12.0)


def test_gif_has_all_frames(tmp_path):
    from PIL import Image

    write_gif(tmp_path / "a.gif", panning(5, step=4, height=32, width=48), 10.0)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 5
        assert picture.info["duration"] == 100
