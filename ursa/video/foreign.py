"""The end of a foreign file as frames, read like everything foreign.

The file is decoded in the limited child process of `ursa.video.probe`; what is read here is the
normalised clip that it writes.
"""

import tempfile
from pathlib import Path

import numpy as np

from ursa.config import IngestionConfig
from ursa.errors import VideoDecodeError
from ursa.video.decode import read_frames
from ursa.video.probe import copy_foreign_file, normalise_video

_NO_CUTS = 1e9
"""Shot threshold that no change of a picture reaches."""
_MIN_SIDE_PX = 16
_MIN_FPS = 1.0


def read_last_frames(
    path: Path,
    num_frames: int,
    *,
    fps: float,
    height_px: int,
    width_px: int,
    limits: IngestionConfig,
) -> np.ndarray:
    """Return the last frames of a video, cropped about the centre and resized.

    Args:
        path: Any video file.
        num_frames: How many frames are wanted.
        fps: At which frame rate.
        height_px: Height of the result.
        width_px: Width of the result.
        limits: Of the process that decodes; what clips shall be like is decided here.

    Returns:
        RGB frames, shape (num_frames, height_px, width_px, 3), uint8.

    Raises:
        VideoDecodeError: If it is no video, or shorter than that.
    """
    config = limits.model_copy(
        update={
            "clip_fps": fps,
            "clip_height_px": max(height_px, limits.clip_height_px),
            "crop_borders": False,
            "shot_threshold": _NO_CUTS,
            "adaptive_threshold": _NO_CUTS,
            "transition_threshold": None,
            "min_side_px": _MIN_SIDE_PX,
            "min_fps": _MIN_FPS,
            "min_clip_s": num_frames / fps,
            "max_clip_s": limits.max_duration_s,
        }
    )
    with tempfile.TemporaryDirectory(prefix="ursa-") as name:
        folder = Path(name)
        try:
            _, demuxer = copy_foreign_file(path, folder, config)
            clip = normalise_video(folder, demuxer, config).clips[-1]
        except VideoDecodeError as error:
            raise VideoDecodeError(
                f"{path} does not give {num_frames} frames at {fps:g} frames per second: {error}"
            ) from error
        first = clip.info.num_frames - num_frames
        return read_frames(
            folder / clip.file_name,
            range(first, first + num_frames),
            height_px=height_px,
            width_px=width_px,
        )
