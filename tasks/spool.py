"""Metrics on their way to the tracking server: one file a run, which survives its process.

A file is only ever appended to, one JSON object a line: the metrics of a step, or the final status
of the run. Several processes may append to it and several may send from it: whoever sends takes
the first line of a step, so that all send the same. It is removed by whoever has sent all of it
while nobody has it open. Knows neither MLflow nor Prefect.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from ursa import storage
from ursa.config import fingerprint
from ursa.errors import StorageError

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
READ_BYTES = 256 << 10
"""Read at once: a thousand steps or so."""


class Entry(NamedTuple):
    """A line of a spool.

    Attributes:
        time_ms: When it was written, milliseconds since 1970.
        step: Step that the metrics belong to.
        metrics: Values by name; empty in a line with a status.
        status: Final status of the run, or an empty text.
    """

    time_ms: int
    step: int
    metrics: dict[str, float]
    status: str


def local_folder(spool_uri: str) -> Path:
    """Return where the files are: the place itself, or for a bucket a folder of this machine.

    Args:
        spool_uri: A place below the data root.
    """
    if not storage.is_remote(spool_uri):
        return storage.local_path(spool_uri)
    return platformdirs.user_state_path("ursa") / "spool" / fingerprint(spool_uri)[:16]


class Spool:
    """The file of a run, open for appending."""

    def __init__(self, spool_uri: str, run_id: str) -> None:
        """Open the file or create it; where that fails, one in a temporary folder.

        Args:
            spool_uri: A place below the data root.
            run_id: Id of the run in the tracking server.
        """
        self.path = local_folder(spool_uri) / f"{run_id}{SUFFIX}"
        try:
            self._file = _open_shared(self.path)
        except OSError as error:
            self.path = Path(tempfile.mkdtemp(prefix="ursa-spool-")) / self.path.name
            logger.warning("metrics wait in %s until they are sent: %s", self.path, error)
            self._file = _open_shared(self.path)
        self._parked_uri = (
            storage.join(spool_uri, f"{run_id}.{secrets.token_hex(4)}{SUFFIX}")
            if storage.is_remote(spool_uri)
            else ""
        )
        self._is_parked = False
        self._unwritten = b""
        self._lock = threading.Lock()  # values come from the work and from the thread that sends

    def append(
        self, *, step: int = 0, metrics: Mapping[str, float] | None = None, status: str = ""
    ) -> None:
        """Write a line; where the disk is full, it is kept and written with the next one.

        Args:
            step: Step that the metrics belong to.
            metrics: Values by name.
            status: Final status of the run; nothing for a line of metrics.
        """
        line = {"time_ms": int(time.time() * 1000), "step": step, "metrics": dict(metrics or {})}
        text = json.dumps(line | ({"status": status} if status else {}))
        with self._lock:
            self._unwritten += text.encode() + b"\n"
            self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            logger.debug("%s: %s", self.path, error)

    def park(self, offset: int) -> None:
        """Copy what has not been sent to the bucket, from where another machine can send it.

        Args:
            offset: Bytes of the file that were sent. Nothing is done unless the place is a bucket.
        """
        if not self._parked_uri:
            return
        try:
            storage.write_bytes(self._parked_uri, self.path.read_bytes()[offset:])
            self._is_parked = True
        except (OSError, StorageError) as error:
            logger.warning("metrics wait on this machine alone, in %s: %s", self.path, error)

    def close(self, offset: int) -> bool:
        """Close the file; remove it if all was sent and nobody else has it open.

        Args:
            offset: Bytes of the file that were sent.

        Returns:
            Whether all was sent.
        """
        self._write()
        is_sent = self.num_bytes() <= offset and not self._unwritten
        file, self._file = self._file, -1
        os.close(file)
        if is_sent:
            with contextlib.suppress(OSError), exclusively(self.path) as is_mine:
                if is_mine and self.path.stat().st_size <= offset:
                    self.path.unlink()
            if self._is_parked:
                with contextlib.suppress(StorageError):
                    storage.remove_file(self._parked_uri)
        return is_sent

    def num_bytes(self) -> int:
        """Return the size of the file; 0 when it is closed."""
        return os.fstat(self._file).st_size if self._file >= 0 else 0


def read(path: Path, offset: int, num_bytes: int = READ_BYTES) -> tuple[list[Entry], int]:
    """Read some lines of a file; a line that is still being written is left for the next time.

    Args:
        path: The file.
        offset: Where to begin, bytes.
        num_bytes: How much to read; longer lines count as damaged.

    Returns:
        The lines, without those that a lost machine has left damaged, and where the next begin.

    Raises:
        OSError: If the file is gone.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(num_bytes)
    end = data.rfind(b"\n") + 1 or (len(data) if len(data) == num_bytes else 0)
    entries = []
    for line in data[:end].splitlines():
        try:
            entries.append(_parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.debug("%s: a line is damaged", path)
    return entries, offset + end


def _parse(values: Any) -> Entry:
    metrics = {str(key): float(value) for key, value in values["metrics"].items()}
    return Entry(
        int(values["time_ms"]), int(values["step"]), metrics, str(values.get("status", ""))
    )


def waiting(spool_uri: str) -> list[Path]:
    """Return the files of this machine, or of the shared file system.

    Args:
        spool_uri: A place below the data root.
    """
    return sorted(local_folder(spool_uri).glob(f"*{SUFFIX}"))


def parked(spool_uri: str) -> list[str]:
    """Return what other machines have left in the bucket; nothing where the place is none.

    Args:
        spool_uri: A place below the data root.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if not storage.is_remote(spool_uri):
        return []
    try:
        listed = storage.list_files(spool_uri, with_etag=False)
    except FileNotFoundError:
        return []
    return [item.uri for item in listed if item.uri.endswith(SUFFIX)]


def run_of(name: str) -> str:
    """Return the id of the run that a file or object belongs to.

    Args:
        name: Its path or URI.
    """
    return name.rpartition("/")[2].partition(".")[0]


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[bool]:
    """Yield whether nobody else has a file open; nobody can open it until the end.

    Args:
        path: The file.

    Raises:
        OSError: If the file is gone.
    """
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield os.fstat(file).st_ino == path.stat().st_ino
    finally:
        os.close(file)


def _open_shared(path: Path) -> int:
    """Open a file that nobody removes while it is open; end a line that was broken off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            if os.fstat(file).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(file)  # removed between opening and locking
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file
