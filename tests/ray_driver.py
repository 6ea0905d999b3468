"""A process that trains a stage on Ray Train with two workers; tests send signals to all three.

    python -m tests.ray_driver case.json

The case has a `request`, the `log` of steps, a `folder` for the ids of the workers, seconds to wait
after a step, so that a signal falls between the first and the last, and whether to join a cluster.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

from tasks import cluster
from tasks.settings import RuntimeSettings
from tests.warm import note_steps
from ursa.artifacts import StageRequest
from ursa.training import stage

NUM_WORKERS = 2


def train(arguments: dict[str, Any], is_told_to_end: Callable[[], bool]) -> None:
    """Be one worker."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    note_steps(Path(arguments["log"]), rank)
    (Path(arguments["folder"]) / f"{rank}-{os.getpid()}").touch()
    stage.train_stage(
        StageRequest.model_validate_json(arguments["request"]),
        on_metrics=lambda _step, _metrics: time.sleep(arguments["pause_s"]),
        is_told_to_end=is_told_to_end,
    )


def main(path: str) -> None:
    """Train, and leave no process of Ray."""
    case = json.loads(Path(path).read_text("utf-8"))
    request = StageRequest.model_validate_json(case["request"])
    settings = RuntimeSettings(num_train_workers=NUM_WORKERS, cpus_per_train_worker=1)
    find = functools.partial(stage.find_stage, request)
    with contextlib.ExitStack() as stack:
        if case["is_cluster"]:
            with cluster._keep_signal_handlers():
                nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": NUM_WORKERS + 1})
            stack.callback(nodes.shutdown)
            settings = settings.model_copy(update={"ray_address": nodes.address})
        stack.callback(cluster.shutdown)
        cluster.run_distributed(train, case, find, settings)


if __name__ == "__main__":
    main(sys.argv[1])
