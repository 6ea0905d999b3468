"""The spool: what was appended is read again, whatever happened to the processes in between."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import spool
from tasks.spool import Spool

WRITER = """
import os, signal, sys
from tasks.spool import Spool
file = Spool(sys.argv[1], "run")
for step in range(int(sys.argv[2]), int(sys.argv[3])):
    file.append(step=step, metrics={"train/loss": float(step), "who": float(os.getpid())})
if sys.argv[4] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def read_all(path: Path) -> list[spool.Entry]:
    entries, offset = [], 0
    while (part := spool.read(path, offset))[1] != offset:
        entries += part[0]
        offset = part[1]
    return entries


def writer(folder: Path, first: int, last: int, end: str = "exit") -> "subprocess.Popen[bytes]":
    arguments = [str(folder), str(first), str(last), end]
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments])


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    file = Spool(str(tmp_path), "run")
    values = {"a": 0.1 + 0.2, "b": -math.inf, "c": 1e-320}
    file.append(step=7, metrics=values)
    file.append(step=8, metrics={"d": math.nan})
    file.append(status="FAILED")
    first, second, third = read_all(file.path)
    assert (first.step, first.metrics, first.status) == (7, values, "")
    assert math.isnan(second.metrics["d"])
    assert (third.metrics, third.status) == ({}, "FAILED")
    assert not file.close(0)
    assert file.path.exists()


def test_what_a_killed_process_has_written_is_there(tmp_path: Path) -> None:
    assert writer(tmp_path, 0, 500, "kill").wait(30) == -signal.SIGKILL
    assert [entry.step for entry in read_all(tmp_path / "run.jsonl")] == list(range(500))


def test_two_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    both = [writer(tmp_path, 0, 3000), writer(tmp_path, 3000, 6000)]
    assert [process.wait(60) for process in both] == [0, 0]
    entries = read_all(tmp_path / "run.jsonl")
    assert sorted(entry.step for entry in entries) == list(range(6000))


def test_a_line_that_is_not_whole_is_left_and_then_passed_over(tmp_path: Path) -> None:
    file = Spool(str(tmp_path), "run")
    file.append(step=1, metrics={"a": 1.0})
    with file.path.open("ab") as broken:
        broken.write(b'{"time_ms": 5, "step": 2, "met')
    entries, offset = spool.read(file.path, 0)
    assert [entry.step for entry in entries] == [1]
    assert offset < file.num_bytes()
    file.close(0)
    again = Spool(str(tmp_path), "run")  # the machine was lost; the next attempt goes on
    again.append(step=3, metrics={"a": 3.0})
    assert [entry.step for entry in read_all(again.path)] == [1, 3]


@pytest.mark.parametrize(
    "line",
    [b"[]", b"{}", b"\xff\xfe", b'{"time_ms": 1, "step": "x", "metrics": {}}', b"0" * 600_000],
)
def test_damaged_lines_are_passed_over(tmp_path: Path, line: bytes) -> None:
    good = json.dumps({"time_ms": 1, "step": 5, "metrics": {"a": 1}}).encode()
    (tmp_path / "run.jsonl").write_bytes(line + b"\n" + good + b"\n")
    assert [entry.step for entry in read_all(tmp_path / "run.jsonl")][-1:] == [5]


def test_file_is_removed_by_the_last_one_that_has_sent_all_of_it(tmp_path: Path) -> None:
    first, second = Spool(str(tmp_path), "run"), Spool(str(tmp_path), "run")
    first.append(step=1, metrics={"a": 1.0})
    assert first.close(first.num_bytes())
    assert first.path.exists(), "somebody else still has it open"
    second.append(step=2, metrics={"a": 2.0})
    assert [entry.step for entry in read_all(second.path)] == [1, 2]
    assert second.close(second.num_bytes())
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_values_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Spool(str(tmp_path), "run")
    real_write = os.write
    room = [40]

    def write_to_full_disk(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = min(len(data), room[0])
        room[0] -= count
        return real_write(descriptor, data[:count])

    monkeypatch.setattr(os, "write", write_to_full_disk)
    for step in range(3):
        file.append(step=step, metrics={"a": 1.0})
    assert read_all(file.path) == []
    room[0] = 10_000
    file.append(step=3, metrics={"a": 1.0})
    assert [entry.step for entry in read_all(file.path)] == [0, 1, 2, 3]


def test_place_that_cannot_be_written_to_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    file = Spool(str(tmp_path / "file" / "spool"), "run")
    file.append(step=1, metrics={"a": 1.0})
    assert [entry.step for entry in read_all(file.path)] == [1]
    assert str(file.path) in caplog.text
    file.close(file.num_bytes())


def test_bucket_has_a_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = spool.local_folder("s3://bucket/data/spool")
    assert folder.is_relative_to(tmp_path)
    assert folder != spool.local_folder("s3://bucket/other/spool")


def test_run_is_in_the_name() -> None:
    assert spool.run_of("s3://bucket/spool/0123abcd.77.jsonl") == "0123abcd"
    assert spool.run_of("/a.b/spool/0123abcd.jsonl") == "0123abcd"
