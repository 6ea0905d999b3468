"""The child process that decodes one foreign file into clips; see `ursa.video.probe`.

Frames are decoded once, in order. What is shown at time k / clip_fps becomes frame k, whatever
the numbering, order or claims of the file; the first frame is time zero. Only one shot at a time
is kept, on disk.
"""

import errno
import math
import mmap
import os
import resource
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.logging
import cv2
import numpy as np
from av.stream import Disposition

from ursa.artifacts import CroppedPixels, FailureReason, VideoInfo
from ursa.config import IngestionConfig
from ursa.errors import VideoDecodeError
from ursa.video.borders import NO_MARGINS, Margins, brighter_of, even_margins, find_bars
from ursa.video.clock import FrameClock
from ursa.video.decode import verify_clip
from ursa.video.encode import VideoWriter
from ursa.video.fork_server import serve
from ursa.video.probe import (
    DISK_FULL,
    EARNED_S,
    INPUT_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    ChildRequest,
    ChildResult,
    NormalisedClip,
    NormalisedVideo,
    QuarantinedError,
)
from ursa.video.sandbox import limit_process, move_cpu_limit
from ursa.video.scores import ClipMeter
from ursa.video.shots import Boundary, ShotDetector, cut_spans, frame_limits, lookback_s

BLOCK_CLIPS = 4
"""A shot longer than this many greatest clips is cut while it is read, to bound the disk used."""
DETECTOR_WIDTH_PX = 256
"""Width of the pictures that shots are detected on, pixels."""
MIN_OUTPUT_PX = 32
PROGRESS_INTERVAL_S = 1.0
MAX_WRITTEN_BYTES = 4 << 30
MAX_BAD_PACKET_FRACTION = 0.5
RATE_CHECK_S = 30.0
"""A video that is too slow over this long is given up: a slow one costs as much as a fast one."""
HEADROOM_BYTES = 16 << 20
HEADROOM_FRAMES = 3
"""Room for this much more must be left when a decoder fails, else memory is the cause."""

MAX_PIXELS_PER_BYTE = 500_000
"""What the length of a video adds to `pixel_budget` is at most this for every byte of its file: a
GIF of 2 KB may claim minutes of huge pictures. Of moving pictures a byte holds 10 to 100 pixels.
It holds the most of one in which nothing changes: measured are 98 bytes of H.264, 46 of VP9 and 28
of AV1 for each at 1080p, 267, 72 and 32 at 2160p, which is 21,000 to 256,000 pixels a byte."""

_ROUNDING = 1e-6


class Geometry(NamedTuple):
    """How coded frames become upright pictures with square pixels."""

    coded_width_px: int
    coded_height_px: int
    rotation_deg: int
    display_width_px: int
    display_height_px: int
    width_px: int
    height_px: int

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height of the upright source with square pixels, pixels."""
        return self.display_width_px, self.display_height_px


class TimedFrame(NamedTuple):
    """A decoded frame and when it is shown, counted from the first one."""

    frame: av.VideoFrame
    time_s: float
    is_break: bool


def plan_geometry(
    width_px: int, height_px: int, *, pixel_aspect: Fraction, rotation_deg: int, max_height_px: int
) -> Geometry:
    """Return how frames are scaled and turned.

    Args:
        width_px: Coded width.
        height_px: Coded height.
        pixel_aspect: Width of a pixel over its height; nonsense counts as 1.
        rotation_deg: Turn counter-clockwise that makes frames upright, degrees.
        max_height_px: Greatest height of the result.
    """
    quarter_turns = round(rotation_deg / 90) % 4
    aspect = pixel_aspect if Fraction(1, 8) <= pixel_aspect <= 8 else Fraction(1)
    display_width, display_height = max(1, round(width_px * aspect)), height_px
    if quarter_turns % 2:
        display_width, display_height = display_height, display_width
    scale = min(1.0, max_height_px / display_height)
    return Geometry(
        coded_width_px=width_px,
        coded_height_px=height_px,
        rotation_deg=90 * quarter_turns,
        display_width_px=display_width,
        display_height_px=display_height,
        width_px=max(2, 2 * round(display_width * scale / 2)),
        height_px=max(2, 2 * math.floor(display_height * scale / 2 + _ROUNDING)),
    )


def upright_picture(frame: av.VideoFrame, geometry: Geometry) -> np.ndarray:
    """Return a frame scaled and turned, RGB, shape (height_px, width_px, 3), uint8.

    Args:
        frame: As it was decoded.
        geometry: How it is scaled and turned.
    """
    width_px, height_px = geometry.width_px, geometry.height_px
    quarter_turns = geometry.rotation_deg // 90
    if quarter_turns % 2:
        width_px, height_px = height_px, width_px
    # one thread: by default every frame starts as many as there are processors
    picture = frame.to_ndarray(
        format="rgb24", width=width_px, height=height_px, interpolation="AREA", threads=1
    )
    return np.ascontiguousarray(np.rot90(picture, quarter_turns))


class ForeignVideo:
    """The first video stream of a foreign file, decoded once in order within limits."""

    def __init__(self, container: av.container.InputContainer, config: IngestionConfig) -> None:
        """Look at the stream, before any frame is decoded.

        Args:
            container: The opened file.
            config: Limits.

        Raises:
            QuarantinedError: If there is no usable stream, or what it claims exceeds the limits.
        """
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise QuarantinedError(FailureReason.NO_VIDEO_STREAM, "no video stream")
        self._container = container
        self._stream = streams[0]
        self._config = config
        context: Any = self._stream.codec_context
        if context is None:
            raise QuarantinedError(FailureReason.UNREADABLE, "no decoder for its codec")
        self.codec = str(context.codec.canonical_name)
        if context.width and context.height:
            self._check_size(context.width, context.height)
            claimed_pixels = context.width * context.height * self._stream.frames
            self._check_pixels(claimed_pixels, self._claimed_s())
        context.thread_count = 1
        context.options = {"max_pixels": str(config.max_side_px**2)}
        self._decoded_pixels = 0
        self.num_frames = 0
        self.num_packets = 0
        self.num_bad_packets = 0
        self.duration_s = 0.0

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel over its height."""
        return Fraction(self._stream.sample_aspect_ratio or 1)

    @property
    def fps(self) -> float:
        """Frames decoded a second."""
        return self.num_frames / self.duration_s if self.duration_s > 0 else 0.0

    def frames(self) -> Iterator[TimedFrame]:
        """Decode all frames; `duration_s` is right after the last one.

        Yields:
            Frames in display order, from time zero, whose times never fall.

        Raises:
            QuarantinedError: If a limit is exceeded.
        """
        nominal_s = self._nominal_frame_s()
        clock = FrameClock(nominal_s)
        for frame in self._decoded():
            self._check_size(frame.width, frame.height)
            time_s, is_break = clock.advance(*_timestamps(frame))
            self._decoded_pixels += frame.width * frame.height
            self._check_pixels(self._decoded_pixels, time_s)
            if time_s > self._config.max_duration_s:
                raise QuarantinedError(
                    FailureReason.TOO_LONG,
                    f"{time_s:.1f} s and more, expected at most {self._config.max_duration_s:g} s",
                )
            self.num_frames += 1
            shown_s = float(frame.duration * (frame.time_base or 0))
            self.duration_s = time_s + (shown_s if 0 < shown_s <= 1 else nominal_s)
            if time_s > RATE_CHECK_S:
                self.check_rate()
            yield TimedFrame(frame, time_s, is_break)

    def check_rate(self) -> None:
        """Raise QuarantinedError if there are too few frames a second so far."""
        if self.num_frames > 1 and self.fps < self._config.min_fps:
            raise QuarantinedError(
                FailureReason.FPS_TOO_LOW,
                f"{self.fps:.2f} frames per second, expected at least {self._config.min_fps:g}",
            )

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Decode packet by packet; damaged ones are counted and passed over."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except av.error.FFmpegError as error:
                _reraise_exhaustion(error)
                self.num_bad_packets += 1
                return
            self.num_packets += 1
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                _reraise_exhaustion(error)
                self._check_headroom()
                self.num_bad_packets += 1

    def _claimed_s(self) -> float:
        """Return how long the video lasts by what is said of it, at most the greatest duration."""
        stream = self._stream
        claims = (
            stream.frames * self._nominal_frame_s(),
            float((stream.duration or 0) * (stream.time_base or 0)),
            (self._container.duration or 0) / av.time_base,
        )
        return min(max(claims), self._config.max_duration_s)

    def _nominal_frame_s(self) -> float:
        rate = self._stream.average_rate or self._stream.guessed_rate
        if rate is None or not 1 <= rate <= 1000:
            return 1 / 25
        return float(1 / rate)

    def _check_headroom(self) -> None:
        """Raise MemoryError if there is no room for pictures: decoders then blame the data."""
        context = self._stream.codec_context
        needed = HEADROOM_BYTES + HEADROOM_FRAMES * 2 * context.width * context.height
        try:
            mmap.mmap(-1, needed).close()
        except OSError as error:
            raise MemoryError(
                f"no room for pictures of {context.width} x {context.height} px"
            ) from error

    def _check_size(self, width_px: int, height_px: int) -> None:
        config = self._config
        size = f"{width_px} x {height_px} px"
        if max(width_px, height_px) > config.max_side_px:
            raise QuarantinedError(
                FailureReason.RESOLUTION_TOO_HIGH,
                f"{size}, expected at most {config.max_side_px} px a side",
            )
        if min(width_px, height_px) < config.min_side_px:
            raise QuarantinedError(
                FailureReason.RESOLUTION_TOO_LOW,
                f"{size}, expected at least {config.min_side_px} px a side",
            )

    def _check_pixels(self, num_pixels: int, seconds: float) -> None:
        config = self._config
        earned = min(
            math.floor(config.pixel_budget_per_s * seconds),
            MAX_PIXELS_PER_BYTE * self._container.size,
        )
        budget = config.pixel_budget + earned
        if num_pixels > budget:
            raise QuarantinedError(
                FailureReason.PIXEL_BUDGET,
                f"{num_pixels} pixels in {seconds:.1f} s and {self._container.size} bytes, "
                f"expected at most {budget}",
            )


class ClipSink:
    """Keeps the frames of the running shot on disk and writes its clips when it ends."""

    def __init__(self, folder: Path, config: IngestionConfig) -> None:
        """Start before the first frame.

        Args:
            folder: Where clips, the running shot and the progress are written.
            config: Rate and length of clips, and whether bars are cut off.
        """
        self._folder = folder
        self._fps = config.clip_fps
        self._cpu_s = config.child_cpu_s
        self._writing_s = 0.0
        self._crops = config.crop_borders
        self._shortest, self._longest = frame_limits(
            config.min_clip_s, config.max_clip_s, config.clip_fps
        )
        # a boundary may be found so late
        lookback = math.ceil(lookback_s(config) * config.clip_fps) + 1
        self._block = BLOCK_CLIPS * self._longest + max(self._longest, lookback)
        self._spool = (folder / "spool").open("w+b")
        self._progress = folder / PROGRESS_NAME
        self._report_interval = PROGRESS_INTERVAL_S * config.clip_fps
        self._next_report = self._report_interval
        self._shape: tuple[int, int, int] = (0, 0, 0)
        self._display_size = (0, 0)
        self._shot_start = 0
        self._spooled = 0
        self._has_clips = False
        self.clips: list[NormalisedClip] = []
        self.num_dropped_shots = 0

    @property
    def num_frames(self) -> int:
        """Frames taken in so far, over all shots."""
        return self._shot_start + self._spooled

    def add(self, picture: np.ndarray, display_size: tuple[int, int]) -> None:
        """Take in the next frame of the running shot.

        Args:
            picture: RGB picture, shape (H, W, 3), uint8; the same shape throughout a shot.
            display_size: Width and height of the upright source with square pixels, pixels.

        Raises:
            VideoDecodeError: If a long shot is cut and a clip does not read back as it was written.
        """
        if self.num_frames >= self._next_report:
            finished_s = self.num_frames / self._fps
            # whole or not at all: the parent may read at any moment
            fresh = self._progress.with_suffix(".new")
            fresh.write_text(f"{finished_s:.3f}", encoding="ascii")
            fresh.replace(self._progress)
            self._next_report += self._report_interval
            self._allow_cpu(self._writing_s)
        self._shape = picture.shape
        self._display_size = display_size
        self._spool.write(picture.data)
        self._spooled += 1
        if self._spooled == self._block:
            num_written = BLOCK_CLIPS * self._longest
            self._write_clips(num_written)
            self._drop(num_written)
            self._has_clips = True

    def end_shot(self) -> None:
        """Write the clips of the running shot and begin another one.

        Raises:
            VideoDecodeError: If a clip does not read back as it was written.
        """
        self.cut(self.num_frames, self.num_frames)

    def cut(self, start: int, stop: int) -> None:
        """End the running shot before a frame, and begin another one with a later frame.

        Args:
            start: Frame after the last of the shot that ends; frames count over all shots.
            stop: First frame of the shot that begins; those between are left out.

        Raises:
            VideoDecodeError: If a clip does not read back as it was written.
        """
        num_frames = max(0, start - self._shot_start)
        if not self._write_clips(num_frames) and num_frames and not self._has_clips:
            self.num_dropped_shots += 1
        self._drop(max(num_frames, stop - self._shot_start))
        self._has_clips = False

    def _write_clips(self, num_frames: int) -> int:
        """Write the clips in the first frames of the running shot; return their number."""
        spans = cut_spans(num_frames, self._shortest, self._longest)
        # how much is written depends on the configuration, not on the file
        start_s = time.process_time()
        self._allow_cpu(self._writing_s + self._cpu_s + EARNED_S * num_frames / self._fps)
        margins = self._margins(num_frames) if spans and self._crops else NO_MARGINS
        for start, stop in spans:
            self._write_clip(start, stop, margins)
        self._writing_s += time.process_time() - start_s
        self._allow_cpu(self._writing_s)
        return len(spans)

    def _allow_cpu(self, writing_s: float) -> None:
        """Bound the processor time by what has been read, and by what writing may take."""
        read_s = self.num_frames / self._fps + PROGRESS_INTERVAL_S
        move_cpu_limit(max(self._cpu_s, EARNED_S * read_s) + writing_s)

    def _margins(self, num_frames: int) -> Margins:
        """Return what is to be cut around the picture, all through these frames."""
        height_px, width_px, _ = self._shape
        brightest: np.ndarray | None = None
        for picture in self._read(0, num_frames):
            brightest = brighter_of(brightest, picture)
        if brightest is None:
            return NO_MARGINS
        margins = even_margins(find_bars(brightest), width_px, height_px)
        left_px = width_px - margins.left - margins.right
        left_height_px = height_px - margins.top - margins.bottom
        return margins if min(left_px, left_height_px) >= MIN_OUTPUT_PX else NO_MARGINS

    def _drop(self, num_frames: int) -> None:
        """Forget the first frames of the running shot."""
        num_bytes = math.prod(self._shape)
        remaining = self._spooled - num_frames
        for place in range(remaining):
            self._spool.seek((num_frames + place) * num_bytes)
            picture = self._spool.read(num_bytes)
            self._spool.seek(place * num_bytes)
            self._spool.write(picture)
        self._spool.seek(remaining * num_bytes)
        self._spool.truncate()
        self._shot_start += num_frames
        self._spooled = remaining

    def _read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        num_bytes = math.prod(self._shape)
        for place in range(start, stop):
            self._spool.seek(place * num_bytes)
            yield np.frombuffer(self._spool.read(num_bytes), np.uint8).reshape(self._shape)
        self._spool.seek(self._spooled * num_bytes)

    def _write_clip(self, start: int, stop: int, margins: Margins) -> None:
        rows = slice(margins.top, self._shape[0] - margins.bottom)
        columns = slice(margins.left, self._shape[1] - margins.right)
        height_px, width_px = rows.stop - rows.start, columns.stop - columns.start
        num_frames = stop - start
        name = f"clip-{len(self.clips):05d}.mp4"
        meter = ClipMeter(fps=self._fps, num_frames=num_frames)
        path = self._folder / name
        with VideoWriter(path, width_px=width_px, height_px=height_px, fps=self._fps) as writer:
            for whole in self._read(start, stop):
                picture = np.ascontiguousarray(whole[rows, columns])
                writer.add(picture)
                meter.add(picture)
        verify_clip(path, num_frames=num_frames, height_px=height_px, width_px=width_px)
        self.clips.append(
            NormalisedClip(
                file_name=name,
                start_s=(self._shot_start + start) / self._fps,
                end_s=(self._shot_start + stop) / self._fps,
                info=VideoInfo(
                    width_px=width_px,
                    height_px=height_px,
                    fps=self._fps,
                    num_frames=num_frames,
                    duration_s=num_frames / self._fps,
                    codec="h264",
                ),
                cropped_px=self._cropped(margins),
                scores=meter.scores(),
            )
        )

    def _cropped(self, margins: Margins) -> CroppedPixels:
        """Return margins of the scaled picture as pixels of the source."""
        across = self._display_size[0] / self._shape[1]
        down = self._display_size[1] / self._shape[0]
        return CroppedPixels(
            left=round(margins.left * across),
            top=round(margins.top * down),
            right=round(margins.right * across),
            bottom=round(margins.bottom * down),
        )


class Sampler:
    """Turns frames at their own times into pictures at a constant rate, shot by shot."""

    def __init__(self, video: ForeignVideo, sink: ClipSink, config: IngestionConfig) -> None:
        """Start before the first frame.

        Args:
            video: Where frames come from.
            sink: Where pictures go.
            config: Rate and greatest height of clips, thresholds of shots.
        """
        self._video = video
        self._sink = sink
        self._config = config
        self._detector = ShotDetector(config)
        self._positions: list[int] = []
        self._forgotten = 0
        self._held: av.VideoFrame | None = None
        self._geometry: Geometry | None = None
        self.first_geometry: Geometry | None = None

    def run(self) -> None:
        """Decode the whole video into the sink.

        Raises:
            QuarantinedError: If a limit is exceeded.
            VideoDecodeError: If a clip does not read back as it was written.
        """
        for frame, time_s, is_break in self._video.frames():
            self._flush(time_s)
            geometry = self._geometry_of(frame)
            # pictures of another size cannot be compared with those before
            if self._geometry is not None and (is_break or geometry != self._geometry):
                self._end_detection()
            self._positions.append(self._sink.num_frames)
            for boundary in self._detector.push(_detector_picture(frame), time_s):
                self._cut(boundary)
            self._held, self._geometry = frame, geometry
        # the last picture counts if at least half of it lies within the video
        self._flush(self._video.duration_s - 0.5 / self._config.clip_fps)
        self._end_detection()

    def _end_detection(self) -> None:
        """End the running shot; what comes is not compared with what was."""
        self._positions.append(self._sink.num_frames)
        for boundary in self._detector.finish():
            self._cut(boundary)
        self._sink.end_shot()
        self._detector = ShotDetector(self._config)
        self._positions.clear()
        self._forgotten = 0

    def _cut(self, boundary: Boundary) -> None:
        """Cut where frames of the file, by their numbers, were put into the sink."""
        start, stop = (self._positions[number - self._forgotten] for number in boundary)
        self._sink.cut(start, stop)
        # no boundary will lie before this one
        del self._positions[: boundary.stop - self._forgotten]
        self._forgotten = boundary.stop

    def _flush(self, until_s: float) -> None:
        """Emit the held frame for every sampling time before `until_s`."""
        if self._held is None or self._geometry is None:
            return
        picture: np.ndarray | None = None
        while self._sink.num_frames / self._config.clip_fps < until_s - _ROUNDING:
            if picture is None:
                picture = upright_picture(self._held, self._geometry)
            self._sink.add(picture, self._geometry.display_size)

    def _geometry_of(self, frame: av.VideoFrame) -> Geometry:
        known = self._geometry
        rotation = 90 * (round(frame.rotation / 90) % 4)
        if known is not None and (
            known.coded_width_px,
            known.coded_height_px,
            known.rotation_deg,
        ) == (frame.width, frame.height, rotation):
            return known
        geometry = plan_geometry(
            frame.width,
            frame.height,
            pixel_aspect=self._video.pixel_aspect,
            rotation_deg=rotation,
            max_height_px=self._config.clip_height_px,
        )
        if min(geometry.width_px, geometry.height_px) < MIN_OUTPUT_PX:
            raise QuarantinedError(
                FailureReason.RESOLUTION_TOO_LOW,
                f"{geometry.width_px} x {geometry.height_px} px after scaling, "
                f"expected at least {MIN_OUTPUT_PX} px a side",
            )
        self.first_geometry = self.first_geometry or geometry
        return geometry


def _detector_picture(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame as it is coded, scaled down, BGR."""
    width_px = min(DETECTOR_WIDTH_PX, 2 * (frame.width // 2))
    height_px = max(16, round(frame.height * width_px / frame.width))
    return frame.to_ndarray(
        format="bgr24", width=width_px, height=height_px, interpolation="AREA", threads=1
    )


def _timestamps(frame: av.VideoFrame) -> tuple[float | None, float | None]:
    base = frame.time_base
    pts = None if frame.pts is None or base is None else float(frame.pts * base)
    dts = None if frame.dts is None or base is None else float(frame.dts * base)
    return pts, dts


def normalise(folder: Path, request: ChildRequest) -> NormalisedVideo:
    """Decode `folder/input` and write its clips.

    Args:
        folder: Where the input is and the clips go.
        request: Demuxer, limits, and what clips shall be like.

    Returns:
        What the file is, and its clips.

    Raises:
        QuarantinedError: With the reason why there are no clips.
        VideoDecodeError: If a clip does not read back as it was written.
        MemoryError: If memory, not the file, is the cause.
        OSError: If the disk, not the file, is the cause.
    """
    config = request.config
    try:
        container = av.open(
            (folder / INPUT_NAME).as_posix(),
            format=request.demuxer,
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except av.error.FFmpegError as error:
        _reraise_exhaustion(error)
        raise QuarantinedError(
            FailureReason.UNREADABLE, f"cannot be opened: {error.strerror}"
        ) from error
    with container:
        video = ForeignVideo(container, config)
        sink = ClipSink(folder, config)
        sampler = Sampler(video, sink, config)
        sampler.run()
    _check_outcome(video, sink, config)
    geometry = sampler.first_geometry
    assert geometry is not None, "frames were decoded"
    return NormalisedVideo(
        info=VideoInfo(
            width_px=geometry.display_width_px,
            height_px=geometry.display_height_px,
            fps=video.fps,
            num_frames=video.num_frames,
            duration_s=video.duration_s,
            codec=video.codec,
        ),
        clips=tuple(sink.clips),
        num_dropped_shots=sink.num_dropped_shots,
        num_decode_errors=video.num_bad_packets,
    )


def _check_outcome(video: ForeignVideo, sink: ClipSink, config: IngestionConfig) -> None:
    if video.num_frames == 0:
        raise QuarantinedError(
            FailureReason.UNREADABLE,
            f"no frame could be decoded, {video.num_bad_packets} damaged packets",
        )
    if video.num_bad_packets > MAX_BAD_PACKET_FRACTION * video.num_packets:
        raise QuarantinedError(
            FailureReason.UNREADABLE,
            f"{video.num_bad_packets} of {video.num_packets} packets are damaged",
        )
    video.check_rate()
    if not sink.clips:
        raise QuarantinedError(
            FailureReason.TOO_SHORT,
            f"{video.num_frames} frames in {video.duration_s:.2f} s and no shot of at least "
            f"{config.min_clip_s:g} s",
        )


def limit_resources(config: IngestionConfig) -> None:
    """Bound what this process can do, for good; what the platform lacks is left out.

    Args:
        config: Address space in bytes and times in seconds.
    """
    # this far the limit can move: reading and writing all that a file may contain
    cpu_s = math.ceil(3 * config.child_cpu_s + 2 * EARNED_S * config.max_duration_s)
    limit_process(
        memory_bytes=config.child_memory_bytes, written_bytes=MAX_WRITTEN_BYTES, cpu_s=cpu_s
    )
    move_cpu_limit(config.child_cpu_s)
    cv2.setNumThreads(1)


def answer(folder: Path, request: ChildRequest) -> ChildResult:
    """Normalise a file; every way in which it can fail becomes a reason.

    Args:
        folder: Where the input is and the clips go.
        request: Demuxer, limits, and what clips shall be like.

    Returns:
        The video or a reason, and the greatest memory used, bytes.
    """
    video: NormalisedVideo | None = None
    failure: str | None = None
    detail = ""
    try:
        video = normalise(folder, request)
    except QuarantinedError as error:
        failure, detail = error.reason, error.detail
    except MemoryError as error:
        failure, detail = FailureReason.OUT_OF_MEMORY, str(error)
    except (OSError, av.error.FFmpegError) as error:
        failure, detail = _reason_of(error), str(error)
    except cv2.error as error:
        no_memory = error.code == cv2.Error.StsNoMem
        failure = FailureReason.OUT_OF_MEMORY if no_memory else FailureReason.CRASHED
        detail = str(error)
    except VideoDecodeError as error:
        failure, detail = FailureReason.UNREADABLE, str(error)
    peak_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ChildResult(
        video=video, failure=failure, detail=detail, peak_memory_bytes=peak_kilobytes << 10
    )


def work(text: str) -> None:
    """Answer a request in `result.json` of the working directory, with the limits that it names.

    Args:
        text: A `ChildRequest` as JSON.
    """
    request = ChildRequest.model_validate_json(text)
    limit_resources(request.config)
    av.logging.set_level(None)
    result = answer(Path(), request)
    Path(RESULT_NAME).write_text(result.model_dump_json(), encoding="utf-8")


def _reraise_exhaustion(error: Exception) -> None:
    """Raise MemoryError or OSError if that, and not the file, is the cause of a decoder error."""
    number = getattr(error, "errno", None)
    if number == errno.ENOMEM:
        raise MemoryError(str(error)) from error
    if number in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, os.strerror(number)) from error


def _reason_of(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DISK_FULL
    if number == errno.ENOMEM:
        return FailureReason.OUT_OF_MEMORY
    if number == errno.EFBIG:
        return FailureReason.PIXEL_BUDGET
    return FailureReason.UNREADABLE


if __name__ == "__main__":
    serve(work)
