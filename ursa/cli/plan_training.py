"""The stages of a run in `ursa plan --preset`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ursa.errors import ConfigError

if TYPE_CHECKING:
    from ursa.config import RunConfig, StageName
    from ursa.model.size import Clip, Recomputed
    from ursa.training.execution import Strategy
    from ursa.training.plan import DataSize, Machine, Speed, StagePlan

_PROCESS_BYTES = 480_000_000
"""Python with torch, transformers and pyarrow on a CPU, before there is a model."""
_LOCAL_BYTES_PER_S = 1e9
"""Between processes of one machine."""
_PARTS = {
    "weight": "weights",
    "gradient": "gradients",
    "optimizer": "optimizer",
    "average": "average (EMA)",
    "activation": "activations",
    "loss": "loss",
    "loader": "loader",
    "checkpoint": "checkpoint",
    "allocator": "allocator",
}


class Cluster(NamedTuple):
    """What the options say about the machines."""

    num_workers: int
    gpu: str | None
    memory_gb: float | None
    flops: float | None
    utilisation: float | None
    strategy: "Strategy" = "replicated"
    activation_checkpointing: "Recomputed" = "none"


class TrainingPlan(NamedTuple):
    """Stages, and what they were planned for."""

    config: "RunConfig"
    machine: "Machine"
    cluster: Cluster
    stages: "list[StagePlan]"
    speeds: "dict[StageName, Speed]"
    data: "DataSize | None"

    @property
    def problems(self) -> list[str]:
        """What does not fit, over all stages."""
        return [problem for stage in self.stages for problem in stage.problems]


def plan_training(
    config: "RunConfig", stage: "StageName | None", cluster: Cluster, data_uri: str | None
) -> TrainingPlan:
    """Plan the stages of a run on the machines that the options describe.

    Args:
        config: The run.
        stage: The only one; None plans all.
        cluster: The machines.
        data_uri: A data root whose selected clips are counted; None counts none.

    Raises:
        ConfigError: If an option is out of its range.
        DataError: If the data root has no selection.
    """
    from ursa.config import STAGES
    from ursa.training.execution import Execution
    from ursa.training.plan import Speed, plan_run, published_speed

    _check(cluster)
    machine, wanted = _machine(cluster), (stage,) if stage else STAGES
    speeds: dict[StageName, Speed] = {}
    if cluster.flops is not None:
        changes = {"peak_flops": cluster.flops, "peak_half_flops": None}
        machine = machine.model_copy(update=changes)
    if cluster.gpu == "cpu" and cluster.flops is None:
        speeds = _measured(config, wanted, cluster.num_workers)
    elif machine.peak_flops is not None:
        share = {} if cluster.utilisation is None else {"utilisation": cluster.utilisation}
        for name in wanted:
            precision = getattr(config.stages, name).precision
            speed = published_speed(machine, precision=precision, **share)
            if speed is not None:
                speeds[name] = speed
    data = None
    if data_uri is not None:
        from ursa.cli.data import root_uri
        from ursa.inspection.samples import count_samples

        data = count_samples(root_uri(data_uri), config)
    stages = plan_run(
        config,
        machine,
        num_workers=cluster.num_workers,
        execution=Execution(
            strategy=cluster.strategy, activation_checkpointing=cluster.activation_checkpointing
        ),
        speeds=speeds,
        data=data,
        stages=wanted,
    )
    return TrainingPlan(config, machine, cluster, stages, speeds, data)


def training_json(plan: TrainingPlan) -> dict[str, Any]:
    """Return a plan as JSON values, in bytes, operations and seconds.

    Args:
        plan: The plan.
    """
    from ursa.training.plan import token_bytes

    return {
        "machine": plan.machine.model_dump()
        | {
            "num_workers": plan.cluster.num_workers,
            "strategy": plan.cluster.strategy,
            "activation_checkpointing": plan.cluster.activation_checkpointing,
        },
        "stages": [
            stage.model_dump()
            | {"rate": plan.speeds[stage.stage].source if stage.stage in plan.speeds else None}
            for stage in plan.stages
        ],
        "data": plan.data.model_dump() if plan.data else None,
        "token_bytes": token_bytes(plan.config, plan.data) if plan.data else None,
        "problems": plan.problems,
    }


def print_training(plan: TrainingPlan) -> None:
    """Print a plan, a column a stage.

    Args:
        plan: The plan.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ursa.cli.plan import short
    from ursa.training.plan import token_bytes

    console, table = Console(width=110), Table("training", *(stage.stage for stage in plan.stages))
    for name, cells in _rows(plan.stages):
        table.add_row(name, *cells)
    console.print(table)
    notes = [f"{plan.cluster.num_workers} x {plan.machine.name}"]
    if plan.machine.memory_bytes is not None:
        notes[0] += (
            f", {short(plan.machine.memory_bytes, 'B')} each, of which "
            f"{short(plan.machine.process_bytes, 'B')} before there is a model"
        )
    sources = sorted({speed.source for speed in plan.speeds.values()})
    notes += [f"step time: {source}" for source in sources] or [
        "step time: not known; --gpu cpu measures this machine, --gpu h100 or --flops names another"
    ]
    if plan.cluster.gpu not in {None, "cpu"}:
        notes.append("what a GPU takes was compared with an H100 alone (docs/plan.md)")
    notes.append("hours leave out validation, checkpoints and the steps before training")
    if plan.data is not None:
        notes.append(
            f"data: {plan.data.num_clips:,} selected clips, token shards "
            f"{short(token_bytes(plan.config, plan.data), 'B')} at most"
        )
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _rows(stages: "Sequence[StagePlan]") -> list[tuple[str, list[str]]]:
    from ursa.cli.plan import short

    def cells(name: str, unit: str = "") -> list[str]:
        return [short(getattr(stage, name), unit) for stage in stages]

    has_adapters = any(stage.num_trained < stage.num_parameters for stage in stages)
    rows = [
        ("parameters", cells("num_parameters")),
        *([("trained", cells("num_trained"))] if has_adapters else []),
        ("tokens a sample", [f"{stage.tokens_per_sample:,}" for stage in stages]),
        (
            "samples a step",
            [f"{stage.samples_per_step:,}, {stage.micro_batch:,} at once" for stage in stages],
        ),
        ("tokens a step", cells("tokens_per_step")),
        ("steps", [f"{stage.max_steps:,}" for stage in stages]),
        ("samples seen", [_samples(stage) for stage in stages]),
        ("tokens seen", cells("num_tokens")),
        ("operations", cells("flops", "FLOP")),
    ]
    for part, label in _PARTS.items():
        values = [getattr(stage.memory, f"{part}_bytes") for stage in stages]
        if any(values):
            rows.append((label, [short(value, "B") for value in values]))
    rows += [
        ("peak of a worker", [_peak(stage) for stage in stages]),
        ("checkpoints", cells("checkpoint_bytes", "B")),
    ]
    if any(stage.step_s is not None for stage in stages):
        rows += [
            ("step", [_seconds(stage.step_s) for stage in stages]),
            ("worker hours", [f"{stage.worker_hours or 0:.3g}" for stage in stages]),
        ]
    return rows


def _samples(stage: "StagePlan") -> str:
    epochs = "" if stage.num_epochs is None else f" ({stage.num_epochs:.3g} epochs)"
    return f"{stage.num_samples:,}{epochs}"


def _peak(stage: "StagePlan") -> str:
    from ursa.cli.plan import short

    return f"{short(stage.memory.total_bytes, 'B')} ({stage.memory.moment})"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def _check(cluster: Cluster) -> None:
    """Check the numbers of the options."""
    for name, value in (("--memory", cluster.memory_gb), ("--flops", cluster.flops)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be positive and finite, got {value:g}")
    if cluster.num_workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {cluster.num_workers}")
    share = cluster.utilisation
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--utilisation must be above 0 and at most 1, got {share:g}")


def _machine(cluster: Cluster) -> "Machine":
    """Return what each worker has; processes of this machine share its memory."""
    from ursa.model.size import machine_bytes
    from ursa.training.plan import GPUS, Machine

    if cluster.gpu is not None and cluster.gpu in GPUS:
        machine = GPUS[cluster.gpu]
    elif cluster.gpu == "cpu":
        machine = Machine(
            name="cpu of this machine",
            memory_bytes=machine_bytes() // cluster.num_workers,
            process_bytes=_PROCESS_BYTES,
            memory_bytes_per_s=1e10,
            link_bytes_per_s=_LOCAL_BYTES_PER_S,
        )
    else:
        machine = Machine(name="worker", process_bytes=_PROCESS_BYTES)
    if cluster.memory_gb is not None:
        machine = machine.model_copy(update={"memory_bytes": int(cluster.memory_gb * 1e9)})
    return machine


def _measured(
    config: "RunConfig", stages: "Sequence[StageName]", num_workers: int
) -> "dict[StageName, Speed]":
    """Probe this machine with the threads that each of its workers would have."""
    # as in training; beside other processes threads that spin cost a factor of nine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from ursa.training.plan import micro_batch, run_network, stage_clip
    from ursa.training.probe import measure_speed

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    network = run_network(config)
    found: dict[tuple[Clip, int], Speed] = {}
    speeds: dict[StageName, Speed] = {}
    for stage in stages:
        clip, batch = stage_clip(config, stage), micro_batch(config, stage, num_workers)
        if (clip, batch) not in found:  # stages on videos mostly have the same shapes
            settings = getattr(config.stages, stage)
            found[clip, batch] = measure_speed(network, clip, batch, settings)
        speeds[stage] = found[clip, batch]
    return speeds
