"""Synthetic videos with known answers, made at test time."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from ursa.config import IngestionConfig


def ingestion_config(**changes) -> IngestionConfig:
    """Limits for tests; `changes` replace single values."""
    values = {
        "max_file_bytes": 256 << 20,
        "max_duration_s": 120.0,
        "max_side_px": 4096,
        "min_side_px": 64,
        "min_fps": 5.0,
        "pixel_budget": 2_000_000_000,
        "pixel_budget_per_s": 0,
        "child_timeout_s": 20.0,
        "child_cpu_s": 20,
        "child_memory_bytes": 2 << 30,
        "clip_fps": 12.0,
        "clip_height_px": 144,
        "crop_borders": True,
        "shot_threshold": 27.0,
        "shot_ratio": 2.2,
        "adaptive_threshold": 18.0,
        "adaptive_ratio": 3.5,
        "transition_threshold": 10.0,
        "max_transition_s": 1.0,
        "min_clip_s": 1.0,
        "max_clip_s": 4.0,
        "max_failed_fraction": 1.0,
        "allow_https": False,
    }
    return IngestionConfig.model_validate(values | changes)


def texture(height: int, width: int, *, seed: int = 0, grain: float = 2.0) -> np.ndarray:
    """A soft random RGB pattern, uint8, in which motion can be seen everywhere."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), grain)
    low, high = soft.min(), soft.max()
    return ((soft - low) / (high - low) * 235 + 10).astype(np.uint8)


def panning(num_frames, *, step: int, height: int = 144, width: int = 256, seed=0, grain=2.0):
    """The whole picture moves by `step` px a frame to the left; shape (T, H, W, 3)."""
    wide = texture(height, width + step * num_frames, seed=seed, grain=grain)
    return np.stack([wide[:, step * i : step * i + width] for i in range(num_frames)])


def moving_square(num_frames: int, *, step: int, side: int = 72, height: int = 144, width=256):
    """A textured square moves by `step` px a frame over a flat ground."""
    frames = np.full((num_frames, height, width, 3), 120, np.uint8)
    patch = texture(side, side, seed=3)
    top = (height - side) // 2
    for index, frame in enumerate(frames):
        left = 10 + step * index
        frame[top : top + side, left : left + side] = patch
    return frames


def still(num_frames: int, *, height: int = 144, width: int = 256, seed: int = 0) -> np.ndarray:
    """A picture that does not move."""
    return np.repeat(texture(height, width, seed=seed)[None], num_frames, axis=0)


def flat(num_frames: int, color: Sequence[int], *, height: int = 144, width: int = 256):
    """One colour."""
    return np.full((num_frames, height, width, 3), color, np.uint8)


def letterboxed(frames: np.ndarray, bar_px: int) -> np.ndarray:
    """Add black bars above and below."""
    return np.pad(frames, ((0, 0), (bar_px, bar_px), (0, 0), (0, 0)))


def save_video(
    path: Path,
    frames: np.ndarray,
    fps: float = 24.0,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_s: Sequence[float] | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Write a foreign file with B-frames and open GOPs where the codec has them."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(path.as_posix(), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "12", "bf": "2"}
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        base = Fraction(1, 1000) if times_s is not None else 1 / rate
        stream.codec_context.time_base = base
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = index if times_s is None else round(times_s[index] / base)
            picture.time_base = base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def save_sound(path: Path) -> Path:
    """Write a file without any picture."""
    with av.open(path.as_posix(), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for index in range(20):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_rotation(path: Path, degrees_clockwise: int) -> Path:
    """Patch the display matrix of an MP4 file, as a telephone held upright writes it."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_clockwise]
    one = 1 << 16
    matrix = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return path


def save_bomb(
    path: Path,
    *,
    side: int,
    num_frames: int,
    fps: int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    noise: bool = False,
    num_kept: int = 0,
) -> Path:
    """Write a file whose pictures are huge when decoded: two are encoded and repeated.

    Without `noise` they are of one colour, and the file is small. With `num_kept` (H.264) all are
    encoded, and a decoder has to keep so many.
    """
    options = {}
    if codec == "libx264":
        length = num_frames if num_kept else 1
        x264 = f"ref={num_kept or 1}:bframes=0:rc-lookahead=0"
        options = {"preset": "ultrafast", "crf": "40", "g": f"{length}", "x264-params": x264}
    random = np.random.default_rng(0)
    with av.open(path.as_posix(), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height = stream.width = side
        stream.pix_fmt = pix_fmt
        packets = []
        for index in range(num_frames if num_kept else 2):
            frame = av.VideoFrame(side, side, pix_fmt)
            for plane in frame.planes:
                data = random.bytes(plane.buffer_size) if noise else bytes(plane.buffer_size)
                plane.update(data)
            frame.pts = index
            packets += stream.encode(frame)
        packets += stream.encode(None)
        base = Fraction(1, fps)
        for index in range(num_frames):
            packet = av.Packet(bytes(packets[index % len(packets)]))
            packet.stream, packet.time_base = stream, base
            packet.pts = packet.dts = index
            packet.is_keyframe = packets[index % len(packets)].is_keyframe
            container.mux(packet)
    return path
