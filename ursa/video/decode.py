"""Read frames of our own normalised clips, exactly and fast.

Only clips written by `ursa.video.encode` come here: on those decord counts right, on foreign
files it does not, and they are never opened in this process. A reader is opened, used and closed
in the calling process, with one thread. Where decord has no wheel, PyAV reads sequentially.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from ursa.artifacts import VideoInfo
from ursa.errors import VideoDecodeError
from ursa.video.encode import write_gif, write_video

__all__ = ["read_frames", "verify_clip", "video_info", "write_gif", "write_video"]

logger = logging.getLogger(__name__)

_NUM_CHANNELS = 3
_HAS_DECORD = importlib.util.find_spec("decord") is not None


def read_frames(path: Path, indices: Sequence[int], *, height_px: int, width_px: int) -> np.ndarray:
    """Return chosen frames of a normalised clip, cropped about the centre and resized.

    Args:
        path: Local file of a normalised clip.
        indices: Frame numbers from 0, in any order, repeats allowed.
        height_px: Height of the result.
        width_px: Width of the result.

    Returns:
        RGB frames, shape (T, height_px, width_px, 3), uint8.

    Raises:
        VideoDecodeError: If the file cannot be read or has no such frame.
    """
    wanted = [int(index) for index in indices]
    frames = _read_with_decord(path, wanted) if _HAS_DECORD else None
    if frames is None:
        frames = _read_with_pyav(path, wanted)
    return fit_frames(frames, height_px=height_px, width_px=width_px)


def fit_frames(frames: np.ndarray, *, height_px: int, width_px: int) -> np.ndarray:
    """Crop frames about their centre to an aspect ratio and resize them.

    Args:
        frames: RGB frames, shape (T, H, W, 3), uint8.
        height_px: Height of the result.
        width_px: Width of the result.

    Returns:
        RGB frames, shape (T, height_px, width_px, 3), uint8.
    """
    num_frames, source_height, source_width = frames.shape[:3]
    crop_width = min(source_width, max(1, round(source_height * width_px / height_px)))
    crop_height = min(source_height, max(1, round(source_width * height_px / width_px)))
    top = (source_height - crop_height) // 2
    left = (source_width - crop_width) // 2
    cropped = frames[:, top : top + crop_height, left : left + crop_width]
    if cropped.shape[1:3] == (height_px, width_px):
        return np.ascontiguousarray(cropped)
    shrinks = crop_height >= height_px and crop_width >= width_px
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    result = np.empty((num_frames, height_px, width_px, 3), np.uint8)
    for index, frame in enumerate(cropped):
        result[index] = cv2.resize(frame, (width_px, height_px), interpolation=interpolation)
    return result


def video_info(path: Path) -> VideoInfo:
    """Return size, frame rate and number of frames of a normalised clip.

    Args:
        path: Local file of a normalised clip.

    Raises:
        VideoDecodeError: If the file cannot be read.
    """
    try:
        with av.open(path.as_posix(), format="mp4") as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            fps = float(stream.average_rate or 0)
            num_frames = stream.frames
            return VideoInfo(
                width_px=context.width,
                height_px=context.height,
                fps=fps,
                num_frames=num_frames,
                duration_s=num_frames / fps,
                codec=context.name,
            )
    except (av.error.FFmpegError, OSError, IndexError, ValueError, ZeroDivisionError) as error:
        raise VideoDecodeError(f"{path}: cannot be read as a clip ({error})") from error


def verify_clip(path: Path, *, num_frames: int, height_px: int, width_px: int) -> None:
    """Check that the reader sees exactly the frames that were written.

    Args:
        path: Local file of a normalised clip.
        num_frames: Number of frames written.
        height_px: Their height, pixels.
        width_px: Their width, pixels.

    Raises:
        VideoDecodeError: If count or shape differ.
    """
    if _HAS_DECORD:
        with _decord_errors(path):
            reader = _open_with_decord(path)
            count = len(reader)
            times = reader.get_frame_timestamp([0, count - 1])
            starts_at_zero = float(times[0][0]) == 0.0
    else:
        info = video_info(path)
        count, starts_at_zero = info.num_frames, True
    if count != num_frames or not starts_at_zero:
        raise VideoDecodeError(f"{path}: the reader counts {count} frames, expected {num_frames}")
    last = read_frames(path, [num_frames - 1], height_px=height_px, width_px=width_px)
    if last.shape != (1, height_px, width_px, 3):
        raise VideoDecodeError(f"{path}: frames have shape {last.shape[1:]}")


@contextlib.contextmanager
def _decord_errors(path: Path) -> Iterator[None]:
    """Turn what decord raises into VideoDecodeError."""
    import decord  # noqa: PLC0415  (not on every platform)

    try:
        yield
    except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise VideoDecodeError(f"{path}: cannot be read ({lines[0]})") from error


def _open_with_decord(path: Path) -> Any:
    import decord  # noqa: PLC0415  (not on every platform)

    if not path.is_file():
        raise VideoDecodeError(f"{path}: no such file")
    return decord.VideoReader(path.as_posix(), ctx=decord.cpu(0), num_threads=1)


def _read_with_decord(path: Path, indices: list[int]) -> np.ndarray | None:
    """Return whole frames, or None where decord gets the shape of narrow ones wrong."""
    import decord  # noqa: PLC0415

    with _decord_errors(path):
        reader = _open_with_decord(path)
        _check_indices(path, indices, len(reader))
        try:
            frames: np.ndarray = reader.get_batch(indices).asnumpy()
        except decord.DECORDError as error:
            logger.debug("%s: read with PyAV, as decord says %s", path, error)
            return None
    return frames if frames.shape[-1] == _NUM_CHANNELS else None


def _read_with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    wanted = set(indices)
    found: dict[int, np.ndarray] = {}
    count = 0
    try:
        with av.open(path.as_posix(), format="mp4") as container:
            for frame in container.decode(video=0):
                if count in wanted:
                    found[count] = frame.to_ndarray(format="rgb24", threads=1)
                count += 1
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise VideoDecodeError(f"{path}: cannot be read ({error})") from error
    _check_indices(path, indices, count)
    return np.stack([found[index] for index in indices])


def _check_indices(path: Path, indices: list[int], num_frames: int) -> None:
    if not indices:
        raise VideoDecodeError(f"{path}: no frames asked for, expected at least one index")
    if min(indices) < 0 or max(indices) >= num_frames:
        raise VideoDecodeError(
            f"{path}: frames {min(indices)}..{max(indices)} asked for, it has {num_frames}"
        )
