import numpy as np
import pytest

from tests import media
from ursa.errors import VideoDecodeError
from ursa.video.foreign import read_last_frames


def test_the_last_frames_are_read(tmp_path):
    # brightness counts the frames: 4 levels each
    levels = np.arange(48, dtype=np.uint8) * 4 + 20
    frames = np.broadcast_to(levels[:, None, None, None], (48, 64, 96, 3)).copy()
    path = media.save_video(tmp_path / "a.mkv", frames, 24.0)
    limits = media.ingestion_config()
    read = read_last_frames(path, 5, fps=8.0, height_px=16, width_px=24, limits=limits)
    assert read.shape == (5, 16, 24, 3)
    expected = levels[[33, 36, 39, 42, 45]]
    assert np.abs(read.mean((1, 2, 3)) - expected).max() < 4
    with pytest.raises(VideoDecodeError, match=r"a.mkv does not give 99 frames at 8 frames"):
        read_last_frames(path, 99, fps=8.0, height_px=16, width_px=24, limits=limits)
    (tmp_path / "b.mp4").write_text("<html>")
    with pytest.raises(VideoDecodeError, match=r"b.mp4 does not give 5 frames.*not_a_video"):
        read_last_frames(tmp_path / "b.mp4", 5, fps=8.0, height_px=16, width_px=24, limits=limits)
