"""Which demuxer a foreign file may be opened with, decided by its first bytes alone.

FFmpeg guesses formats by content and name, and some of its formats (playlists, concat scripts)
open other files. So a demuxer is always forced, and everything that is not a known video
container is refused before any decoder sees it.
"""

from typing import Literal

HEAD_BYTES = 1024
"""How many bytes from the start of a file `detect_demuxer` wants to see."""

Demuxer = Literal[
    "mp4", "matroska", "avi", "gif", "ogg", "flv", "mpeg", "mpegvideo", "mpegts", "asf"
]

_PREFIXES: tuple[tuple[bytes, Demuxer], ...] = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"OggS", "ogg"),
    (b"FLV\x01", "flv"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)
_MP4_FIRST_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"}
)
_PICTURE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1"})
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"#EXTM3U", "an HLS playlist"),
    (b"ffconcat", "an ffconcat script"),
    (b"BM", "a BMP picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"ID3", "an MP3 sound file"),
    (b"fLaC", "a FLAC sound file"),
)
_TS_PACKET_BYTES = 188
_TS_SYNC = 0x47


def detect_demuxer(head: bytes) -> Demuxer | None:
    """Return the demuxer to force for a file, or None if it is no known video container.

    Args:
        head: The first `HEAD_BYTES` bytes of the file, or all of a shorter one.
    """
    if head[4:8] in _MP4_FIRST_BOXES:
        is_picture = head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS
        return None if is_picture else "mp4"
    if head[:4] == b"RIFF":
        return "avi" if head[8:12] in (b"AVI ", b"AVIX") else None
    for prefix, demuxer in _PREFIXES:
        if head.startswith(prefix):
            return demuxer
    # plain transport stream packets, or those of Blu-ray with four bytes of time in front
    if _has_ts_sync(head, 0, _TS_PACKET_BYTES) or _has_ts_sync(head, 4, _TS_PACKET_BYTES + 4):
        return "mpegts"
    return None


def describe_content(head: bytes) -> str:
    """Say in words what a refused file seems to be.

    Args:
        head: The first `HEAD_BYTES` bytes of the file, or all of a shorter one.

    Returns:
        Such as "a PNG picture"; "no known video container" if it is nothing that is known.
    """
    for prefix, words in _REFUSED:
        if head.startswith(prefix):
            return words
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[4:8] == b"ftyp":
        return "an AVIF or HEIF picture"
    start = head[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page"
    if head and all(byte >= 0x20 or byte in b"\t\n\r\f\x1b" for byte in head):
        return "text"
    return "no known video container"


def _has_ts_sync(head: bytes, offset: int, stride: int) -> bool:
    positions = range(offset, offset + 3 * stride, stride)
    return len(head) > positions[-1] and all(head[index] == _TS_SYNC for index in positions)
