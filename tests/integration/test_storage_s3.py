"""The store against a real S3 server process on loopback."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import data_roots, factories
from ursa import storage
from ursa.artifacts import SourceVideo
from ursa.data.clips import read_selection
from ursa.data.dataset import TokenSamples
from ursa.errors import DataError, ManifestError, StorageConfigurationError, StorageError
from ursa.inspection.repair import repair_root
from ursa.inspection.stats import data_stats
from ursa.inspection.verify import verify_root
from ursa.inspection.what_if import what_if
from ursa.training.checkpoint import latest_checkpoint
from ursa.training.stage import find_stage, stage_fingerprint, train_stage

pytest.importorskip("moto.server")
pytestmark = pytest.mark.usefixtures("s3_environment")

BUCKET = "ursa-test"
RECORD = SourceVideo(uri="s3://b/a", num_bytes=3, etag="x")


@pytest.fixture
def prefix(s3_prefix):
    return s3_prefix


def unused_tcp_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def at_most(seconds):
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    assert taken < seconds, f"took {taken:.1f} s"


@pytest.mark.parametrize("key", ["m/../../evil.txt", "m//evil.txt", "m/./evil.txt"])
def test_a_key_that_leads_out_of_its_prefix_is_not_downloaded(prefix, key):
    storage.write_bytes(storage.join(prefix, "m", "a.txt"), b"a")
    storage.write_bytes(f"{prefix}/{key}", b"evil")
    names = [item.uri for item in storage.list_files(f"{prefix}/m")]
    assert len(names) == 2, names
    with (
        pytest.raises(DataError, match="is no name of a file"),
        storage.local_directory(f"{prefix}/m"),
    ):
        raise AssertionError("it was downloaded")


def test_bytes_are_a_round_trip(prefix):
    uri = storage.join(prefix, "a", "b c%.bin")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    assert not storage.exists(uri)
    for data in (b"", b"one", b"x" * (6 << 20)):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
    assert storage.exists(uri)
    with storage.local_copy(uri) as path:
        assert path.stat().st_size == 6 << 20
        local = path
    assert not local.exists()
    storage.remove_file(uri)
    assert not storage.exists(uri)


def test_first_writer_wins_and_all_learn_it(prefix):
    uri = storage.join(prefix, "commit")
    barrier = threading.Barrier(8)

    def write(index):
        barrier.wait()
        return storage.put_if_absent(uri, f"writer {index}".encode())

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(write, range(8)))
    assert answers == {storage.read_bytes(uri)}
    assert storage.put_if_absent(uri, b"late") in answers


def test_listing_is_sorted_and_complete(prefix):
    for name in ("b/2", "b/1", "a", "b.c/3"):
        storage.write_bytes(storage.join(prefix, name), name.encode())
    found = storage.list_files(prefix)
    assert [item.uri.removeprefix(prefix + "/") for item in found] == ["a", "b.c/3", "b/1", "b/2"]
    assert [item.num_bytes for item in found] == [1, 5, 3, 3]
    assert len({item.etag for item in found}) == 4
    # a prefix is a directory: b does not take b.c with it
    assert len(storage.list_files(storage.join(prefix, "b"))) == 2
    with pytest.raises(FileNotFoundError):
        storage.list_files(storage.join(prefix, "gone"))
    assert storage.list_irregular_files(prefix) == []


def test_directories_are_copied_and_removed(prefix, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b.txt").write_text("b")
    hashes = storage.upload_directory(tmp_path, storage.join(prefix, "d"))
    with storage.local_directory(storage.join(prefix, "d")) as folder:
        assert {name: storage.sha256_file(folder / name) for name in hashes} == hashes
    storage.remove_directory(storage.join(prefix, "d"))
    with pytest.raises(FileNotFoundError):
        storage.list_files(storage.join(prefix, "d"))
    storage.remove_directory(storage.join(prefix, "d"))


def test_records_are_committed_once(prefix):
    uri = storage.join(prefix, "manifest.json")
    assert storage.load_record(uri, SourceVideo) is None
    assert storage.commit_record(uri, RECORD) == RECORD
    late = RECORD.model_copy(update={"etag": "y"})
    assert storage.commit_record(uri, late) == RECORD
    storage.write_bytes(uri, b"{")
    with pytest.raises(ManifestError, match="not a manifest"):
        storage.load_record(uri, SourceVideo)


def test_store_is_checked_and_left_clean(prefix):
    storage.check_store(prefix)
    with pytest.raises(FileNotFoundError):
        storage.list_files(prefix)


def calls_on(uri, tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    return {
        "read": lambda: storage.read_bytes(storage.join(uri, "f")),
        "write": lambda: storage.write_bytes(storage.join(uri, "f"), b"x"),
        "put": lambda: storage.put_if_absent(storage.join(uri, "f"), b"x"),
        "list": lambda: storage.list_files(uri),
        "upload": lambda: storage.upload_file(tmp_path / "f", storage.join(uri, "f")),
        "check": lambda: storage.check_store(uri),
    }


@pytest.mark.parametrize("call", ["write", "put", "upload", "check"])
def test_unknown_bucket_is_one_clear_line(prefix, tmp_path, call):
    with at_most(30), pytest.raises(StorageError) as error:
        calls_on("s3://no-such-bucket/x", tmp_path)[call]()
    assert "s3://no-such-bucket" in str(error.value)
    assert "\n" not in str(error.value)
    # trying again cannot help
    assert isinstance(error.value, StorageConfigurationError)
    assert "bucket" in str(error.value).removeprefix("s3://no-such-bucket")


@pytest.mark.parametrize("call", ["list", "check"])
def test_unreachable_endpoint_is_one_clear_line(monkeypatch, tmp_path, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_tcp_port()}")
    with at_most(30), pytest.raises(StorageError) as error:
        calls_on(f"s3://{BUCKET}/x", tmp_path)[call]()
    assert "AWS_ENDPOINT_URL" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.transient


def test_missing_credentials_are_named(prefix, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with at_most(30), pytest.raises(StorageConfigurationError, match="set AWS_ACCESS_KEY_ID"):
        storage.write_bytes(storage.join(prefix, "x"), b"x")


def test_an_upload_into_the_void_is_abandoned(monkeypatch):
    """The server takes the connection and never answers."""
    monkeypatch.setattr(storage, "ANSWER_DEADLINE_S", 0.5)
    monkeypatch.setattr(storage, "BUSY_BUDGET_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with at_most(30), pytest.raises(StorageError, match=r"no answer within 0\.\d+ s"):
            storage.put_if_absent(f"s3://{BUCKET}/x", b"x" * 100_000)


def test_training_resumes_from_the_store(prefix, tiny_data):
    request = factories.stage_request(tiny_data, "video_pretrain", prefix)
    losses: list[float] = []

    def die(step, metrics):
        if step == 4:
            raise KeyboardInterrupt
        losses.append(metrics["train/loss"])

    with pytest.raises(KeyboardInterrupt):
        train_stage(request, on_metrics=die)
    stage_uri = storage.join(
        prefix, "checkpoints", "video_pretrain", stage_fingerprint(request)[:32]
    )
    found = latest_checkpoint(stage_uri, fingerprint=stage_fingerprint(request))
    assert found is not None
    assert found[1].step == 3
    steps: list[int] = []
    checkpoint = train_stage(request, on_metrics=lambda step, _: steps.append(step))
    assert steps == [4, 5, 6]
    assert find_stage(request) == checkpoint
    assert checkpoint.uri.startswith(prefix)


def test_shards_are_read_from_the_store(prefix):
    dataset = factories.write_dataset(prefix, "video", "train", 6)
    samples = TokenSamples(dataset)
    rows = factories.token_rows("video", 6)
    assert samples.sample_ids == [row["sample_id"] for row in rows]


def test_a_data_root_in_the_store_is_verified_and_repaired(prefix, tmp_path):
    root = data_roots.write_data_root(tmp_path, prefix)
    whole = verify_root(prefix, with_media=True)
    assert whole.problems == ()
    assert whole.not_checked == ()
    shards = root.datasets.video_train.shards
    clip = read_selection(root.selection)[0].clip
    before = {item.uri: item.etag for item in storage.list_files(prefix)}
    storage.remove_file(shards[0].uri)
    storage.write_bytes(clip.media_uri, b"x" + storage.read_bytes(clip.media_uri)[1:])
    found = {problem.uri for problem in verify_root(prefix, with_media=True).problems}
    assert found == {shards[0].uri, clip.media_uri}
    assert repair_root(prefix, config=root.config).num_left == 0
    assert {item.uri: item.etag for item in storage.list_files(prefix)} == before
    stats = data_stats(prefix)
    assert stats.media_bytes > 0
    assert len(stats.tokens) == 4
    assert what_if(prefix, root.config).then.num_kept == stats.num_kept == 4
    with pytest.raises(DataError, match="holds no committed clips"):
        verify_root(f"{prefix}-not")
