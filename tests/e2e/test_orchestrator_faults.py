"""The orchestrator dies, says what is not so, or is told to stop: what is done stays done.

All units are counted by their records, as nobody but the pipeline knows what it has done.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.e2e.test_kills import EVERY, VIDEOS, Chain, checkpoints, finished_work, overrides
from tests.running_services import (
    ROOT,
    Running,
    at,
    mlflow_runs,
    run_script,
    service_environment,
    tags,
    versions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HEARTBEAT_S = 30.0
RUN_LIMIT_S = 420.0
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Run(NamedTuple):
    """A flow run that nobody watches, and where its data are."""

    chain: Chain
    id: str

    def flow_run(self) -> dict[str, Any]:
        services = self.chain.services
        return dict(services.ask(f"{services.prefect_url}/api/flow_runs/{self.id}"))

    def wait(self, types: set[str], limit_s: float = RUN_LIMIT_S) -> dict[str, Any]:
        """Wait for a state of these types; a server that is away is asked again."""
        deadline = time.monotonic() + limit_s
        state: dict[str, Any] = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                state = self.flow_run()["state"]
                if state["type"] in types:
                    return state
            time.sleep(0.2)
        raise AssertionError(f"not {types} within {limit_s:.0f} s: {state}")

    def declare_crashed(self) -> None:
        services = self.chain.services
        state = {"type": "CRASHED", "name": "Crashed", "message": "said the test"}
        address = f"{services.prefect_url}/api/flow_runs/{self.id}/set_state"
        services.ask(address, {"state": state, "force": True})


def begin(chain: Chain) -> Run:
    """Have the worker run the pipeline."""
    services = chain.services
    api = f"{services.prefect_url}/api"
    deployment = services.ask(f"{api}/deployments/name/ursa/full-training")
    variables = {"URSA_DATA_URI": str(chain.data), "URSA_LAUNCHER": chain.launcher}
    parameters = {
        "source_uri": str(chain.source),
        "preset": "tiny",
        "overrides": overrides(chain.model_name),
    }
    body = {"parameters": parameters, "job_variables": {"env": variables}}
    made = services.ask(f"{api}/deployments/{deployment['id']}/create_flow_run", body)
    return Run(chain, made["id"])


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = RUN_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {limit_s:.0f} s"
        time.sleep(0.02)


def trains(chain: Chain, stage: str = "video_pretrain", number: int = 2) -> Callable[[], bool]:
    """Return whether a stage has so many checkpoints."""
    return lambda: len(chain.found(f"checkpoints/{stage}/*/*/COMMITTED.json")) >= number


def service_process(services: Running, name: str) -> psutil.Process:
    record = json.loads((services.folder / "run" / f"{name}.json").read_text())
    return psutil.Process(record["pid"])


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def up(services: Running) -> None:
    done = services.script("up")
    assert done.returncode == 0, done.stdout + done.stderr


def is_kept(before: dict[Path, Any], chain: Chain) -> bool:
    """Whether every file that stood for finished work is the same file."""
    now = finished_work(chain)
    return {path: now.get(path) for path in before} == before


def each_once(chain: Chain) -> bool:
    """Whether all checkpoints of all stages were committed, each once, in one folder."""
    steps = list(range(EVERY, 41, EVERY))
    stages = ("image_pretrain", "video_pretrain", "async_finetune")
    return checkpoints(chain) == dict.fromkeys(stages, steps)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Services of this module alone, as they are killed."""
    folder = tmp_path_factory.mktemp("services")
    environment = service_environment(folder)
    try:
        done = run_script("up", environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        yield at(folder, environment)
    finally:
        run_script("down", environment=environment)


@pytest.fixture
def chain(services: Running, request: pytest.FixtureRequest, tmp_path: Path) -> Chain:
    source = tmp_path / "videos"
    source.mkdir()
    for name in VIDEOS:
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, source)
    name = f"faults-{request.node.name.split('[')[0].removeprefix('test_')[:20]}"
    return Chain(services, source, services.folder / name / "data", name, "local")


def test_a_machine_that_is_lost_is_noticed_and_one_unit_is_done_again(chain: Chain) -> None:
    services, run = chain.services, begin(chain)
    wait_for(trains(chain), "checkpoint")
    (flow,) = chain.flow_processes()
    worker = service_process(services, "worker")
    flow.suspend()
    at_kill, steps = finished_work(chain), checkpoints(chain)["video_pretrain"]
    reached = newest_step(chain)
    # at once, so that nobody is left who could tell
    kill([worker, *worker.children(recursive=True), flow])
    lost = time.monotonic()
    assert run.flow_run()["state"]["type"] == "RUNNING"

    state = run.wait({"CRASHED"}, limit_s=3 * HEARTBEAT_S + 10)
    sys.stdout.write(f"Crashed after {time.monotonic() - lost:.0f} s\n")
    assert "No heartbeat" in state["message"]

    up(services)
    again = begin(chain)
    assert again.wait(ENDED)["name"] == "Completed"
    assert is_kept(at_kill, chain)
    assert each_once(chain)
    sys.stdout.write(f"steps done again: {reached - steps[-1]}\n")
    assert reached - steps[-1] <= EVERY
    assert len(versions(services, chain.model_name)) == 1


def newest_step(chain: Chain) -> int:
    """Return the last step that the stage under way has written down."""
    lines = [
        json.loads(line)
        for path in chain.found("spool/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return max(line["step"] for line in lines if "train/loss" in line["metrics"])


def test_a_server_that_is_killed_is_ridden_out(chain: Chain) -> None:
    services, run = chain.services, begin(chain)
    wait_for(trains(chain, "image_pretrain"), "checkpoint")
    server = service_process(services, "prefect")
    before = finished_work(chain)
    kill([server, *server.children(recursive=True)])
    # the stage ends and the next one begins without a server
    wait_for(trains(chain, number=1), "checkpoint of the next stage")
    up(services)
    assert run.wait(ENDED)["name"] == "Completed"
    assert is_kept(before, chain)
    assert each_once(chain)

    # a completed run that is said to have crashed is looked at and left as it is
    run.declare_crashed()
    before = finished_work(chain)
    again = begin(chain)
    assert again.wait(ENDED)["name"] == "NothingChanged"
    assert finished_work(chain) == before
    assert len(versions(services, chain.model_name)) == 1


def cancel(run: Run) -> float:
    """Cancel as the page of the run does; return the seconds until it is and nothing is left."""
    services = run.chain.services
    began = time.monotonic()
    address = f"{services.prefect_url}/api/flow_runs/{run.id}/set_state"
    services.ask(address, {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    run.wait({"CANCELLED"}, limit_s=90)
    said = time.monotonic() - began
    wait_for(lambda: not leftovers(services), "end of all processes", 20)
    left = time.monotonic() - began
    sys.stdout.write(f"Cancelled after {said:.1f} s, no process after {left:.1f} s\n")
    return left


def leftovers(services: Running) -> list[str]:
    """Return the processes of these services that are no service: flows, Ray, decoders."""
    family: set[int] = set()
    for name in ("prefect", "mlflow", "worker"):
        leader = service_process(services, name)
        family |= {leader.pid, *(child.pid for child in leader.children(recursive=True))}
    flows = {process.pid for process in psutil.process_iter() if is_engine(process)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("URSA_SERVICES") != str(services.folder):
                continue
            parents = {parent.pid for parent in process.parents()}
            if process.pid not in family or flows & {process.pid, *parents}:
                found.append(" ".join(process.cmdline())[:200])
    return found


def is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[-2:] == ["-m", "prefect.engine"]
    return False


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("ingest", "clips/units/*/*.json"),
        ("tokenize", "tokens/units/*.json"),
        ("train", "checkpoints/video_pretrain/*/*/COMMITTED.json"),
    ],
)
def test_cancelling_ends_the_work_on_ray(chain: Chain, name: str, pattern: str) -> None:
    chain = chain._replace(launcher="ray", data=chain.services.folder / name / "data")
    run = begin(chain)
    wait_for(lambda: bool(chain.found(pattern)), pattern)
    assert any("ray" in line for line in leftovers(chain.services))
    before = finished_work(chain)
    assert cancel(run) < 40
    query = f"tags.`prefect.last_flow_run_id` = '{run.id}'"
    states = {
        tags(item)["ursa.stage"]: item["info"]["status"]
        for item in mlflow_runs(chain.services, query)
    }
    assert states["run"] == "KILLED"
    assert set(states.values()) <= {"KILLED", "FINISHED"}
    if name == "train":
        assert states["video-pretrain"] == "KILLED"
        again = begin(chain)
        assert again.wait(ENDED)["name"] == "Completed"
        found = checkpoints(chain)["video_pretrain"]
        # the signal has saved the step it came in, if none was due there
        saved = [step for step in found if step % EVERY]
        assert len(saved) <= 1
        assert found == sorted([*range(EVERY, 41, EVERY), *saved])
    assert is_kept(before, chain)
