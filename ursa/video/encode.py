"""Write H.264 clips that every reader counts alike, and animated GIFs.

No B-frames (so no edit list and no negative timestamps), closed GOPs, a constant frame rate,
4:2:0, the index in front; one encoder thread, so that the bytes do not depend on the machine.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from PIL import Image

CRF = 18
"""Constant rate factor of x264: visually lossless at these sizes."""
GOP_S = 2.0
"""Distance of key frames, seconds."""


class VideoWriter:
    """Writes one clip frame by frame; use as a context manager."""

    def __init__(self, path: Path, *, width_px: int, height_px: int, fps: float) -> None:
        """Open the file.

        Args:
            path: MP4 file to write.
            width_px: Width of all frames, even.
            height_px: Height of all frames, even.
            fps: Constant frame rate, frames per second.

        Raises:
            ValueError: If a side is odd.
        """
        if width_px % 2 or height_px % 2:
            raise ValueError(
                f"frames of {width_px} x {height_px} px cannot be written as 4:2:0; "
                "both sides must be even"
            )
        rate = Fraction(fps).limit_denominator(1001)
        self._container = av.open(
            path.as_posix(), "w", format="mp4", options={"movflags": "+faststart"}
        )
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.width = width_px
        self._stream.height = height_px
        self._stream.pix_fmt = "yuv420p"
        # the muxer changes the time base of the stream, not that of the encoder
        self._time_base = 1 / rate
        self._stream.codec_context.time_base = self._time_base
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.gop_size = max(1, round(GOP_S * fps))
        self._stream.codec_context.max_b_frames = 0
        self._stream.codec_context.options = {
            "crf": str(CRF),
            "preset": "veryfast",
            # mb-tree reads memory that was never written at widths like 240 px: other bytes now
            # and then
            "x264-params": "open-gop=0:bframes=0:mbtree=0",
        }
        self._num_frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Write the next frame.

        Args:
            frame: RGB picture, shape (H, W, 3), uint8.
        """
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self._num_frames
        picture.time_base = self._time_base
        self._num_frames += 1
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Write what the encoder still holds, and the index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._container.close()


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames as an MP4 file (H.264, 4:2:0).

    Args:
        path: File to write.
        frames: RGB pictures, shape (T, H, W, 3), uint8, T >= 1; H and W even.
        fps: Frame rate, frames per second.

    Raises:
        ValueError: If there is no frame or a side is odd.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"no frames for {path}, expected at least one")
    height_px, width_px = first.shape[:2]
    with VideoWriter(path, width_px=width_px, height_px=height_px, fps=fps) as writer:
        writer.add(np.ascontiguousarray(first))
        for frame in iterator:
            writer.add(np.ascontiguousarray(frame))


def write_gif(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames as an animated GIF that repeats for ever.

    Args:
        path: File to write.
        frames: RGB pictures, shape (T, H, W, 3), uint8, T >= 1.
        fps: Frame rate, frames per second; GIF rounds the frame time to 10 ms.

    Raises:
        ValueError: If there is no frame.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    if not pictures:
        raise ValueError(f"no frames for {path}, expected at least one")
    duration_ms = max(20, round(100 / fps) * 10)
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=duration_ms,
        loop=0,
    )
