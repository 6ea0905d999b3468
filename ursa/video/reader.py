"""Read frames of our own clips in a child process, so that no clip can take this one down.

Decoders crash, hang and use memory without bound on some files, ours included. A `ClipReader` has a
child that decodes one clip after another within limits of memory and time. What a clip does to the
child is an error of that clip; the next one is read by a new child. Frames come back through a
socket while the child decodes nothing else, so whoever asks for one clip at a time holds one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import cv2
import numpy as np

from ursa.errors import ClipUnavailableError, ServiceError, VideoDecodeError
from ursa.video.decode import FrameSize, read_frames_at
from ursa.video.sandbox import child_command, child_environment, last_words, limit_process

ATTEMPTS = 3
"""A child may also die because memory is short for a moment; then the clip is not to blame."""
DEADLINE_S = 60.0
"""For all frames of one clip, which take a fraction of a second."""
MEMORY_BYTES = 3 << 30
CLIPS_PER_CHILD = 1000
"""A new child after that many: decoders lose memory."""

_START_DEADLINE_S = 120.0
_MAX_LINE_BYTES = 1 << 20
_LEAST_WAIT_S = 0.01
_READY = b"ready\n"


# what a decoder dies of by itself, on our own clips each time; others end it from outside
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)


class _ChildFailedError(Exception):
    """The child did not answer."""


class _ChildCrashedError(_ChildFailedError):
    """The decoder has crashed."""


class ClipReader:
    """Reads frames of normalised clips in a limited child process; for one thread at a time.

    The child is started by the first `read` and ends with this object or this process.
    """

    def __init__(self, *, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        """Keep the limits; nothing is started.

        Args:
            deadline_s: Longest time for one clip, seconds.
            memory_bytes: Address space of the child.
        """
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._child: _Child | None = None
        self._in_use = threading.Lock()

    def read(
        self, path: Path, indices: Sequence[int], sizes: Sequence[FrameSize]
    ) -> list[np.ndarray]:
        """Return chosen frames of a normalised clip in several sizes, decoded once.

        Args:
            path: Local file of a normalised clip.
            indices: Frame numbers from 0, in any order, repeats allowed.
            sizes: Sizes of the results.

        Returns:
            One array a size: RGB frames, shape (T, height_px, width_px, 3), uint8.

        Raises:
            VideoDecodeError: If the file cannot be read or has no such frame, or if the decoder
                crashed each of `ATTEMPTS` times; says how.
            ClipUnavailableError: If it took too long, was killed or had not the memory; another
                time may be better.
            ServiceError: If no child can be started.
        """
        request = {
            "path": os.path.abspath(path),  # noqa: PTH100  (links are not resolved)
            "indices": [int(index) for index in indices],
            "sizes": [list(size) for size in sizes],
        }
        failures: list[_ChildFailedError] = []
        with self._in_use:
            for _ in range(ATTEMPTS):
                if self._child is None:
                    self._child = _Child(self._memory_bytes)
                try:
                    frames = self._child.ask(request, time.monotonic() + self._deadline_s)
                except _ChildFailedError as error:
                    failures.append(error)
                    self._close()
                except VideoDecodeError:
                    raise
                except BaseException:
                    self._close()  # what it still sends is not wanted
                    raise
                else:
                    if self._child.num_clips >= CLIPS_PER_CHILD:
                        self._close()
                    return frames
        is_to_blame = all(isinstance(failure, _ChildCrashedError) for failure in failures)
        kind = VideoDecodeError if is_to_blame else ClipUnavailableError
        raise kind(f"{path}: the decoder {failures[-1]} in each of {ATTEMPTS} attempts")

    def close(self) -> None:
        """End the child; a later `read` starts another one."""
        with self._in_use:
            self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Child:
    """One child process and the socket that leads to it."""

    def __init__(self, memory_bytes: int) -> None:
        self.num_clips = 0
        self._socket, theirs = socket.socketpair()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `_end`)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own module)
                [*child_command("ursa.video.reader"), str(memory_bytes)],
                cwd=tempfile.gettempdir(),
                env=child_environment(),
                stdin=theirs.fileno(),
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,
            )
        self.close = weakref.finalize(self, _end, self._process, self._socket, self._stderr)
        try:
            self._line(time.monotonic() + _START_DEADLINE_S)
        except _ChildFailedError as error:
            self.close()
            raise ServiceError(
                f"the process that decodes clips {error} while it started; check the free memory "
                "and the number of processes allowed"
            ) from error

    def ask(self, request: dict[str, Any], deadline_s: float) -> list[np.ndarray]:
        """Send a request and return the frames of the answer."""
        self._socket.settimeout(max(_LEAST_WAIT_S, deadline_s - time.monotonic()))
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise _ChildFailedError("took too long") from None
        except OSError:
            raise self._death() from None
        self.num_clips += 1
        answer = json.loads(self._line(deadline_s))
        if "error" in answer:
            kind = ClipUnavailableError if answer["transient"] else VideoDecodeError
            raise kind(answer["error"])
        results = [np.empty(shape, np.uint8) for shape in answer["shapes"]]
        for frames in results:
            self._fill(frames.data.cast("B"), deadline_s)
        return results

    def _line(self, deadline_s: float) -> bytes:
        line = bytearray()
        # to the newline and no further: frames follow
        while not line.endswith(b"\n"):
            peeked = self._receive(lambda: self._socket.recv(4096, socket.MSG_PEEK), deadline_s)
            end = peeked.find(b"\n") + 1 or len(peeked)
            line += self._socket.recv(end)
            if len(line) > _MAX_LINE_BYTES:
                raise _ChildFailedError("answered wrongly")
        return bytes(line)

    def _fill(self, view: memoryview, deadline_s: float) -> None:
        while len(view):
            view = view[self._receive(lambda v=view: self._socket.recv_into(v), deadline_s) :]

    def _receive(self, call: Any, deadline_s: float) -> Any:
        self._socket.settimeout(max(_LEAST_WAIT_S, deadline_s - time.monotonic()))
        try:
            received = call()
        except TimeoutError:
            raise _ChildFailedError("took too long") from None
        except OSError:
            raise self._death() from None
        if not received:
            raise self._death()
        return received

    def _death(self) -> _ChildFailedError:
        """Say how the child ended; it has closed its end of the socket."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return _ChildFailedError("closed the connection")
        self._stderr.seek(0)
        words = last_words(self._stderr.read()[-4096:])
        if code < 0:
            kind = _ChildCrashedError if -code in _CRASHES else _ChildFailedError
            return kind(f"died with {signal.Signals(-code).name} ({words})")
        return _ChildFailedError(f"ended with exit code {code} ({words})")


def _end(process: "subprocess.Popen[bytes]", connection: socket.socket, stderr: IO[bytes]) -> None:
    connection.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    stderr.close()


def main() -> None:
    """Answer requests from the socket at standard input until it is closed."""
    limit_process(memory_bytes=int(sys.argv[1]), written_bytes=1 << 20)
    cv2.setNumThreads(1)
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rb") as requests:
        connection.sendall(_READY)
        for line in requests:
            request = json.loads(line)
            try:
                frames = read_frames_at(
                    Path(request["path"]),
                    request["indices"],
                    [FrameSize(*size) for size in request["sizes"]],
                )
            except (VideoDecodeError, MemoryError, cv2.error) as error:
                reason, is_short = str(error), isinstance(error, MemoryError)
                if is_short:
                    reason = f"{request['path']}: needs more memory than allowed ({error})"
                answer = {"error": reason, "transient": is_short}
                connection.sendall(json.dumps(answer).encode() + b"\n")
                continue
            shapes = {"shapes": [each.shape for each in frames]}
            connection.sendall(json.dumps(shapes).encode() + b"\n")
            for each in frames:
                connection.sendall(each.data.cast("B"))


if __name__ == "__main__":
    main()
