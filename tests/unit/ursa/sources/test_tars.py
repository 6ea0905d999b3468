import hashlib
import io
import json
import os
import tarfile
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ursa import storage
from ursa.artifacts import FailureReason
from ursa.sources.listing import discover_videos
from ursa.sources.notes import SourceNotes
from ursa.sources.tars import read_index


def member(name, data=b"", *, kind=tarfile.REGTYPE, link="", claim=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if claim is None else claim
    return info, data


def write_tar(path, members, *, format=tarfile.PAX_FORMAT, end=True):  # noqa: A002
    with path.open("wb") as file:
        for info, data in members:
            file.write(info.tobuf(format))
            file.write(data + b"\0" * (-len(data) % 512))
        if end:
            file.write(b"\0" * 1024)
    return path


def index_of(path):
    return read_index(storage.stat_file(str(path)))


GOOD = [
    member("000.mp4", b"first" * 300),
    member("000.txt", b" A  bee. "),
    member("000.json", json.dumps({"caption_long": "Long.", "license": "CC0"}).encode()),
    member("d/001.a.mp4", b"second"),
    member("d/001.json", b'{"caption": "A bus.", "attribution": "Ann"}'),
    member("d/", kind=tarfile.DIRTYPE),
    member("d/.hidden.mp4", b"x"),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_ranges_of_the_file(tmp_path, format):  # noqa: A002
    path = write_tar(
        tmp_path / "s.tar", [*GOOD, member("é" + "x" * 90 + ".mp4", b"3")], format=format
    )
    index = index_of(path)
    data = path.read_bytes()
    assert index.damage == ""
    found = {
        item.name: data[item.offset_bytes : item.offset_bytes + item.num_bytes]
        for item in index.members
    }
    assert found == {
        "000.mp4": b"first" * 300,
        "d/001.a.mp4": b"second",
        "é" + "x" * 90 + ".mp4": b"3",
    }
    assert all(item.problem is None for item in index.members)


def test_sources_have_the_hash_of_their_content_and_the_notes_beside(tmp_path):
    path = write_tar(tmp_path / "a#b.tar", GOOD)
    sources = discover_videos(str(tmp_path))
    tar_uri = f"{tmp_path.as_uri()}/a%23b.tar"
    assert [source.uri for source in sources] == [f"{tar_uri}#000.mp4", f"{tar_uri}#d/001.a.mp4"]
    assert sources[0].etag == hashlib.sha256(b"first" * 300).hexdigest()
    assert discover_videos(str(path)) == sources
    digest = SourceNotes.read(str(path), sources).digest()
    write_tar(path, [*GOOD[:-1], member("000.mp4.txt", b"counts more")])
    assert SourceNotes.read(str(path), sources).digest() != digest


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("link.mp4", kind=tarfile.SYMTYPE, link="/etc/passwd"), "not_regular_file"),
        (member("hard.mp4", kind=tarfile.LNKTYPE, link="000.mp4"), "not_regular_file"),
        (member("fifo.mp4", kind=tarfile.FIFOTYPE), "not_regular_file"),
        (member("disk.mp4", kind=tarfile.BLKTYPE), "not_regular_file"),
        (member("../out.mp4", b"x"), "refused"),
        (member("/abs.mp4", b"x"), "refused"),
        (member("a/../../out.mp4", b"x"), "refused"),
        (member("..\\out.mp4", b"x"), "refused"),
        (member("000.mp4", b"again"), "refused"),
    ],
)
def test_members_that_are_not_read_have_a_reason(tmp_path, bad, reason):
    path = write_tar(tmp_path / "s.tar", [*GOOD, bad, member("last.mp4", b"last")])
    index = index_of(path)
    problems = [item.problem for item in index.members]
    assert problems == [None, None, FailureReason(reason), None]
    assert len(discover_videos(str(path))) == 4


def test_links_to_texts_say_nothing(tmp_path):
    link = member("001.txt", kind=tarfile.SYMTYPE, link="/etc/passwd")
    index = index_of(write_tar(tmp_path / "s.tar", [link, member("001.mp4", b"x")]))
    assert index.texts == {}


@pytest.mark.parametrize("cut", [100, 511, 512 + 20, 2048 + 100])
def test_a_cut_tar_gives_what_is_whole_and_a_reason_for_the_rest(tmp_path, cut):
    path = write_tar(
        tmp_path / "s.tar", [member("a.mp4", b"a" * 1500), member("b.mp4", b"b" * 600)]
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    sources = discover_videos(str(path))
    assert [source.problem for source in sources if source.uri.endswith("tar")] == ["unreadable"]
    good = [source.uri.rpartition("#")[2] for source in sources if source.problem is None]
    assert good == (["a.mp4"] if cut > 2048 else [])


def test_a_tar_without_an_end_mark_may_be_cut_off(tmp_path):
    whole, cut = (write_tar(tmp_path / f"{end}.tar", GOOD, end=end) for end in (True, False))
    assert index_of(cut).members == index_of(whole).members
    assert "ends at byte 7680 without an end mark" in index_of(cut).damage


def test_what_comes_after_the_end_mark_is_not_lost_in_silence(tmp_path):
    one = write_tar(tmp_path / "1.tar", [member("a.mp4", b"a" * 600)]).read_bytes()
    two = write_tar(tmp_path / "2.tar", [member("b.mp4", b"b" * 600)]).read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one + bytes(9 * 512) + two)
    index = index_of(joined)
    assert [item.name for item in index.members] == ["a.mp4"]
    assert "there is more after the end mark at byte 1536" in index.damage
    joined.write_bytes(one + bytes(40 * 512))
    assert index_of(joined).damage == ""


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", [member(f"{i}.mp4", b"x" * 512) for i in range(4)])
    data = bytearray(path.read_bytes())
    data[2048 + 10 : 2048 + 20] = b"\xff" * 10
    path.write_bytes(data)
    index = index_of(path)
    assert [item.name for item in index.members] == ["0.mp4", "1.mp4"]
    assert index.damage == "damaged after 2 videos: no header at byte 2048"


@pytest.mark.parametrize(
    "data", [b"", b"x" * 100, b"\0" * 512, b"no tar" * 1000, b"\x1f\x8b" * 999]
)
def test_what_is_no_tar_or_empty_is_one_failure(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    index = index_of(tmp_path / "s.tar")
    assert index.members == ()
    assert index.damage


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "header",
    [
        member("p", b"1" * 60_000 + b" x=y\n", kind=tarfile.XHDTYPE),  # CVE-2024-6232
        member("p", b"", kind=tarfile.XHDTYPE, claim=1 << 40),
        member("p", b"", kind=tarfile.GNUTYPE_LONGNAME, claim=1 << 33),
        member("p", b"12 size=-512\n", kind=tarfile.XHDTYPE),
        member("p", b"99 size=x\n", kind=tarfile.XHDTYPE),
        member("p", b"", kind=tarfile.XHDTYPE),
        member("p", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", kind=tarfile.XHDTYPE),
    ],
)
def test_headers_that_lie_cost_nothing(tmp_path, header):
    members = [member("a.mp4", b"a"), header, member("b.mp4", b"b" * 100)]
    path = write_tar(tmp_path / "s.tar", members, format=tarfile.GNU_FORMAT)
    tracemalloc.start()
    index = index_of(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert index.members[0].name == "a.mp4"


def test_a_header_is_not_read_if_it_is_large(tmp_path):
    header = member("p", b"", kind=tarfile.XHDTYPE, claim=40 << 20)
    path = write_tar(tmp_path / "s.tar", [member("a.mp4", b"a"), header])
    os.truncate(path, 64 << 20)
    tracemalloc.start()
    index = index_of(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert "a header claims 41943040 bytes" in index.damage


@pytest.mark.timeout(20)
def test_a_header_that_leads_backwards_ends_the_reading(tmp_path):
    """The endless loop of CVE-2025-8194."""
    info, _ = member("b.mp4", b"")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data = member("a.mp4", b"")[0].tobuf(tarfile.GNU_FORMAT) + bytes(block)
    (tmp_path / "s.tar").write_bytes(data + b"\0" * 1024)
    index = index_of(tmp_path / "s.tar")
    assert index.members[0].name == "a.mp4"
    assert "damaged" in index.damage


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.integers(0, 5000), value=st.binary(min_size=1, max_size=12), cut=st.integers(1, 9000)
)
def test_any_damage_ends_in_an_index(tmp_path, place, value, cut):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in [*GOOD, member("n" * 150 + ".mp4", b"long")]:
            tar.addfile(info, io.BytesIO(data))
    data = bytearray(buffer.getvalue())
    data[place : place + len(value)] = value
    (tmp_path / "s.tar").write_bytes(data[:cut])
    index = index_of(tmp_path / "s.tar")
    for item in index.members:
        assert item.offset_bytes >= 0
        assert item.problem or item.offset_bytes + item.num_bytes <= cut
