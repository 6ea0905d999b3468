"""What a foreign file is, and its normalised clips: found out in a limited child process.

A foreign file may be damaged or hostile. It is never opened by a decoder in this process: its
first bytes choose the demuxer, it is copied under a neutral name, and a child with limits on
memory, CPU time, file size and wall time, without credentials and (where the platform allows)
without network, decodes it once and writes H.264 clips. Whatever happens to the child, the
caller gets clips or a reason.
"""

import hashlib
import io
import logging
import os
import signal
import stat
import threading
import time
from pathlib import Path

from pydantic import Field, ValidationError

from ursa.artifacts import ClipScores, CroppedPixels, FailureReason, VideoInfo
from ursa.config import FrozenModel, IngestionConfig
from ursa.errors import StorageConfigurationError, VideoDecodeError
from ursa.video.containers import HEAD_BYTES, Demuxer, describe_content, detect_demuxer
from ursa.video.fork_server import EXIT_DISK_FULL, STDERR_NAME, ForkServer
from ursa.video.sandbox import last_words

logger = logging.getLogger(__name__)

INPUT_NAME = "input"
RESULT_NAME = "result.json"
PROGRESS_NAME = "progress"
EARNED_S = 2.0
"""How much longer the child may take for every second of video that it has finished, and as much
processor time is its due for every second read and for every second of clips written."""
RESULT_LIMIT_BYTES = 32 << 20
DISK_FULL = "disk_full"

_CHUNK_BYTES = 1 << 20
_DETAIL_CHARACTERS = 500

_own = threading.local()


class QuarantinedError(VideoDecodeError):
    """A file yields no clips; the first argument is the reason, the second says more."""

    @property
    def reason(self) -> FailureReason:
        """Why."""
        return FailureReason(self.args[0])

    @property
    def detail(self) -> str:
        """What was found, in words."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class NormalisedClip(FrozenModel):
    """One clip that the child has written."""

    file_name: str = Field(pattern=r"^clip-\d{5}\.mp4$")
    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)
    info: VideoInfo
    cropped_px: CroppedPixels
    scores: ClipScores


class NormalisedVideo(FrozenModel):
    """What the child found in a file; `clips` are beside the result."""

    info: VideoInfo
    clips: tuple[NormalisedClip, ...]
    num_dropped_shots: int = Field(ge=0)
    num_decode_errors: int = Field(ge=0)


class ChildRequest(FrozenModel):
    """What the child is asked to do, in the folder in which it is started."""

    demuxer: Demuxer
    config: IngestionConfig


class ChildResult(FrozenModel):
    """What the child answers: a video, or a reason; `failure` may also be `DISK_FULL`."""

    video: NormalisedVideo | None
    failure: str | None
    detail: str
    peak_memory_bytes: int = Field(ge=0)


def copy_foreign_file(
    path: Path,
    folder: Path,
    config: IngestionConfig,
    *,
    offset_bytes: int = 0,
    num_bytes: int | None = None,
) -> tuple[str, Demuxer]:
    """Copy a foreign file, or a part of one, to `folder/input` if it may be a video.

    The copy has a neutral name and cannot change while it is decoded. Only a regular file is
    read: opening a pipe with a video name would block for ever.

    Args:
        path: The foreign file.
        folder: Private directory of the caller.
        config: Limits.
        offset_bytes: Where the part begins.
        num_bytes: How long the part is; None goes to the end of the file.

    Returns:
        sha256 of the content and the demuxer to use.

    Raises:
        QuarantinedError: If it is no regular file, empty, too large, unreadable or no video.
        StorageConfigurationError: If there is no room for the copy.
    """
    with _open_regular(path) as source:
        source.seek(offset_bytes)
        if num_bytes is None:
            num_bytes = os.fstat(source.fileno()).st_size - offset_bytes
        if num_bytes == 0:
            raise QuarantinedError(FailureReason.EMPTY_FILE, "0 bytes")
        if num_bytes > config.max_file_bytes:
            raise QuarantinedError(
                FailureReason.FILE_TOO_LARGE,
                f"{num_bytes} bytes, expected at most {config.max_file_bytes}",
            )
        chunk = _read(source, min(HEAD_BYTES, num_bytes))
        demuxer = detect_demuxer(chunk)
        if demuxer is None:
            raise QuarantinedError(FailureReason.NOT_A_VIDEO, describe_content(chunk))
        digest = hashlib.sha256()
        try:
            with (folder / INPUT_NAME).open("xb") as target:
                while chunk:
                    digest.update(chunk)
                    target.write(chunk)
                    num_bytes -= len(chunk)
                    chunk = _read(source, min(_CHUNK_BYTES, num_bytes))
        except OSError as error:
            raise StorageConfigurationError(
                f"cannot copy {path} to {folder} ({error.strerror}); free some space there or set "
                "TMPDIR to another directory"
            ) from error
    return digest.hexdigest(), demuxer


def _open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file; anything else is refused without waiting for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        mode = _mode(path)
        if stat.S_ISLNK(mode):
            raise QuarantinedError(
                FailureReason.NOT_REGULAR_FILE, "a link; links are not followed"
            ) from error
        # a regular file, or none at the moment: another day it may open
        other = mode != 0 and not stat.S_ISREG(mode)
        reason = FailureReason.NOT_REGULAR_FILE if other else FailureReason.UNAVAILABLE
        raise QuarantinedError(reason, f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise QuarantinedError(FailureReason.NOT_REGULAR_FILE, "a pipe, device or directory")
    return os.fdopen(descriptor, "rb")


def _read(source: io.BufferedReader, num_bytes: int) -> bytes:
    try:
        return source.read(num_bytes)
    except OSError as error:
        raise QuarantinedError(
            FailureReason.UNAVAILABLE, f"cannot be read: {error.strerror}"
        ) from error


def normalise_video(folder: Path, demuxer: Demuxer, config: IngestionConfig) -> NormalisedVideo:
    """Decode `folder/input` in a limited child process and write its clips beside it.

    Takes at most `child_timeout_s`, and `EARNED_S` more for every second of video that the child
    has finished by then, so that long videos can be read and files that lead nowhere are given up.
    The processor time is bounded in the same way but more strictly: `child_cpu_s`, or `EARNED_S`
    for every second finished if that is more. So a file that is slow to decode is given up after
    `child_cpu_s`, and a busy machine takes nothing from a file that is not.
    The child has at most `child_memory_bytes`.

    Args:
        folder: Private directory with the copied file; the child works in it.
        demuxer: FFmpeg demuxer to force.
        config: Limits, and what clips shall be like.

    Returns:
        What the file is, and its clips.

    Raises:
        QuarantinedError: If the file yields no clips.
        StorageConfigurationError: If there is no room for the clips.
    """
    request = ChildRequest(demuxer=demuxer, config=config)
    code = _fork_server().run(
        folder, request.model_dump_json(), _Deadline(folder, config.child_timeout_s).check
    )
    if code not in (0, EXIT_DISK_FULL):
        raise _explain_exit(code, folder)
    result = _read_result(folder) if code == 0 else None
    if result is None or result.failure == DISK_FULL:
        raise StorageConfigurationError(
            f"disk full while writing clips to {folder}; free some space there or set TMPDIR to "
            "another directory"
        )
    logger.debug("child used %d MB", result.peak_memory_bytes >> 20)
    if result.video is None:
        raise QuarantinedError(
            FailureReason(result.failure or FailureReason.CRASHED),
            result.detail[:_DETAIL_CHARACTERS],
        )
    return result.video


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return stat.S_IFREG


def _fork_server() -> ForkServer:
    """Return the process of this thread that forks what decodes; it is started once."""
    server: ForkServer | None = getattr(_own, "server", None)
    if server is None or not server.is_open:
        server = _own.server = ForkServer("ursa.video.normalise")
    return server


class _Deadline:
    """When a child is given up; a second of finished video earns it `EARNED_S` more."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self._start_s = time.monotonic()
        self._finished_s = 0.0

    def check(self) -> None:
        """Raise QuarantinedError if it is time."""
        self._finished_s = max(self._finished_s, _finished_s(self._folder))
        used_s = time.monotonic() - self._start_s
        if used_s > self._timeout_s + EARNED_S * self._finished_s:
            raise QuarantinedError(FailureReason.TIMEOUT, f"not done after {used_s:.1f} s")


def _finished_s(folder: Path) -> float:
    try:
        return float((folder / PROGRESS_NAME).read_bytes()[:32] or 0)
    except (OSError, ValueError):
        return 0.0


def _read_result(folder: Path) -> ChildResult:
    path = folder / RESULT_NAME
    try:
        if path.stat().st_size > RESULT_LIMIT_BYTES:
            raise QuarantinedError(FailureReason.CRASHED, "the answer of the child is too long")
        return ChildResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise QuarantinedError(
            FailureReason.CRASHED, f"no valid answer: {_last_words(folder)}"
        ) from error


def _explain_exit(code: int, folder: Path) -> QuarantinedError:
    if code == -signal.SIGXCPU:
        return QuarantinedError(FailureReason.TIMEOUT, "CPU time limit reached")
    if code == -signal.SIGKILL:
        return QuarantinedError(FailureReason.OUT_OF_MEMORY, "killed by the system (SIGKILL)")
    if code < 0:
        name = signal.Signals(-code).name
        return QuarantinedError(FailureReason.CRASHED, f"the decoder crashed with {name}")
    return QuarantinedError(FailureReason.CRASHED, f"exit code {code}: {_last_words(folder)}")


def _last_words(folder: Path) -> str:
    """Return the last line that the child wrote to its standard error."""
    try:
        with (folder / STDERR_NAME).open("rb") as file:
            file.seek(max(0, (folder / STDERR_NAME).stat().st_size - 4096))
            return last_words(file.read())
    except OSError:
        return "nothing"
