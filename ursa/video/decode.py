"""Read frames of our own normalised clips, exactly and fast.

Only clips written by `ursa.video.encode` come here: on those decord counts right, on foreign
files it does not, and they are never opened in this process. A reader is opened, used and closed
in the calling process, with one thread. Where decord has no wheel, PyAV reads sequentially.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from ursa.artifacts import VideoInfo
from ursa.errors import VideoDecodeError
from ursa.video.encode import write_gif, write_video

__all__ = [
    "FrameSize",
    "read_frames",
    "read_frames_at",
    "verify_clip",
    "video_info",
    "write_gif",
    "write_video",
]

logger = logging.getLogger(__name__)

_NUM_CHANNELS = 3
_PART_FRAMES = 16
"""Whole frames held at a time: a long clip of large frames takes gigabytes."""
_HAS_DECORD = importlib.util.find_spec("decord") is not None


class FrameSize(NamedTuple):
    """Size of frames, pixels."""

    height_px: int
    width_px: int


ReadFrames = Callable[[Path, Sequence[int], Sequence[FrameSize]], list[np.ndarray]]
"""What `read_frames_at` and `ClipReader.read` are."""


class _WrongShapeError(Exception):
    """Frames are not what decord takes them for."""


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
    (frames,) = read_frames_at(path, indices, [FrameSize(height_px, width_px)])
    return frames


def read_frames_at(
    path: Path, indices: Sequence[int], sizes: Sequence[FrameSize]
) -> list[np.ndarray]:
    """Return chosen frames of a normalised clip in several sizes, decoded once.

    Only some whole frames are held at a time.

    Args:
        path: Local file of a normalised clip.
        indices: Frame numbers from 0, in any order, repeats allowed.
        sizes: Sizes of the results.

    Returns:
        One array a size: RGB frames, shape (T, height_px, width_px, 3), uint8, cropped about the
        centre and resized.

    Raises:
        VideoDecodeError: If the file cannot be read or has no such frame.
    """
    wanted = [int(index) for index in indices]
    if _HAS_DECORD:
        # on its first frames decord shows whether it gets the shape of narrow ones wrong
        with contextlib.suppress(_WrongShapeError):
            return _fit_parts(_read_with_decord(path, wanted), len(wanted), sizes)
    return _fit_parts(_read_with_pyav(path, wanted), len(wanted), sizes)


def _fit_parts(
    parts: Iterator[tuple[Sequence[int], np.ndarray]], num_frames: int, sizes: Sequence[FrameSize]
) -> list[np.ndarray]:
    """Fill one array a size from parts: places in it and whole frames."""
    results = [np.empty((num_frames, *size, _NUM_CHANNELS), np.uint8) for size in sizes]
    for places, frames in parts:
        for result, size in zip(results, sizes, strict=True):
            result[places] = fit_frames(frames, height_px=size.height_px, width_px=size.width_px)
    return results


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


def _read_with_decord(path: Path, indices: list[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield places in `indices` and whole frames, some at a time and in order of the file."""
    import decord  # noqa: PLC0415

    with _decord_errors(path):
        reader = _open_with_decord(path)
        _check_indices(path, indices, len(reader))
        ordered = sorted(range(len(indices)), key=indices.__getitem__)
        for start in range(0, len(ordered), _PART_FRAMES):
            places = ordered[start : start + _PART_FRAMES]
            try:
                frames: np.ndarray = reader.get_batch(
                    [indices[place] for place in places]
                ).asnumpy()
            except decord.DECORDError as error:
                logger.debug("%s: read with PyAV, as decord says %s", path, error)
                raise _WrongShapeError from error
            if frames.shape[-1] != _NUM_CHANNELS:
                raise _WrongShapeError
            yield places, frames


def _read_with_pyav(path: Path, indices: list[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield places in `indices` and the whole frame for them, in order of the file."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    count = 0
    try:
        with av.open(path.as_posix(), format="mp4") as container:
            for frame in container.decode(video=0):
                if count in places:
                    yield places[count], frame.to_ndarray(format="rgb24", threads=1)[None]
                count += 1
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise VideoDecodeError(f"{path}: cannot be read ({error})") from error
    _check_indices(path, indices, count)


def _check_indices(path: Path, indices: list[int], num_frames: int) -> None:
    if not indices:
        raise VideoDecodeError(f"{path}: no frames asked for, expected at least one index")
    if min(indices) < 0 or max(indices) >= num_frames:
        raise VideoDecodeError(
            f"{path}: frames {min(indices)}..{max(indices)} asked for, it has {num_frames}"
        )
