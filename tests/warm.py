"""Training stages in real processes that die or go wrong at a chosen moment.

`Warm` starts this file as a process that has imported everything and forks a process a rank for
every case, so that a case costs a fraction of a second. What goes wrong is put into the forked
process alone: a signal, numbers that are not finite, a disk that is slow or full.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ursa.artifacts import CheckpointRef, StageRequest
from ursa.training.execution import Execution, Strategy

ROOT = Path(__file__).parents[1]
LIMIT_S = 60.0

Fault = dict[str, Any]
"""`rank` (0), `kind`, and what that needs; see `_install`."""


@dataclass(frozen=True)
class Outcome:
    """How the processes of a case have ended.

    Attributes:
        exits: Exit status of each rank, minus the signal if one killed it.
        hung: Whether one had to be killed after the limit.
        seconds: From the fork to the end of the last.
        output: What they have written to stderr.
        signal_s: Seconds from the SIGTERM that a fault sent to the end; None without one.
    """

    exits: list[int]
    hung: bool
    seconds: float
    output: str
    signal_s: float | None


class Warm:
    """The client of the process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        request: StageRequest,
        log: Path,
        *faults: Fault,
        ranks: int = 1,
        threads: int = 1,
        strategy: Strategy = "replicated",
        limit_s: float = LIMIT_S,
    ) -> Outcome:
        """Train a stage; steps that were done are added to `log`."""
        case = {
            "request": request.model_dump_json(),
            "log": str(log),
            "faults": faults,
            "ranks": ranks,
            "threads": threads,
            "strategy": strategy,
            "limit_s": limit_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@contextlib.contextmanager
def warm_process() -> Iterator[Warm]:
    process = Warm()
    try:
        yield process
    finally:
        process.close()


@dataclass(frozen=True)
class Trace:
    """What a stage has left: equal traces are equal to the bit.

    Attributes:
        sha256: Of the file with weights, average and optimizer.
        steps: Loss, as its exact hexadecimal text, and hash of the batches by step.
        checkpoint: The committed result.
    """

    sha256: str
    steps: dict[int, tuple[str, str]]
    checkpoint: CheckpointRef

    def losses(self) -> list[float]:
        return [float.fromhex(loss) for loss, _ in self.steps.values()]


def trace(request: StageRequest, log: Path, ranks: int = 1) -> Trace:
    """Read what a finished stage has left; a step that was done twice must have been the same."""
    from ursa.training.checkpoint import load_checkpoint
    from ursa.training.stage import find_stage

    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    batches: dict[int, dict[int, str]] = {}
    losses: dict[int, str] = {}
    for row in rows:
        step = row["step"]
        assert losses.setdefault(step, row["loss"]) == row["loss"], f"step {step} was repeated"
        known = batches.setdefault(step, {}).setdefault(row["rank"], row["batch"])
        assert known == row["batch"], f"step {step} was repeated with other data"
    checkpoint = find_stage(request)
    assert checkpoint is not None
    steps = {
        step: (losses[step], " ".join(batches[step][rank] for rank in range(ranks)))
        for step in sorted(losses)
    }
    return Trace(load_checkpoint(checkpoint.uri)[0].state_sha256, steps, checkpoint)


def _serve() -> None:
    # what a stage imports late is imported once here
    import pyarrow.dataset  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import torch.distributed  # noqa: F401

    import ursa.training.stage  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="ursa-warm-") as folder:
            sys.stdout.write(json.dumps(_fork(case, Path(folder))) + "\n")
            sys.stdout.flush()


def _fork(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    waiting: dict[int, int] = {}
    for rank in range(case["ranks"]):
        child = os.fork()
        if child == 0:
            _become(case, rank, folder)
        waiting[child] = rank
    exits, hung = {}, False
    while waiting:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            exits[waiting.pop(child)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - began > case["limit_s"]:
            hung = True
            for one in waiting:
                os.kill(one, signal.SIGKILL)
            began = time.monotonic()
        else:
            time.sleep(0.002)
    sent = [float(path.read_text()) for path in folder.glob("signal-*")]
    return {
        "exits": [exits[rank] for rank in range(case["ranks"])],
        "hung": hung,
        "seconds": time.monotonic() - began,
        "output": "".join(path.read_text() for path in sorted(folder.glob("output-*"))),
        "signal_s": time.monotonic() - sent[0] if sent else None,
    }


def _become(case: dict[str, Any], rank: int, folder: Path) -> None:
    """Be one rank of a case; does not return."""
    status = 1
    try:
        with (folder / f"output-{rank}").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        status = _train(case, rank, folder)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001  (a forked process must not return)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _train(case: dict[str, Any], rank: int, folder: Path) -> int:
    import torch
    import torch.distributed as dist

    from ursa.training.stage import train_stage

    torch.set_num_threads(case["threads"])
    if case["ranks"] > 1:
        # the group is made in the child: its threads would not survive the fork
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'group'}",
            rank=rank,
            world_size=case["ranks"],
        )
    note_steps(Path(case["log"]), rank)
    for fault in case["faults"]:
        if fault.get("rank", 0) == rank:
            _install(fault, folder / f"signal-{rank}")
    request = StageRequest.model_validate_json(case["request"])
    train_stage(request, execution=Execution(strategy=case["strategy"]))
    return 0


def note_steps(log: Path, rank: int) -> None:
    """Add a line to the log for every step that was done."""
    from ursa.training.trainer import Trainer

    do_step, add = Trainer.step, Trainer._add_gradients
    digests: list[str] = []

    def add_gradients(self, batch):
        parts = [each.numpy().tobytes() for each in (batch.text_ids, batch.x_1, batch.x_t)]
        digests.append(hashlib.sha256(b"".join(parts)).hexdigest()[:16])
        return add(self, batch)

    def noted(self, step):
        metrics = do_step(self, step)
        row = {
            "step": step,
            "rank": rank,
            "loss": metrics["train/loss"].hex(),
            "batch": digests[-1],
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return metrics

    Trainer._add_gradients, Trainer.step = add_gradients, noted


def _install(fault: Fault, note: Path) -> None:
    """Put what goes wrong into this process."""
    kind = fault["kind"]
    if kind in {"kill_forward", "term_forward"}:
        _signal_at_forward(fault["number"], kind == "kill_forward", note)
    elif kind == "kill_save":
        _kill_at_save(fault["number"], fault["point"])
    elif kind in {"slow_save", "fail_save"}:
        _hinder_save(fault)
    else:
        _spoil(kind, fault["steps"])


def _signal_at_forward(number: int, kill: bool, note: Path) -> None:
    """Send a signal in the middle of a step: there is one forward a part of the batch."""
    from ursa.model.transformer import UrsaTransformer

    forward, count = UrsaTransformer.hidden_states, 0

    def hidden_states(self, *arguments):
        nonlocal count
        count += self.training
        if self.training and count == number:
            note.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL if kill else signal.SIGTERM)
        return forward(self, *arguments)

    UrsaTransformer.hidden_states = hidden_states


def _kill_at_save(number: int, point: str) -> None:
    """Die in the background thread that writes the checkpoint of that number."""
    from ursa import storage

    upload, commit, remove = storage.upload_file, storage.commit_record, storage.remove_directory
    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def upload_file(path, uri):
        nonlocal count
        count += "/step-" in uri
        if count == number and point == "upload":
            target = storage.local_path(uri)
            target.parent.mkdir(parents=True)
            data = path.read_bytes()
            # as a store without whole writes would leave it
            target.write_bytes(data[: random.Random(uri).randrange(len(data))])
            die()
        upload(path, uri)
        if count == number and point == "uploaded":
            die()

    def commit_record(uri, record):
        result = commit(uri, record)
        if count == number and point == "committed" and "/step-" in uri:
            die()
        return result

    def remove_directory(uri):
        if count == number and point == "removing" and "/step-" in uri:
            die()
        remove(uri)

    storage.upload_file, storage.commit_record = upload_file, commit_record
    storage.remove_directory = remove_directory


def _hinder_save(fault: Fault) -> None:
    """Make the disk slow, or full from a checkpoint on."""
    from ursa import storage
    from ursa.errors import StorageConfigurationError

    upload, count = storage.upload_file, 0

    def upload_file(path, uri):
        nonlocal count
        if "/step-" in uri:
            count += 1
            time.sleep(fault.get("seconds", 0.0))
            if count == fault.get("number"):
                raise StorageConfigurationError(f"disk full at {uri}")
        upload(path, uri)

    storage.upload_file = upload_file


def _spoil(kind: str, steps: Sequence[int]) -> None:
    """Put NaN into the loss, a gradient or the weights of this rank, at some steps."""
    import torch

    from ursa.training.distributed import local_part
    from ursa.training.trainer import Trainer

    do_step, add = Trainer.step, Trainer._add_gradients
    current = 0

    def step(self, number):
        nonlocal current
        current = number
        if kind == "nan_weight" and number in steps:
            with torch.no_grad():
                local_part(self.model.lm_head.weight)[0, 0] = torch.nan
        metrics = do_step(self, number)
        if kind in {"nan_average", "nan_moment"} and number in steps:
            parameter = self.model.lm_head.weight
            with torch.no_grad():
                if kind == "nan_average":
                    local_part(self.average.module.lm_head.weight)[0, 0] = torch.nan
                else:
                    local_part(self.optimizer.state[parameter]["exp_avg_sq"])[0, 0] = torch.inf
        return metrics

    def add_gradients(self, batch):
        sums = add(self, batch)
        if current in steps and kind == "nan_loss":
            sums = sums * torch.nan
        if current in steps and kind == "nan_grad":
            local_part(self.model.lm_head.weight.grad)[0, 0] = torch.nan
        return sums

    Trainer.step, Trainer._add_gradients = step, add_gradients


if __name__ == "__main__":
    _serve()
