"""Tar files of videos, as webdataset makes them: read in place, never unpacked.

Only the headers are read by `tarfile`, with limits on what a header may claim; the content of a
member is a range of bytes, copied to a file with a neutral name when it is ingested. So no member
decides where anything is written. Compressed tar files are not read: their members have no place.
"""

import functools
import io
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from ursa import storage
from ursa.artifacts import FailureReason
from ursa.sources.names import is_candidate
from ursa.video.captions import Notes, parse_text_beside

TEXT_LIMIT_BYTES = 64 << 10
MAX_MEMBERS = 1_000_000
_HEADER_LIMIT_BYTES = 64 << 10
# tarfile before Python 3.11.10 needs the square of the length of such a run (CVE-2024-6232)
_MANY_DIGITS = re.compile(rb"\d{256}")
# what tarfile raises for a wrong header; errors of the store are others and pass
_HEADER_ERRORS = (
    tarfile.TarError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    struct.error,
)
_BUFFER_BYTES = 256 << 10
_BLOCK_BYTES = 512
_END_LIMIT_BYTES = 64 << 20
"""How far after the end mark is looked."""
_TEXT_SUFFIXES = (".txt", ".json")


class TarMember(NamedTuple):
    """A member that may be a video, or the reason why it cannot be one."""

    name: str
    offset_bytes: int
    num_bytes: int
    problem: FailureReason | None = None
    detail: str = ""


class TarIndex(NamedTuple):
    """What a tar file holds; `damage` says where and why reading it ended before its end."""

    members: tuple[TarMember, ...]
    texts: dict[str, Notes]
    damage: str


def read_index(tar: storage.StoredFile) -> TarIndex:
    """List the members of a tar file that may be videos, and read the texts beside them.

    Args:
        tar: A local file or an object with its etag.

    Returns:
        All that could be read, up to the first damage.

    Raises:
        FileNotFoundError: If it is gone.
        StorageError: If the store refuses or does not answer.
    """
    return _remote_index(tar) if storage.is_remote(tar.uri) else _read_index(tar)


@functools.lru_cache(maxsize=256)
def _remote_index(tar: storage.StoredFile) -> TarIndex:
    """An object with the same etag has the same index; a run asks for it three times."""
    return _read_index(tar)


def _read_index(tar: storage.StoredFile) -> TarIndex:
    members: list[TarMember] = []
    texts: dict[str, Notes] = {}
    names: set[str] = set()
    file = _HeaderReader(tar)
    damage = ""
    try:
        for info in _headers(file, tar.num_bytes):
            if len(members) + len(texts) >= MAX_MEMBERS:
                damage = f"more than {MAX_MEMBERS} members; split it"
                break
            if _is_text(info):
                texts.setdefault(
                    info.name,
                    parse_text_beside(info.name, file.read_at(info.offset_data, info.size)),
                )
            elif not info.isdir() and (_leads_out(info.name) or is_candidate(info.name)):
                members.append(_judged(info, tar.num_bytes, names))
                names.add(members[-1].name)
    except _HEADER_ERRORS as error:
        damage = f"damaged after {len(members)} videos: {str(error) or type(error).__name__}"
    if not members and not damage:
        damage = "it holds no member that may be a video"
    return TarIndex(tuple(members), texts, damage)


def _headers(file: "_HeaderReader", num_bytes: int) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=file, mode="r:", format=tarfile.PAX_FORMAT) as tar:
        place = -1
        while (info := tar.next()) is not None:
            if info.offset_data <= place or info.size < 0:
                raise tarfile.ReadError(f"the header at byte {info.offset} leads backwards")
            place = info.offset_data
            yield info
            # tarfile would keep them all
            tar.members.clear()  # type: ignore[attr-defined]
            if place + info.size > num_bytes:
                raise tarfile.ReadError(f"cut off in {info.name[:80]!r}")
        # tarfile takes a damaged header in the middle for the end
        rest = file.read_at(tar.offset, _BLOCK_BYTES)
        if any(rest) or (rest and len(rest) < _BLOCK_BYTES):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        if not rest:
            raise tarfile.ReadError(f"it ends at byte {num_bytes} without an end mark: cut off?")
        _check_end(file, tar.offset, num_bytes)


def _check_end(file: "_HeaderReader", end: int, num_bytes: int) -> None:
    """Refuse anything but zeros after the end mark: tar files joined as they are, or a hole."""
    for start in range(end, min(num_bytes, end + _END_LIMIT_BYTES), _BUFFER_BYTES):
        if any(file.read_at(start, min(_BUFFER_BYTES, num_bytes - start))):
            raise tarfile.ReadError(
                f"there is more after the end mark at byte {end}, which is not read: a hole, or "
                "tar files joined without `tar --concatenate`"
            )


def _judged(info: tarfile.TarInfo, tar_bytes: int, names: set[str]) -> TarMember:
    member = TarMember(info.name, info.offset_data, info.size)
    if info.name in names:
        name = f"{info.name}@{info.offset}"
        while name in names:  # names are chosen by others, this one too
            name += "@"
        return member._replace(
            name=name,
            problem=FailureReason.REFUSED,
            detail="another member of this name comes before it",
        )
    if _leads_out(info.name):
        return member._replace(
            problem=FailureReason.REFUSED, detail="its name leads out of the tar file"
        )
    if not info.isreg() or info.issparse():
        return member._replace(
            problem=FailureReason.NOT_REGULAR_FILE,
            detail="a link, device or sparse file; only plain members are read",
        )
    if info.offset_data + info.size > tar_bytes:
        return member._replace(
            num_bytes=max(0, tar_bytes - info.offset_data),
            problem=FailureReason.UNREADABLE,
            detail=f"cut off: the tar file ends after {tar_bytes} bytes",
        )
    return member


def _leads_out(name: str) -> bool:
    """Whether a member would be written somewhere else if it were unpacked."""
    return name.startswith("/") or ".." in re.split(r"[/\\]", name) or "\0" in name


def _is_text(info: tarfile.TarInfo) -> bool:
    is_small = 0 < info.size <= TEXT_LIMIT_BYTES
    is_plain = info.isreg() and not info.issparse()
    return is_plain and is_small and info.name.lower().endswith(_TEXT_SUFFIXES)


class _HeaderReader(io.BytesIO):
    """The bytes of a tar file for `tarfile`, some at a time; refuses what no header needs."""

    def __init__(self, tar: storage.StoredFile) -> None:
        super().__init__()
        self._tar = tar
        self._place = 0
        self._start = 0
        self._buffer = b""

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """Return bytes from a place, fewer at the end of the file."""
        end = min(start + num_bytes, self._tar.num_bytes)
        if not self._start <= start <= end <= self._start + len(self._buffer):
            length = min(max(num_bytes, _BUFFER_BYTES), self._tar.num_bytes - start)
            self._start, self._buffer = start, storage.read_range(self._tar.uri, start, length)
        return self._buffer[start - self._start : max(start, end) - self._start]

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        if num_bytes is None or not 0 <= num_bytes <= _HEADER_LIMIT_BYTES:
            raise tarfile.ReadError(f"a header claims {num_bytes} bytes")
        data = self.read_at(self._place, num_bytes)
        if _MANY_DIGITS.search(data):
            raise tarfile.ReadError("a header holds a number of more than 255 digits")
        self._place += len(data)
        return data

    def seek(self, place: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or place < 0:
            raise tarfile.ReadError(f"a header leads to byte {place}")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place
