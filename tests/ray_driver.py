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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tasks import cluster
from tasks.settings import RuntimeSettings
from tests.warm import note_steps
from ursa.artifacts import StageRequest
from ursa.training import stage

NUM_WORKERS = 2
DRAIN, DRAIN_S = "drain", 30
"""File that a test writes, and how long the node then stays."""


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


def drain(nodes: Cluster, node: Any, wanted: Path) -> None:
    """Add a node and drain another when a file is there, as `ray start --block` does on SIGTERM."""
    while not wanted.exists():
        time.sleep(0.1)
    nodes.add_node(num_cpus=NUM_WORKERS)
    deadline_ms = int((time.time() + DRAIN_S) * 1000)
    accepted, reason = nodes.head_node.get_gcs_client().drain_node(
        node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "test", deadline_ms
    )
    assert accepted, reason


def main(path: str) -> None:
    """Train, and leave no process of Ray."""
    case = json.loads(Path(path).read_text("utf-8"))
    request = StageRequest.model_validate_json(case["request"])
    settings = RuntimeSettings(num_train_workers=NUM_WORKERS, cpus_per_train_worker=1)
    find = functools.partial(stage.find_stage, request)
    with contextlib.ExitStack() as stack:
        if case["is_cluster"]:
            with cluster._keep_signal_handlers():
                nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
                node = nodes.add_node(num_cpus=NUM_WORKERS)
            stack.callback(nodes.shutdown)
            settings = settings.model_copy(update={"ray_address": nodes.address})
            wanted = Path(case["folder"]) / DRAIN
            threading.Thread(target=drain, args=(nodes, node, wanted), daemon=True).start()
        stack.callback(cluster.shutdown)
        cluster.run_distributed(train, case, find, settings)


if __name__ == "__main__":
    main(sys.argv[1])
