"""Adapters against training all weights: held-out loss, trained parameters, memory, time.

    PYTHONPATH=. python tests/bench/lora.py .ursa/data   # after `make run`, some minutes
    PYTHONPATH=. python tests/bench/lora.py .ursa/data --cases all "rank 16" --threads 1

The last stage of the newest run is done again from its own start, in a fresh process for each case:
all weights as the preset says, then adapters of several ranks, on the same samples and noise.
Memory is the peak of resident memory over what the process takes just before the model is built;
the plan beside it is that of `ursa plan`.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (what it takes is no part of a case)
import torch

from tasks.context import TrainedModel
from tests.bench.plan import _resident_bytes
from tests.bench.steps import newest
from ursa.artifacts import StageRequest
from ursa.training import stage as stage_module
from ursa.training.plan import Machine, plan_run
from ursa.training.trainer import Trainer

RATE = 4e-3
"""Ten times that of the preset; adapters are known to want more than all weights do."""
FULL: dict[str, Any] = {"lora": None}
CASES: dict[str, dict[str, Any]] = {
    "all": FULL,
    "all, rate x 10": FULL | {"learning_rate": RATE},
    "rank 16": {"lora": {}, "learning_rate": RATE},
    "rank 4": {"lora": {"rank": 4, "alpha": 8}, "learning_rate": RATE},
    "rank 16, rate x 1": {"lora": {}},
    "rank 16, attention": {
        "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "learning_rate": RATE,
    },
    "rank 16 and head": {"lora": {"whole_modules": ["lm_head"]}, "learning_rate": RATE},
    "rank 16, dropout": {"lora": {"dropout": 0.1}, "learning_rate": RATE},
}


def case_request(root: Path, name: str, output_uri: str) -> StageRequest:
    """Return the last stage of the newest run with the changes of a case."""
    request = newest(root, "trained/*/manifest.json", TrainedModel).request
    values = request.model_dump(mode="json")
    values["config"]["stages"][request.stage] |= CASES[name]
    return StageRequest.model_validate(values | {"output_uri": output_uri})


def train(root: Path, name: str) -> dict[str, float]:
    """Do a case in this process and watch it."""
    seconds: list[float] = []
    do_step = Trainer.step

    @functools.wraps(do_step)
    def timed(self: Trainer, step: int) -> dict[str, float]:
        began = time.process_time()
        metrics = do_step(self, step)
        seconds.append(time.process_time() - began)
        return metrics

    Trainer.step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        request = case_request(root, name, folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_bytes("VmRSS")
        metrics = stage_module.train_stage(request).metrics
        peak = _resident_bytes("VmHWM") - before
        sizes = [path.stat().st_size for path in Path(folder).rglob("checkpoints/**/*.safetensors")]
    found = {key: metrics[f"val/{key}"] for key in ("loss", "async_loss", "i2v_loss")}
    begun = {key: metrics[f"val/before_{key}"] for key in ("loss", "async_loss", "i2v_loss")}
    return (
        found
        | {f"before_{key}": value for key, value in begun.items()}
        | {
            "peak_bytes": peak,
            "checkpoint_bytes": max(sizes),
            "step_s": statistics.median(seconds[2:]),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a row a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=list(CASES))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.child:
        print(json.dumps(train(given.root, given.child)))
        return
    print(
        f"{'case':20}    trained  checkpoint MB  peak MB  planned  s a step"
        "      loss  per frame   given frame"
    )
    for name in given.cases:
        command = [sys.executable, __file__, str(given.root), "--child", name]
        command += ["--threads", str(given.threads)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        request = case_request(given.root, name, "")
        (plan,) = plan_run(request.config, Machine(name="cpu"), stages=(request.stage,))
        if name == given.cases[0]:
            before = [found[f"before_{key}"] for key in ("loss", "async_loss", "i2v_loss")]
            print(f"{'before':70}" + "".join(f"{value:11.4f}" for value in before), flush=True)
        print(
            f"{name:20} {plan.num_trained:10,} {found['checkpoint_bytes'] / 1e6:14.1f}"
            f" {found['peak_bytes'] / 1e6:8.0f} {plan.memory.total_bytes / 1e6:8.0f}"
            f" {found['step_s']:9.3f}"
            f"{found['loss']:11.4f}{found['async_loss']:11.4f}{found['i2v_loss']:11.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
