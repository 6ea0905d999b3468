"""sha256 of local files and of parts of them, remembered while the file system sees no change.

A large source need not be read as a whole at the start of each run. A hash counts as long as
device, inode, size, time of change and time of status change are the same: the last one cannot be
set by a program, so an edit that puts the old time of change back is seen as well. What was
touched in the last two seconds is not remembered, since it could change again within one tick of
the clock. A program that writes through memory it has mapped may leave all of this as it was until
the system writes the pages out, and is seen then or not at all: delete the cache after such edits.
Small files are read every time: that is no slower. The cache is an SQLite file that may
be deleted at any time; whatever is wrong with it, files are read.
"""

import contextlib
import hashlib
import io
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_REMEMBERED_BYTES = 1 << 20
SETTLED_S = 2.0
_CHUNK_BYTES = 1 << 20


class ContentHashes:
    """Hashes of local content; made by `open_hashes`."""

    def __init__(self, database: sqlite3.Connection | None) -> None:
        self._database = database

    def sha256(self, path: Path, start: int = 0, num_bytes: int | None = None) -> str:
        """Return the sha256 of a file or of a part of it, 64 hexadecimal digits.

        Args:
            path: A regular file.
            start: First byte, from 0.
            num_bytes: How many; None goes to the end.

        Raises:
            OSError: If it cannot be read.
        """
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if self._database is None or status.st_size < MIN_REMEMBERED_BYTES:
                return _sha256(file, start, num_bytes)
            key = f"{start}:{num_bytes}:".encode() + os.fsencode(path.absolute())
            signature = _signature(status)
            known = self._recall(key, signature)
            if known is not None:
                return known
            started_s = time.time()
            digest = _sha256(file, start, num_bytes)
            touched_s = max(status.st_mtime, status.st_ctime)
            is_settled = started_s - touched_s > SETTLED_S
            if is_settled and _signature(os.fstat(file.fileno())) == signature:
                self._remember(key, signature, digest)
            return digest

    def _recall(self, key: bytes, signature: str) -> str | None:
        rows = self._execute(
            "SELECT sha256 FROM hashes WHERE key = ? AND signature = ?", (key, signature)
        )
        return str(rows[0][0]) if rows else None

    def _remember(self, key: bytes, signature: str, sha256: str) -> None:
        self._execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (key, signature, sha256))

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[object, ...]]:
        """Return the rows of an answer; go on without the cache when it fails."""
        if self._database is None:
            return []
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            logger.debug("the cache of hashes fails (%s): files are read", error)
            self._database = None
            return []


@contextlib.contextmanager
def open_hashes(cache: Path | None) -> Iterator[ContentHashes]:
    """Yield hashes that remember what they have read.

    Args:
        cache: The SQLite file, made if missing; None remembers nothing.

    Yields:
        The hashes. New ones are written at the end.
    """
    database = None
    if cache is not None:
        with contextlib.suppress(OSError, sqlite3.Error):
            cache.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(cache, timeout=1.0)
            database.execute(
                "CREATE TABLE IF NOT EXISTS hashes "
                "(key BLOB PRIMARY KEY, signature TEXT, sha256 TEXT) WITHOUT ROWID"
            )
    try:
        yield ContentHashes(database)
    finally:
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.commit()
            database.close()


def _signature(status: os.stat_result) -> str:
    return (
        f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:"
        f"{status.st_ctime_ns}"
    )


def _sha256(file: io.FileIO, start: int, num_bytes: int | None) -> str:
    if start == 0 and num_bytes is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    file.seek(start)
    left = num_bytes if num_bytes is not None else os.fstat(file.fileno()).st_size - start
    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
