"""SIGKILL of the flow process in the middle of every step, one run after another."""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet
import pytest

from tests import running_services
from tests.running_services import (
    ROOT,
    SCRIPT,
    STAGES,
    Running,
    changed,
    metric_history,
    mlflow_runs,
    run_arguments,
    tags,
    versions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

VIDEOS = ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4", "bbb_stretch.mp4")
MAX_STEPS = 40
EVERY = 5
RUN_LIMIT_S = 420.0


class Moment(NamedTuple):
    """When to kill: as soon as something of a step is there, long before all of it is."""

    step: str
    begun: str
    ended: str
    wait_s: float = 0.0


MOMENTS = (
    Moment("ingestion", "clips/units/*/*.json", "clips/sets/*/manifest.json"),
    Moment("selection", "clips/sets/*/manifest.json", "tokenizers/visual/*/manifest.json"),
    Moment(
        "visual tokenizer",
        "tokenizers/visual/*/fit/*/COMMITTED.json",
        "tokenizers/visual/*/manifest.json",
    ),
    Moment("tokenization", "tokens/units/*.json", "tokens/*/manifest.json"),
    *(
        Moment(
            name, f"checkpoints/{name}/*/*/COMMITTED.json", f"checkpoints/{name}/*/manifest.json"
        )
        for name in ("image_pretrain", "video_pretrain", "async_finetune")
    ),
    Moment("evaluation", "models/*/manifest.json", "evaluations/*/manifest.json", 0.5),
    Moment("registration", "../../mlflow/artifacts/*/models/*/artifacts/*", "none"),
)
ON_RAY = ("ingestion", "tokenization", "video_pretrain")
"""The other steps are the same with and without Ray."""


def overrides(model_name: str) -> dict[str, Any]:
    stage = {
        "max_steps": MAX_STEPS,
        "global_batch_size": 8,
        "checkpoint_every": EVERY,
        "keep_checkpoints": 100,
        "validate_every": 20,
    }
    return changed(
        {
            "visual_tokenizer": {"max_steps": 60, "checkpoint_every": 10},
            "tokenization": {"clips_per_shard": 1},
            "stages": dict.fromkeys(("image_pretrain", "video_pretrain", "async_finetune"), stage),
            "evaluation": {"sampling": {"num_inference_steps": 20, "num_prompts": 2}},
            "release": {"model_name": model_name},
        }
    )


class Chain(NamedTuple):
    """Runs of one configuration in one place."""

    services: Running
    source: Path
    data: Path
    model_name: str
    launcher: str

    def start(self, log: Path) -> "subprocess.Popen[bytes]":
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, SCRIPT, *run_arguments(self.source, overrides(self.model_name))],
                env={
                    **self.services.environment,
                    "URSA_DATA_URI": str(self.data),
                    "URSA_LAUNCHER": self.launcher,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self, log: Path) -> str:
        """Run to the end and return what was written."""
        assert self.start(log).wait(RUN_LIMIT_S) == 0, log.read_text()
        return log.read_text()

    def found(self, pattern: str) -> list[Path]:
        if pattern.startswith("../../"):
            return list(self.services.folder.glob(pattern.removeprefix("../../")))
        return list(self.data.glob(pattern))

    def flow_processes(self) -> list[psutil.Process]:
        """Return the processes that run flows for these services."""
        mark = str(self.services.folder)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_flow = process.cmdline()[-2:] == ["-m", "prefect.engine"]
                if is_flow and process.environ().get("URSA_SERVICES") == mark:
                    found.append(process)
        return found


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {limit_s:.0f} s"
        time.sleep(0.005)


def kill_in(chain: Chain, moment: Moment, log: Path) -> str:
    """Run until the moment, kill the flow process, and return what the command has said."""
    before = set(chain.found(moment.begun))
    command = chain.start(log)
    wait_until(lambda: bool(chain.flow_processes()), 90, "flow process")
    (process,) = chain.flow_processes()

    def begun() -> bool:
        assert command.poll() is None, log.read_text()
        return bool(set(chain.found(moment.begun)) - before)

    wait_until(begun, RUN_LIMIT_S, moment.begun)
    time.sleep(moment.wait_s)
    process.send_signal(signal.SIGSTOP)
    in_the_middle = not chain.found(moment.ended)
    process.kill()
    assert in_the_middle, f"{moment.step} had ended before the kill"
    assert command.wait(200) == 1, log.read_text()
    return log.read_text()


def references(value: Any, root: str) -> Iterator[Path]:
    """Yield the files and folders below a root that a record names."""
    if isinstance(value, str) and value.startswith(root):
        yield Path(value)
    children = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for child in children:
            yield from references(child, root)


def finished_work(chain: Chain) -> dict[Path, tuple[int, int, str]]:
    """Return inode, time and hash of all files that a committed record stands for."""
    patterns = ("clips/units/*/*.json", "tokens/units/*.json", "*/**/manifest.json")
    records = {path for pattern in patterns for path in chain.data.glob(pattern)}
    files = set(records)
    for record in records:
        for path in references(json.loads(record.read_text()), f"{chain.data}/"):
            files |= set(path.rglob("*")) if path.is_dir() else {path}
    return {
        path: (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
        if path.is_file()
    }


def checkpoints(chain: Chain) -> dict[str, list[int]]:
    """Return the steps of all checkpoints ever committed, by stage."""
    return {
        folder.name: sorted(
            int(marker.parent.name[5:13]) for marker in folder.glob("*/*/COMMITTED.json")
        )
        for folder in (chain.data / "checkpoints").glob("*")
    }


def sample_ids(chain: Chain) -> dict[str, list[str]]:
    """Return the sample ids of the committed token data sets."""
    (manifest,) = chain.data.glob("tokens/*/manifest.json")
    record = json.loads(manifest.read_text())["record"]
    return {
        name: sorted(
            str(value)
            for shard in record[name]["shards"]
            for value in pyarrow.parquet.read_table(shard["uri"])["sample_id"].to_pylist()
        )
        for name in ("image_train", "image_validation", "video_train", "video_validation")
    }


def curves(chain: Chain, output: str) -> dict[str, list[tuple[int, float]]]:
    """Return step and loss of each stage as the tracking server holds them."""
    flow_run = chain.services.flow_run(output)
    found = mlflow_runs(chain.services, f"tags.`prefect.flow_run_id` = '{flow_run['id']}'")
    parent = next(item for item in found if tags(item)["ursa.stage"] == "run")["info"]["run_id"]
    found = mlflow_runs(chain.services, f"tags.`mlflow.parentRunId` = '{parent}'")
    names = Counter(tags(item)["ursa.stage"] for item in found)
    assert names == Counter(["data", *STAGES, "evaluate"]), "one run a step"
    assert {item["info"]["status"] for item in found} == {"FINISHED"}
    return {
        stage: [
            (int(point.get("step", 0)), float(point["value"]))
            for item in found
            if tags(item)["ursa.stage"] == stage
            for point in metric_history(chain.services, item["info"]["run_id"], "train/loss")
        ]
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in VIDEOS:
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, folder)
    return folder


@pytest.fixture(scope="module")
def clean(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Chain, dict[str, list[tuple[int, float]]]]:
    """A run that nobody has disturbed, and its curves."""
    services = running_services.start()
    chain = Chain(services, source, services.folder / "clean" / "data", "kills-clean", "local")
    output = chain.finish(tmp_path_factory.mktemp("clean") / "log.txt")
    return chain, curves(chain, output)


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_killed_in_every_step(
    clean: tuple[Chain, dict[str, list[tuple[int, float]]]],
    source: Path,
    tmp_path: Path,
    launcher: str,
) -> None:
    undisturbed, expected = clean
    services = undisturbed.services
    name = f"kills-{launcher}"
    chain = Chain(services, source, services.folder / name / "data", name, launcher)
    finished: dict[Path, tuple[int, int, str]] = {}
    for moment in MOMENTS:
        if launcher == "ray" and moment.step not in ON_RAY:
            continue
        output = kill_in(chain, moment, tmp_path / f"{moment.step}.txt")
        assert "FAILED: " in output
        assert "Traceback" not in output
        assert not versions(services, name)
        now = finished_work(chain)
        assert {path: now.get(path) for path in finished} == finished, moment.step
        assert len(now) > len(finished) or moment.step not in ("ingestion", "tokenization")
        finished = now
    output = chain.finish(tmp_path / "last.txt")
    assert f"registered {name} version 1" in services.flow_run(output)["state"]["message"]

    now = finished_work(chain)
    assert {path: now.get(path) for path in finished} == finished
    # every checkpoint was written once: training went on from the newest one
    steps = list(range(EVERY, MAX_STEPS + 1, EVERY))
    assert checkpoints(chain) == {
        "image_pretrain": steps,
        "video_pretrain": steps,
        "async_finetune": steps,
    }
    ids = sample_ids(chain)
    assert all(len(set(values)) == len(values) > 0 for values in ids.values())
    assert ids == sample_ids(undisturbed)
    assert len(versions(services, name)) == 1
    for stage, points in curves(chain, output).items():
        assert [step for step, _ in points] == list(range(1, MAX_STEPS + 1)), stage
        losses = [loss for _, loss in expected[stage]]
        assert [loss for _, loss in points] == pytest.approx(losses, rel=1e-5), stage
    # the last one may still be on its way out
    wait_until(lambda: not chain.flow_processes(), 60, "the end of the flow's processes")

    output = chain.finish(tmp_path / "again.txt")
    assert "nothing changed: version 1 is up to date" in output
    assert finished_work(chain) == now
