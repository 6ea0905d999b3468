import pytest

from ursa.video.containers import describe_content, detect_demuxer


@pytest.mark.parametrize(
    ("head", "demuxer"),
    [
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "mp4"),
        (b"\x00\x00\x00\x14ftypqt  ", "mp4"),
        (b"\x00\x00\x00\x08wide\x00\x00\x00\x00mdat", "mp4"),
        (b"\x1a\x45\xdf\xa3\x01\x00", "matroska"),
        (b"RIFF\x00\x10\x00\x00AVI LIST", "avi"),
        (b"GIF89a\x10\x00", "gif"),
        (b"OggS\x00\x02", "ogg"),
        (b"FLV\x01\x05", "flv"),
        (b"\x00\x00\x01\xba\x44", "mpeg"),
        ((b"\x47" + bytes(187)) * 4, "mpegts"),
        (bytes(4) + (b"\x47" + bytes(191)) * 4, "mpegts"),
    ],
)
def test_known_containers(head, demuxer):
    assert detect_demuxer(head) == demuxer


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"#EXTM3U\n#EXT-X-VERSION:3\n/etc/passwd\n", "HLS playlist"),
        (b"ffconcat version 1.0\nfile 'a.mp4'\n", "ffconcat script"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"RIFF\x00\x10\x00\x00WEBPVP8 ", "WebP"),
        (b"\x00\x00\x00\x1cftypavif", "AVIF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"<?xml version='1.0'?><MPD>", "XML"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "text"),
        (b"RIFF\x00\x10\x00\x00WAVEfmt ", "no known video container"),
        (b"G" + b"x" * 187, "text"),
        (b"", "no known video container"),
        (bytes(64), "no known video container"),
    ],
)
def test_everything_else_is_refused_and_named(head, words):
    assert detect_demuxer(head) is None
    assert words in describe_content(head)
