"""Children that need not import what the one before them has imported.

To start Python and import decoders takes longer than to decode a short clip. So one process does
that once and forks a child for every request (`serve`); the child limits itself before it touches
a file (`ursa.video.sandbox`). The process that forks opens no file and only waits. It knows as
little of credentials as its children do, and dies with the thread that has started it.

Elsewhere than on Linux, where libraries of the system do not outlive a fork, each process answers
one request itself.
"""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from ursa.errors import ServiceError
from ursa.video.sandbox import child_command, child_environment, die_with_parent, last_words

EXIT_DISK_FULL = 74
"""Exit code of a child that could not write its answer."""
EXIT_NOT_BEGUN = 71
"""Exit code of a child that could not begin: the file is not to blame."""
STDERR_NAME = "stderr.txt"
"""What a child writes to its standard error, in the folder in which it works."""

_NO_FORK = "--no-fork"
_READY = b"ready"
_START_S = 120.0
_POLL_S = 0.2


class ForkServer:
    """A process that forks a child for every request; for the thread that has made it alone."""

    def __init__(self, module: str, *, forks: bool = sys.platform == "linux") -> None:
        """Start the process and wait until it has imported what it needs.

        Args:
            module: Dotted name of a module whose `__main__` part calls `serve`.
            forks: Whether it forks; else it is closed after one request.

        Raises:
            ServiceError: If it does not start.
        """
        self._owner_pid = os.getpid()
        try:
            self._connection, theirs = multiprocessing.Pipe()
            self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `_end`)
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  (our own module)
                    [*child_command(module), *([] if forks else [_NO_FORK])],
                    cwd=tempfile.gettempdir(),
                    env=child_environment(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    start_new_session=True,
                )
        except OSError as error:
            raise ServiceError(
                f"the process that decodes files cannot be started ({error}); check the free "
                "memory and disk, and the number of processes and open files allowed"
            ) from error
        self.close = weakref.finalize(self, _end, self._process, self._connection, self._stderr)
        try:
            self._receive(_START_S)
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it can be asked, by this process."""
        return self.close.alive and self._owner_pid == os.getpid()

    def run(self, folder: Path, request: str, check: Callable[[], None]) -> int:
        """Have a child answer a request.

        Args:
            folder: Where the child works.
            request: What `serve` hands to the work.
            check: Called several times a second; what it raises ends the child, and this process.

        Returns:
            Exit code of the child, or the negative signal that ended it.

        Raises:
            ServiceError: If the process that forks is lost, or the child cannot begin.
        """
        pid: int | None = None
        try:
            message = json.dumps({"folder": str(folder), "request": request})
            with self._explained():
                self._connection.send_bytes(message.encode())
            pid = int(self._receive(_START_S))
            while not self._connection.poll(_POLL_S):
                check()
            code = int(self._receive()) if pid != self._process.pid else self._process.wait()
        except BaseException:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            self.close()
            raise
        if pid == self._process.pid:
            self.close()
        if code == EXIT_NOT_BEGUN:
            raise ServiceError(
                f"a process that decodes could not begin to work in {folder}; check that the "
                "folder is there, may be written, and has room"
            )
        return code

    def _receive(self, limit_s: float | None = None) -> bytes:
        with self._explained():
            if self._connection.poll(limit_s):
                return self._connection.recv_bytes()
        raise ServiceError(
            f"the process that decodes files did not answer within {limit_s} s; check the load and "
            "the free memory"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the end of the connection into an error that says why."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._stderr.seek(0)
            words = last_words(self._stderr.read()[-4096:])
            raise ServiceError(
                f"the process that decodes files ended with {self._process.returncode} ({words}); "
                "check the free memory and the number of processes allowed"
            ) from error


def _end(process: "subprocess.Popen[bytes]", connection: Connection, stderr: IO[bytes]) -> None:
    connection.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    stderr.close()


def serve(work: Callable[[str], None]) -> None:
    """Fork a child for every request that comes through standard input, until that is closed.

    Args:
        work: Called in the child, in the folder of the request, with its text; the child exits with
            0 when it returns, with `EXIT_DISK_FULL` or 1 if it raises.
    """
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody can wait for a child
    forks = _NO_FORK not in sys.argv
    with Connection(os.dup(0)) as connection:
        gc.freeze()  # what is collected is written to, and so no longer shared
        connection.send_bytes(_READY)
        while True:
            try:
                message = json.loads(connection.recv_bytes())
            except EOFError:
                return
            server_pid = os.getpid() if forks else None
            pid = os.fork() if forks else 0
            if not forks:  # the connection ends with this process
                connection.send_bytes(str(os.getpid()).encode())
            elif pid == 0:
                connection.close()
            if pid == 0:
                _work(work, server_pid, **message)
            with contextlib.suppress(OSError):  # the child was faster
                os.setpgid(pid, pid)
            connection.send_bytes(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            connection.send_bytes(str(os.waitstatus_to_exitcode(status)).encode())


def _work(work: Callable[[str], None], server_pid: int | None, folder: str, request: str) -> None:
    """Do the work of a child and end this process."""
    code = EXIT_NOT_BEGUN
    try:
        die_with_parent()
        if server_pid is not None and os.getppid() != server_pid:
            return  # it has died meanwhile
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setpgid(0, 0)
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        stderr = os.open(STDERR_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for target, source in ((0, nothing), (1, nothing), (2, stderr)):
            os.dup2(source, target)
        os.close(nothing)
        os.close(stderr)
        code = 1
        work(request)
        code = 0
    except OSError as error:
        traceback.print_exc()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = EXIT_DISK_FULL
    except BaseException:  # noqa: BLE001  (there is nobody else to tell)
        traceback.print_exc()
    finally:
        # a decoder in a damaged state shall not be torn down
        os._exit(code)
