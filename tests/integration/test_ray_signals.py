"""SIGTERM to a driver of Ray Train and to a worker: nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray_driver import NUM_WORKERS
from tests.warm import ROOT, Warm, trace, warm_process
from ursa.artifacts import StageRequest
from ursa.training.checkpoint import latest_checkpoint
from ursa.training.stage import _stage_uri, stage_fingerprint

# no checkpoint comes before the last step
SETTINGS = {"max_steps": 24, "warmup_steps": 5, "checkpoint_every": 24, "log_every": 1}
LIMIT_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def warm():
    with warm_process() as process:
        yield process


def steps_done(log: Path) -> list[int]:
    """Return the steps that rank 0 has done, one as often as it was done."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [row["step"] for row in rows if row["rank"] == 0]


class Case:
    """A stage on Ray Train in a process of its own."""

    def __init__(self, request: StageRequest, folder: Path, *, is_cluster: bool) -> None:
        self.request, self.folder = request, folder
        self.log = folder / "log.jsonl"
        self.log.touch()
        case = {
            "request": request.model_dump_json(),
            "log": str(self.log),
            "folder": str(folder),
            "pause_s": 0.3,
            "is_cluster": is_cluster,
        }
        (folder / "case.json").write_text(json.dumps(case), "utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_driver", str(folder / "case.json")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
            start_new_session=True,
        )

    def worker_pids(self, rank: int) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in self.folder.glob(f"{rank}-*")]

    def wait_for_step(self, step: int) -> None:
        end_s = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < end_s:
            if step in steps_done(self.log):
                return
            time.sleep(0.05)
        pytest.fail(f"step {step} was not reached, exit status {self.process.poll()}")


@pytest.fixture
def start(make_request, tmp_path):
    """Return a function that starts the stage; what still runs at the end is killed."""
    cases: list[Case] = []

    def begin(*, is_cluster: bool = False) -> Case:
        folder = tmp_path / "case"
        folder.mkdir()
        request = make_request(output="case/out", **SETTINGS)
        cases.append(Case(request, folder, is_cluster=is_cluster))
        return cases[-1]

    yield begin
    for case in cases:
        case.process.kill()
        case.process.wait(30)


@pytest.fixture
def undisturbed(warm: Warm, make_request, tmp_path):
    request, log = make_request(output="straight", **SETTINGS), tmp_path / "straight.jsonl"
    assert warm.run(request, log, ranks=NUM_WORKERS).exits == [0] * NUM_WORKERS
    return trace(request, log, NUM_WORKERS)


@pytest.mark.parametrize("where", ["process", "group", "process of a cluster"])
def test_driver(start: Callable[..., Case], undisturbed, warm: Warm, where: str) -> None:
    """To the group: the daemons of Ray on this machine get it too."""
    case = start(is_cluster=where == "process of a cluster")
    case.wait_for_step(5)
    send = os.killpg if where == "group" else os.kill
    send(case.process.pid, signal.SIGTERM)
    began = time.monotonic()
    assert case.process.wait(LIMIT_S) == 143
    assert time.monotonic() - began < 30  # then Prefect and Kubernetes kill; saved it is long ago
    found = latest_checkpoint(_stage_uri(case.request), fingerprint=stage_fingerprint(case.request))
    assert found is not None
    done = steps_done(case.log)
    assert done == list(range(found[1].step))
    assert len(done) < SETTINGS["max_steps"]
    # the rest without Ray: checkpoints know nothing of the launcher
    assert warm.run(case.request, case.log, ranks=NUM_WORKERS).exits == [0] * NUM_WORKERS
    assert steps_done(case.log) == list(range(SETTINGS["max_steps"]))
    assert_equal(case, undisturbed)


def test_worker(start: Callable[..., Case], undisturbed) -> None:
    """All save, and the group goes on."""
    case = start()
    case.wait_for_step(5)
    (pid,) = case.worker_pids(1)
    os.kill(pid, signal.SIGTERM)
    assert case.process.wait(LIMIT_S) == 0
    assert [len(case.worker_pids(rank)) for rank in range(NUM_WORKERS)] == [2, 2]
    # each step once: the group has gone on from where it was
    assert Counter(steps_done(case.log)) == Counter(range(SETTINGS["max_steps"]))
    assert_equal(case, undisturbed)


def assert_equal(case: Case, undisturbed) -> None:
    one = trace(case.request, case.log, NUM_WORKERS)
    assert one.steps == undisturbed.steps
    assert one.sha256 == undisturbed.sha256


def test_a_gpu_that_ray_does_not_have_is_named_at_once():
    """Ray itself would wait for one for ever, without a word."""
    script = """
from tasks import cluster
from tasks.settings import RuntimeSettings
from ursa.errors import ConfigError

settings = RuntimeSettings(num_train_workers=2, gpus_per_train_worker=1)
try:
    cluster.run_distributed(lambda *_: None, {}, lambda: None, settings)
except ConfigError as error:
    print(error)
finally:
    cluster.shutdown()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=True,
    )
    assert "URSA_GPUS_PER_TRAIN_WORKER 1 needs 2 GPUs, and Ray has 0" in done.stdout
