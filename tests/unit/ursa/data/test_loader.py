"""What the threads of the loader do: reading ahead, saying what went wrong, stopping."""

import threading
import time

import pytest

from tests import factories
from ursa import storage
from ursa.data.loader import TokenLoader
from ursa.data.shards import write_shard
from ursa.errors import DataExhaustedError, ShardFormatError, StorageError

pytestmark = pytest.mark.usefixtures("no_threads_left")
SAMPLE_BYTES = 2 * 12 + 512
PER_SHARD = 4
NUM_SHARDS = 12


@pytest.fixture
def dataset(tmp_path):
    """Twelve shards of four samples."""
    rows = factories.token_rows("video", NUM_SHARDS * PER_SHARD)
    shards = tuple(
        write_shard(rows[i : i + PER_SHARD], f"{tmp_path}/s", codebook_size=60)
        for i in range(0, len(rows), PER_SHARD)
    )
    empty = factories.write_dataset(str(tmp_path), "video", "train", 0)
    return empty.model_copy(update={"shards": shards, "num_samples": len(rows)})


@pytest.fixture
def reads(monkeypatch):
    """The store, 20 ms slower; notes which shards are being read and which have been."""

    class Reads:
        def __init__(self):
            self.begun = []
            self.running = 0
            self.most = 0
            self.lock = threading.Lock()

        def __call__(self, uri):
            with self.lock:
                self.begun.append(uri)
                self.running += 1
                self.most = max(self.most, self.running)
            time.sleep(0.02)
            try:
                return original(uri)
            finally:
                with self.lock:
                    self.running -= 1

        def wait(self, count):
            """Wait until so many have been read; threads alone do it."""
            deadline = time.monotonic() + 20
            while len(self.begun) < count or self.running:
                assert time.monotonic() < deadline, self.begun
                time.sleep(0.005)

    original, found = storage.read_bytes, Reads()
    monkeypatch.setattr(storage, "read_bytes", found)
    return found


def loader_of(dataset, *, shards_per_block, batch_size=PER_SHARD, num_steps=24, **options):
    return TokenLoader(
        dataset,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=3,
        block_bytes=shards_per_block * PER_SHARD * SAMPLE_BYTES,
        **options,
    )


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_the_next_block_is_read_ahead_and_no_other(dataset, reads, num_threads):
    with loader_of(dataset, shards_per_block=3, num_threads=num_threads) as loader:
        loader.batch(0)
        reads.wait(6)
        assert len(reads.begun) == 6
        loader.batch(1)
        loader.batch(2)
        assert len(reads.begun) == 6
        loader.batch(3)
        reads.wait(9)
        assert len(reads.begun) == len(set(reads.begun)) == 9
        assert reads.most == num_threads


def test_no_more_than_two_blocks_are_held(dataset):
    with loader_of(dataset, shards_per_block=3, batch_size=5) as loader:
        for step in range(24):
            loader.batch(step)
            assert sum(len(held.ids) for held in loader._held.values()) <= 2 * 3 * PER_SHARD


def test_a_data_set_of_one_block_is_read_once(dataset, reads):
    with loader_of(dataset, shards_per_block=NUM_SHARDS) as loader:
        for step in range(24):
            loader.batch(step)
    assert len(reads.begun) == NUM_SHARDS


def test_a_step_reads_its_block_alone(dataset, reads):
    with loader_of(dataset, shards_per_block=3, num_steps=12) as loader:
        loader.batch(11)
    assert len(reads.begun) == 3


def test_nothing_is_read_that_no_step_needs(dataset, reads):
    with loader_of(dataset, shards_per_block=3, num_steps=3) as loader:
        for step in range(3):
            loader.batch(step)
        time.sleep(0.1)
    assert len(reads.begun) == 3


def test_a_damaged_shard_of_the_next_block_is_said_at_the_next_step(dataset, reads):
    with loader_of(dataset, shards_per_block=3) as loader:
        whole = loader.batch(0)
        damaged = sorted(dataset.shards, key=lambda shard: shard.sha256)[
            loader._order.blocks(0)[1].shards[0]
        ]
    storage.write_bytes(damaged.uri, b"damaged")
    reads.begun.clear()
    with loader_of(dataset, shards_per_block=3) as loader:
        assert loader.batch(0).sample_ids == whole.sample_ids
        reads.wait(6)
        time.sleep(0.05)
        with pytest.raises(ShardFormatError, match=f"{damaged.uri}: sha256 is"):
            loader.batch(1)


def test_a_store_that_was_busy_once_is_asked_again(dataset, monkeypatch):
    with loader_of(dataset, shards_per_block=3) as loader:
        whole = loader.batch(0)
    read, left = storage.read_bytes, [2]

    def busy(uri):
        if left[0]:
            left[0] -= 1
            raise StorageError("busy")
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", busy)
    with loader_of(dataset, shards_per_block=3, num_threads=1) as loader:
        with pytest.raises(StorageError, match="busy"):
            loader.batch(0)
        left[0] = 0
        assert loader.batch(0).sample_ids == whole.sample_ids


def test_a_missing_shard_says_which(dataset):
    for shard in dataset.shards:
        storage.remove_file(shard.uri)
    with (
        loader_of(dataset, shards_per_block=3) as loader,
        pytest.raises(ShardFormatError, match="the shard is missing; `ursa data repair`"),
    ):
        loader.batch(0)


def test_closing_drops_what_has_not_begun(dataset, reads):
    loader = loader_of(dataset, shards_per_block=6, num_threads=1)
    loader.batch(0)
    loader.close()
    begun = len(reads.begun)
    assert 6 <= begun < NUM_SHARDS
    assert reads.running == 0
    time.sleep(0.1)
    assert len(reads.begun) == begun


def test_no_samples_say_what_to_do(dataset):
    empty = dataset.model_copy(update={"shards": ()})
    with pytest.raises(DataExhaustedError, match="no train video samples; loosen"):
        loader_of(empty, shards_per_block=1)
