import hashlib
import os
import sqlite3
import time

import pytest

from ursa.sources.hashes import open_hashes

LARGE = b"0123456789abcdef" * (1 << 17)


@pytest.fixture
def reads(monkeypatch):
    """How often content was hashed."""
    calls = []
    original = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: calls.append(file.name) or original(file, name)
    )
    return calls


def ask(cache, path):
    with open_hashes(cache) as hashes:
        return hashes.sha256(path)


@pytest.mark.timeout(60)
def test_a_file_is_read_again_only_if_it_may_have_changed(tmp_path, reads):
    path, cache = tmp_path / "a.mp4", tmp_path / "cache" / "hashes.sqlite"
    path.write_bytes(LARGE)
    expected = hashlib.sha256(LARGE).hexdigest()
    assert [ask(cache, path), ask(cache, path)] == [expected] * 2
    assert len(reads) == 2  # it was written a moment ago
    time.sleep(2.1)
    assert [ask(cache, path) for _ in range(3)] == [expected] * 3
    assert len(reads) == 3
    # an edit that keeps the size and puts the time back
    status = path.stat()
    other = LARGE[::-1]
    with path.open("r+b") as file:
        file.write(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert ask(cache, path) == hashlib.sha256(other).hexdigest()
    # another file under its name
    (tmp_path / "b").write_bytes(LARGE)
    os.replace(tmp_path / "b", path)  # noqa: PTH105
    assert ask(cache, path) == expected


def test_parts_are_hashed_on_their_own(tmp_path):
    path, cache = tmp_path / "a.tar", tmp_path / "hashes.sqlite"
    path.write_bytes(LARGE)
    old = time.time() - 100
    os.utime(path, (old, old))
    time.sleep(2.1)
    for _ in range(2):
        with open_hashes(cache) as hashes:
            for start, size in ((0, 16), (16, 3 << 19), (5, 16)):
                expected = hashlib.sha256(LARGE[start : start + size]).hexdigest()
                assert hashes.sha256(path, start, size) == expected
    with sqlite3.connect(cache) as database:
        assert database.execute("SELECT COUNT(*) FROM hashes").fetchone() == (3,)
    database.close()


def test_small_files_are_not_remembered(tmp_path):
    path, cache = tmp_path / "a.mp4", tmp_path / "hashes.sqlite"
    path.write_bytes(b"x")
    assert ask(cache, path) == hashlib.sha256(b"x").hexdigest()
    with sqlite3.connect(cache) as database:
        assert database.execute("SELECT COUNT(*) FROM hashes").fetchone() == (0,)
    database.close()


@pytest.mark.parametrize("damage", ["no database", "other table", "directory", "unwritable"])
def test_a_cache_that_fails_is_left_out(tmp_path, damage):
    path, cache = tmp_path / "a.mp4", tmp_path / "hashes.sqlite"
    path.write_bytes(LARGE)
    if damage == "no database":
        cache.write_bytes(b"no database" * 1000)
    elif damage == "other table":
        with sqlite3.connect(cache) as database:
            database.execute("CREATE TABLE hashes (x TEXT)")
        database.close()
    elif damage == "directory":
        cache.mkdir()
    else:
        (tmp_path / "file").touch()
        cache = tmp_path / "file" / "hashes.sqlite"
    assert ask(cache, path) == hashlib.sha256(LARGE).hexdigest()
