import threading
import time
from pathlib import Path

import pytest
import torch

from ursa import storage
from ursa.errors import CheckpointError, NonFiniteLossError, StorageError
from ursa.training.checkpoint import (
    MARKER_FILE,
    STATE_FILE,
    CheckpointWriter,
    latest_checkpoint,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)

PRINT = "f" * 64


def save(uri, step, *, keep=9, fingerprint=PRINT, value=None):
    state = {"weight": torch.full((3,), float(step) if value is None else value)}
    return save_checkpoint(
        state, uri, step=step, num_samples_seen=4 * step, fingerprint=fingerprint, keep=keep
    )


def newest(uri):
    found = latest_checkpoint(uri, fingerprint=PRINT)
    return None if found is None else found[1].step


def files(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_round_trip(tmp_path):
    uri = save(str(tmp_path), 5)
    marker, state = load_checkpoint(uri)
    assert (marker.step, marker.num_samples_seen, marker.fingerprint) == (5, 20, PRINT)
    assert torch.equal(state["weight"], torch.full((3,), 5.0))


def test_nothing_there(tmp_path):
    assert newest(str(tmp_path / "never")) is None
    with pytest.raises(CheckpointError, match="not committed"):
        load_checkpoint(str(tmp_path / "never"))


def test_killed_before_the_marker_is_ignored(tmp_path):
    save(str(tmp_path), 1)
    killed = storage.local_path(save(str(tmp_path), 2))
    (killed / MARKER_FILE).unlink()
    assert newest(str(tmp_path)) == 1
    with pytest.raises(CheckpointError, match=r"COMMITTED.json is missing"):
        load_checkpoint(str(killed))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_damaged_state_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    save(str(tmp_path), 1)
    folder = storage.local_path(save(str(tmp_path), 2))
    path = folder / STATE_FILE
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    path.write_bytes(data[: {"flipped": len(data), "cut": len(data) // 2}.get(damage, 0)])
    if damage == "gone":
        path.unlink()
    assert newest(str(tmp_path)) == 1
    assert "passing over" in caplog.text
    with pytest.raises(CheckpointError):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"{}"])
def test_damaged_marker_is_passed_over_for_the_one_before(tmp_path, content):
    save(str(tmp_path), 1)
    folder = storage.local_path(save(str(tmp_path), 2))
    (folder / MARKER_FILE).write_bytes(content)
    assert newest(str(tmp_path)) == 1
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(str(folder))


def test_other_settings_are_passed_over(tmp_path):
    save(str(tmp_path), 1)
    save(str(tmp_path), 2, fingerprint="0" * 64)
    assert newest(str(tmp_path)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, value):
    save(str(tmp_path), 1)
    before = files(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"1 tensors are not finite \(weight\)"):
        save(str(tmp_path), 2, value=value)
    assert files(tmp_path) == before


def test_large_numbers_are_finite_and_one_bad_one_is_found():
    state = {
        "large": torch.full((8,), 3e38),
        "both": torch.tensor([torch.inf, -torch.inf, 1.0]),
        "nan": torch.tensor([0.0, torch.nan]),
        "count": torch.tensor(3),
        "half": torch.full((100,), 60000.0, dtype=torch.float16),
    }
    assert not_finite(state) == ["both", "nan"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 4):
        save(str(tmp_path), step, keep=2)
    steps = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert steps == {"step-00000030", "step-00000004"}
    assert newest(str(tmp_path)) == 30


@pytest.mark.parametrize("keep", [1, 2, None])
def test_as_many_are_kept_as_asked(tmp_path, keep):
    for step in range(1, 6):
        save(str(tmp_path), step, keep=keep)
    steps = sorted(int(path.name[5:13]) for path in tmp_path.iterdir())
    assert steps == ([1, 2, 3, 4, 5] if keep is None else [1, 2, 3, 4, 5][-keep:])


def test_a_second_save_of_a_step_does_not_touch_the_first(tmp_path):
    first, second = save(str(tmp_path), 3), save(str(tmp_path), 3)
    assert first != second
    assert load_checkpoint(first)[0].step == load_checkpoint(second)[0].step == 3


def test_the_writer_holds_one_save_and_hides_no_error():
    writer, gate, order = CheckpointWriter(), threading.Event(), []

    def slow():
        gate.wait(10)
        order.append("first")
        return "uri-1"

    def fails():
        order.append("second")
        raise StorageError("no answer")

    writer.submit(slow, "one")
    writer.check()  # in flight: nothing to say
    threading.Timer(0.05, gate.set).start()
    writer.submit(fails, "two")  # waits for the first
    assert order[0] == "first"
    with pytest.raises(StorageError, match="no answer"):
        writer.wait()
    writer.check()  # said once
    assert writer.wait() == "uri-1"


def test_a_save_that_hangs_is_an_error_with_a_limit():
    writer, gate = CheckpointWriter(limit_s=0.05), threading.Event()
    writer.submit(lambda: str(gate.wait(10)), "the checkpoint of step 7 at /x")
    time.sleep(0.1)
    with pytest.raises(StorageError, match=r"step 7 at /x was not written within 0.05 s; check"):
        writer.check()
    gate.set()
