import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ursa import storage
from ursa.artifacts import ShardInfo, SourceVideo
from ursa.errors import ManifestError, SchemaVersionError, StorageConfigurationError

RECORD = SourceVideo(uri="file:///a", num_bytes=3, etag="x")


def left_over(folder: Path):
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


def test_bytes_are_a_round_trip(tmp_path):
    uri = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert not storage.exists(str(tmp_path))
    assert left_over(tmp_path) == []
    storage.remove_file(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_first_writer_wins_and_all_learn_it(tmp_path):
    uri = str(tmp_path / "deep" / "commit")
    barrier = threading.Barrier(16)

    def write(index):
        barrier.wait()
        return storage.put_if_absent(uri, f"writer {index}".encode() * 1000)

    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(write, range(16)))
    assert answers == {storage.read_bytes(uri)}
    assert left_over(tmp_path) == []
    assert len(list(tmp_path.rglob("*"))) == 2


def test_readers_never_see_half_a_file(tmp_path):
    uri = str(tmp_path / "file")
    contents = [bytes([value]) * 300_000 for value in range(2)]
    storage.write_bytes(uri, contents[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for content in contents:
                storage.write_bytes(uri, content)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert all(storage.read_bytes(uri) in contents for _ in range(200))
    finally:
        stop.set()
        thread.join()


ODD_NAMES = [b"plain.mp4", b"two words #1%20?.mp4", b"latin\xe9.mp4", "猫\n.mp4".encode(), b"-x&y"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_file_name_has_a_uri(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(name)
    (found,) = storage.list_files(str(tmp_path))
    assert found.uri.startswith("file:///")
    assert found.uri.isascii()
    assert (found.num_bytes, found.etag) == (len(name), storage.sha256_file(path))
    assert storage.read_bytes(found.uri) == name
    assert storage.local_path(found.uri) == path
    with storage.local_copy(found.uri) as copy:
        assert copy.read_bytes() == name
    storage.write_bytes(found.uri, b"new")
    assert path.read_bytes() == b"new"


def test_listing_is_sorted_and_holds_regular_files_alone(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one").write_bytes(b"1")
    (tmp_path / "a").write_bytes(b"22")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    found = storage.list_files(str(tmp_path), with_etag=False)
    assert [Path(item.uri).name for item in found] == ["a", "one"]
    assert [item.num_bytes for item in found] == [2, 1]
    assert [Path(uri).name for uri in storage.list_irregular_files(str(tmp_path))] == [
        "link",
        "pipe",
    ]
    assert storage.list_irregular_files(str(tmp_path / "link")) == [
        (tmp_path / "link").absolute().as_uri()
    ]
    assert [item.uri for item in storage.list_files(str(tmp_path / "a"))] == [found[0].uri]
    with pytest.raises(FileNotFoundError):
        storage.list_files(str(tmp_path / "gone"))


def test_files_that_go_while_they_are_listed_are_left_out(tmp_path):
    """Other writers make and remove temporary files and whole folders all the time."""
    (tmp_path / "stays").write_bytes(b"1")
    stop = threading.Event()

    def write(folder):
        while not stop.is_set():
            storage.write_bytes(str(tmp_path / folder / "new"), b"2")
            storage.remove_directory(str(tmp_path / folder))

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    try:
        for with_etag in (False, True) * 150:
            found = storage.list_files(str(tmp_path), with_etag=with_etag)
            assert any(item.uri.endswith("/stays") for item in found)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("call", ["write", "put", "upload"])
def test_a_directory_that_another_run_removes_is_made_again(tmp_path, monkeypatch, call):
    source, target = tmp_path / "source", tmp_path / "folder" / "deep" / "file"
    source.write_bytes(b"x")
    synced, fsync = [], os.fsync

    def remove_once(descriptor):
        fsync(descriptor)
        if not synced:
            storage.remove_directory(str(tmp_path / "folder"))
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", remove_once)
    {
        "write": lambda: storage.write_bytes(str(target), b"x"),
        "put": lambda: storage.put_if_absent(str(target), b"x"),
        "upload": lambda: storage.upload_file(source, str(target)),
    }[call]()
    assert target.read_bytes() == b"x"
    with pytest.raises(FileNotFoundError):
        storage.upload_file(tmp_path / "none", str(target))


def test_directories_are_copied_with_their_hashes(tmp_path):
    (tmp_path / "from" / "sub").mkdir(parents=True)
    (tmp_path / "from" / "a.txt").write_text("a")
    (tmp_path / "from" / "sub" / "b.txt").write_text("b")
    target = str(tmp_path / "to")
    hashes = storage.upload_directory(tmp_path / "from", target)
    assert sorted(hashes) == ["a.txt", "sub/b.txt"]
    with storage.local_directory(target) as folder:
        for name, digest in hashes.items():
            assert storage.sha256_file(folder / name) == digest
    storage.remove_directory(target)
    assert not Path(target).exists()
    storage.remove_directory(target)


def test_records_are_committed_once(tmp_path):
    uri = str(tmp_path / "manifest.json")
    assert storage.load_record(uri, SourceVideo) is None
    assert storage.commit_record(uri, RECORD) == RECORD
    late = RECORD.model_copy(update={"etag": "y"})
    assert storage.commit_record(uri, late) == RECORD
    assert storage.load_record(uri, SourceVideo) == RECORD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a manifest"),
        (b"\xff\xfe{}", "not a manifest"),
        (b'{"schema_version": 3, "kind": "SourceVideo"', "not a manifest"),
        (b'{"schema_version": 3}', "not a manifest"),
        (b'{"schema_version": 99, "kind": "SourceVideo", "record": {}}', "version 99, expected"),
        (b'{"schema_version": 3, "kind": "Clip", "record": {}}', "holds Clip"),
        (b'{"schema_version": 3, "kind": "SourceVideo", "record": {"uri": 3}}', "is damaged"),
    ],
)
def test_damaged_records_are_named(tmp_path, content, message):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message) as error:
        storage.load_record(str(path), SourceVideo)
    assert str(path) in str(error.value)


def test_a_record_of_another_kind_is_refused(tmp_path):
    uri = str(tmp_path / "manifest.json")
    storage.commit_record(uri, RECORD)
    with pytest.raises(ManifestError, match="expected ShardInfo of version 3"):
        storage.load_record(uri, ShardInfo)


def test_a_huge_manifest_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MANIFEST_LIMIT_BYTES", 10)
    uri = str(tmp_path / "manifest.json")
    storage.write_bytes(uri, b"x" * 11)
    with pytest.raises(ManifestError, match="11 bytes, expected at most 10"):
        storage.load_record(uri, SourceVideo)


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    uri = str(tmp_path / "manifest.json")
    storage.commit_record(uri, RECORD)
    num_bytes = storage.size_bytes(uri)
    monkeypatch.setattr(storage, "MANIFEST_LIMIT_BYTES", num_bytes)
    assert storage.load_record(uri, type(RECORD)) == RECORD
    monkeypatch.setattr(storage, "MANIFEST_LIMIT_BYTES", num_bytes - 1)
    other = str(tmp_path / "other.json")
    with pytest.raises(ManifestError, match=rf"has {num_bytes} bytes, .* divide the source"):
        storage.commit_record(other, RECORD)
    assert not storage.exists(other)


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/x"])
def test_unknown_schemes_are_named(uri):
    with pytest.raises(StorageConfigurationError, match=r"use s3://bucket/prefix"):
        storage.read_bytes(uri)


def test_too_little_room_is_found_before_the_run(tmp_path):
    storage.check_store(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(StorageConfigurationError, match=r"disk full: .* MB free"):
        storage.check_store(str(tmp_path), min_free_bytes=1 << 60)


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    uri = str(tmp_path / "file" / "below")
    for call in (
        lambda: storage.write_bytes(uri, b"y"),
        lambda: storage.put_if_absent(uri, b"y"),
        lambda: storage.read_bytes(uri),
        lambda: storage.check_store(str(tmp_path / "file")),
        lambda: storage.check_store(uri),
    ):
        with pytest.raises(StorageConfigurationError, match="a file stands where a directory"):
            call()
    assert storage.exists(uri) is False


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    """Also those that leave it a record: in a number, a text, the hash, the schema version."""
    path = tmp_path / "manifest.json"
    storage.commit_record(str(path), RECORD)
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ManifestError) as error:
                storage.load_record(str(path), SourceVideo)
            assert str(path) in str(error.value)
            assert type(error.value) is ManifestError, "taken for another schema version"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ManifestError, match="`ursa data repair`"):
            storage.load_record(str(path), SourceVideo)


def test_a_record_without_a_hash_is_read(tmp_path):
    """As older code wrote it."""
    path = tmp_path / "manifest.json"
    storage.commit_record(str(path), RECORD)
    assert storage.holds_hash(str(path), path.read_bytes())
    values = json.loads(path.read_bytes())
    del values["sha256"]
    path.write_text(json.dumps(values), "utf-8")
    assert storage.load_record(str(path), SourceVideo) == RECORD
    assert storage.commit_record(str(path), RECORD) == RECORD
    assert not storage.holds_hash(str(path), path.read_bytes())


def test_another_schema_version_is_no_damage(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"schema_version": 2, "kind": "SourceVideo", "record": {}}', "utf-8")
    with pytest.raises(SchemaVersionError, match="of schema version 2, expected SourceVideo"):
        storage.load_record(str(path), SourceVideo)


@pytest.mark.parametrize("num_cut", [1, 2, 3])
def test_an_answer_that_is_cut_off_is_no_damage(tmp_path, monkeypatch, num_cut):
    uri = str(tmp_path / "manifest.json")
    storage.commit_record(uri, RECORD)
    read, reads = storage.read_bytes, []

    def cut(uri):
        reads.append(uri)
        return read(uri)[: 40 if len(reads) <= num_cut else None]

    monkeypatch.setattr(storage, "read_bytes", cut)
    if num_cut < storage.NUM_READS:
        assert storage.load_lasting(uri, SourceVideo) == RECORD
    else:
        with pytest.raises(ManifestError, match="not a manifest"):
            storage.load_lasting(uri, SourceVideo)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("//a///b/./c/..", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("FILE:///a/b%20%23c", "/a/b #c"),
        ("file:///a/%ff", "file:///a/%FF"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket//a/b//", "s3://bucket/a/b"),
        # other objects on a store: nothing is to be guessed
        ("s3://bucket/a//b/./c", "s3://bucket/a//b/./c"),
        ("s3://Bucket/A", "s3://Bucket/A"),
        ("HTTPS://Host.Test:443/A/b/?x=Y", "https://host.test/A/b/?x=Y"),
        ("https://host.test", "https://host.test/"),
        ("https://host.test:8443/a", "https://host.test:8443/a"),
        ("https://[::1/a", "https://[::1/a"),
        ("gs://bucket/a/", "gs://bucket/a/"),
    ],
)
def test_a_place_has_one_spelling(given, expected):
    assert storage.absolute_uri(given) == expected
    assert storage.absolute_uri(expected) == expected


def test_a_file_uri_may_name_this_machine():
    assert storage.local_path("file://localhost/a%20b") == storage.local_path("file:///a%20b")


def test_relative_paths_and_links(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    for given in ("x", "./x", "x/", "far/../x", "~/x", f"file://{tmp_path}/x/"):
        assert storage.absolute_uri(given) == f"{tmp_path}/x"
    assert storage.absolute_uri("") == str(tmp_path)
    # a link keeps its name, but what is above the place it leads to is not beside it
    assert storage.absolute_uri("link/x") == f"{tmp_path}/link/x"
    assert storage.absolute_uri("link/../x") == f"{tmp_path}/far/x"
