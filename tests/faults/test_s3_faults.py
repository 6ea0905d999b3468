"""The store behind a proxy that fails: what is ridden out, what is said, how long it takes."""

import contextlib
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from tests import data_roots
from tests.faults.s3_proxy import ALL_FAULTS, S3Proxy, at_random, first
from ursa import storage
from ursa.artifacts import SourceVideo
from ursa.errors import StorageConfigurationError, StorageError

pytest.importorskip("moto.server")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

HURRY = 10
DATA = os.urandom(300_000)
RECORD = SourceVideo(uri="s3://b/a", num_bytes=3, etag="x")


@pytest.fixture
def proxy(s3_server, s3_prefix, monkeypatch):
    with S3Proxy(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.address)
        yield running


@pytest.fixture
def prefix(s3_prefix, proxy):
    return s3_prefix


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """The waits between two tries pass ten times faster; the answers take the time they take."""
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda s: time.sleep(s / HURRY)))
    clock = SimpleNamespace(monotonic=lambda: HURRY * time.monotonic())
    monkeypatch.setattr(storage, "time", clock)


@contextlib.contextmanager
def at_most(seconds):
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    assert taken < seconds, f"took {taken:.1f} s"


def calls(prefix, tmp_path):
    """Every kind of call, with what must come of it."""
    (tmp_path / "up").write_bytes(DATA)
    whole, new = storage.join(prefix, "whole"), storage.join(prefix, "new")

    def download():
        with storage.local_copy(whole) as path:
            return path.read_bytes()

    def upload():
        storage.upload_file(tmp_path / "up", new)
        return storage.read_bytes(new)

    def write():
        storage.write_bytes(new, DATA)
        return storage.read_bytes(new)

    return {
        "read": (lambda: storage.read_bytes(whole), DATA),
        "range": (lambda: storage.read_range(whole, 10, 1000), DATA[10:1010]),
        "download": (download, DATA),
        "put": (lambda: storage.put_if_absent(new, DATA), DATA),
        "write": (write, DATA),
        "upload": (upload, DATA),
        "size": (lambda: storage.size_bytes(whole), len(DATA)),
        "exists": (lambda: storage.exists(whole), True),
        "list": (lambda: len(storage.list_files(storage.join(prefix, "whole"))), 1),
        "commit": (lambda: storage.commit_record(f"{new}.json", RECORD), RECORD),
    }


CALLS = ("read", "range", "download", "put", "write", "upload", "size", "exists", "commit")


@pytest.mark.parametrize("fault", ALL_FAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_two_faults_are_ridden_out(name, fault, prefix, proxy, tmp_path):
    storage.write_bytes(storage.join(prefix, "whole"), DATA)
    call, expected = calls(prefix, tmp_path)[name]
    proxy.fault_of = first(2, fault)
    with at_most(30):
        assert call() == expected
    assert proxy.num_faults >= 1  # a delay is no failure, and a HEAD has no body to cut
    proxy.fault_of = lambda _: ""
    for item in storage.list_files(prefix):
        if not item.uri.endswith(".json"):
            assert storage.read_bytes(item.uri) == DATA


@pytest.mark.parametrize("fault", ["503", "slow_down", "500"])
def test_twelve_refusals_in_a_row_are_ridden_out(fault, prefix, proxy):
    proxy.fault_of = first(12, fault)
    with at_most(90 / HURRY):
        assert storage.put_if_absent(storage.join(prefix, "x"), DATA) == DATA
    proxy.fault_of = first(12, fault)
    with at_most(90 / HURRY):
        assert storage.read_bytes(storage.join(prefix, "x")) == DATA
    assert proxy.num_faults == 24


@pytest.mark.parametrize("fault", ["lost", "reset_after"])
def test_a_lost_answer_of_our_own_put_is_recognised(fault, prefix, proxy):
    proxy.fault_of = first(1, fault, method="PUT", conditional=True)
    assert storage.put_if_absent(storage.join(prefix, "own"), b"ours") == b"ours"
    assert [r.method for r in proxy.requests[:2]] == ["PUT", "PUT"]
    assert storage.put_if_absent(storage.join(prefix, "own"), b"theirs") == b"ours"


def test_a_store_that_does_not_say_which_condition_failed(prefix, proxy):
    uri = storage.join(prefix, "taken")
    storage.put_if_absent(uri, b"first")
    proxy.fault_of = first(9, "bare_412")
    with at_most(10):
        assert storage.put_if_absent(uri, b"second") == b"first"
    assert proxy.num_faults > 0


def test_a_wrong_clock_is_named_at_once(prefix, proxy):
    proxy.fault_of = first(99, "skewed", method="PUT")
    with at_most(10), pytest.raises(StorageConfigurationError, match="set the clock"):
        storage.write_bytes(storage.join(prefix, "x"), b"x")


@pytest.mark.parametrize("fault", ["503", "reset_before"])
def test_trouble_that_lasts_is_one_typed_error_in_time(fault, prefix, proxy):
    proxy.fault_of = lambda _: fault
    with at_most(120 / HURRY), pytest.raises(StorageError, match="tries") as error:
        storage.put_if_absent(storage.join(prefix, "x"), DATA)
    assert error.value.transient
    assert proxy.num_faults >= 12
    proxy.fault_of = lambda _: ""
    assert not storage.exists(storage.join(prefix, "x"))


@pytest.mark.parametrize("name", ["read", "download", "put", "upload", "exists", "list"])
def test_silence_is_one_typed_error_in_time(name, prefix, proxy, tmp_path, monkeypatch):
    deadline_s = storage.ANSWER_DEADLINE_S
    assert 2 * deadline_s + storage.BUSY_BUDGET_S <= 120
    monkeypatch.setattr(storage, "ANSWER_DEADLINE_S", deadline_s / HURRY)
    storage.write_bytes(storage.join(prefix, "whole"), DATA)
    proxy.fault_of = lambda _: "black_hole"
    with at_most(15), pytest.raises(StorageError):
        calls(prefix, tmp_path)[name][0]()


def test_eight_writers_through_faults_agree(prefix, proxy):
    uri = storage.join(prefix, "commit")
    kinds = iter(ALL_FAULTS * 3)
    proxy.fault_of = lambda request: next(kinds, "") if request.number % 2 else ""
    answers: set[bytes] = set()
    threads = [
        threading.Thread(target=lambda n=n: answers.add(storage.put_if_absent(uri, b"%d" % n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.fault_of = lambda _: ""
    assert answers == {storage.read_bytes(uri)}


def everything_below(prefix):
    return {item.uri: storage.read_bytes(item.uri) for item in storage.list_files(prefix)}


def test_a_whole_data_root_through_random_faults_is_that_of_a_clean_run(prefix, proxy, tmp_path):
    data_roots.write_data_root(tmp_path, prefix)
    clean = everything_below(prefix)
    assert sum(uri.endswith("manifest.json") for uri in clean) == 4
    for seed in range(3):
        storage.remove_directory(prefix)
        shutil.rmtree(tmp_path / "videos")
        shutil.rmtree(tmp_path / "visual")
        proxy.num_faults = 0
        proxy.fault_of = at_random(seed, 0.2)
        data_roots.write_data_root(tmp_path, prefix)
        proxy.fault_of = lambda _: ""
        assert proxy.num_faults > 10
        assert everything_below(prefix) == clean
