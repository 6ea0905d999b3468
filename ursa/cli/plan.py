"""`ursa plan`: what a network costs, before anything is built."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from ursa.cli.data import Changes, Preset, load_preset
from ursa.cli.plan_training import Cluster, plan_training, print_training, training_json
from ursa.errors import ConfigError

if TYPE_CHECKING:
    from ursa.config import RunConfig
    from ursa.model.config import TransformerConfig
    from ursa.model.size import Plan, Qwen3Size


class _Planned(NamedTuple):
    """A network and the sizes that it is used at where the command names none."""

    name: str
    config: "TransformerConfig"
    num_frames: int = 49
    height: int = 320
    width: int = 512
    prompt_length: int = 320
    steps: int | None = None
    guidance: float = 7.0
    guidance_trunc: float = 0.9
    shift: float = 1.0
    temporal_stride: int = 4
    spatial_stride: int = 8


_DEFAULTS = {
    "num_frames": "num_frames",
    "height": "height",
    "width": "width",
    "prompt_length": "max_prompt_length",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_trunc": "guidance_trunc",
    "shift": "flow_shift",
}
"""Where generation_config.json keeps what a command leaves out."""


def plan(
    *,
    model: Path | None = None,
    size: Literal["0.6b", "1.7b", "4b"] | None = None,
    preset: Preset | None = None,
    changes: Changes = (),
    stage: Literal["image_pretrain", "video_pretrain", "async_finetune"] | None = None,
    workers: int = 1,
    gpu: Literal["h200", "h100", "a100-80", "a100-40", "l40s", "rtx4090", "cpu"] | None = None,
    memory: float | None = None,
    flops: float | None = None,
    utilisation: float | None = None,
    strategy: Literal["replicated", "fsdp"] = "replicated",
    activation_checkpointing: Literal["none", "mlp", "attention", "layer"] = "none",
    data: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    prompt_length: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    temporal_stride: int | None = None,
    spatial_stride: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print what a network costs: parameters, tokens, operations, memory. Nothing is built.

    Of a preset also what its training costs, stage by stage; the exit status is 1 if it does not
    fit, and the error says what to change.

    Example: ursa plan --size 1.7b --num-frames 49 --height 320 --width 512

    Example: ursa plan --preset small --gpu cpu --data .ursa/data

    Example: ursa plan --preset small --set model.num_layers=28 --workers 8 --gpu h100

    Args:
        model: A model directory, or its transformer/; the sizes are those that it was trained on.
        size: A network of the paper, from the Qwen3 of that size; 1.7b if nothing is named.
        preset: The network of a preset at the preset's sizes, and the training of it.
        changes: Overrides of the preset, such as model.num_layers=8; may be given again.
        stage: Plan this stage alone.
        workers: Workers that share a batch.
        gpu: What a worker runs on: its memory, and its published rate times --utilisation. cpu is
            this machine: its memory, and a rate that is measured, which takes seconds.
        memory: GB of a worker.
        flops: Peak of a worker in float32, operations a second, such as 1e13.
        utilisation: Share of the peak that is reached; 0.4, which is a guess.
        strategy: replicated, each worker holds the whole model; fsdp, a part of it.
        activation_checkpointing: What the backward pass computes again: none, mlp, attention (and
            mlp) or layer.
        data: A data root: its selected clips give samples, epochs and bytes of token shards.
        num_frames: 1 + 4k frames; 1 is an image.
        height: Pixels, divisible by 8, 8192 at most.
        width: Pixels, divisible by 8, 8192 at most.
        prompt_length: Text tokens.
        steps: Steps of the sampler; 50, for an image 25.
        guidance: Classifier-free guidance, 1 is off.
        dtype: Of weights and activations at inference.
        temporal_stride: Frames per latent frame of the visual tokenizer; the model's, or 4.
        spatial_stride: Pixels per latent row of the visual tokenizer; the model's, or 8.
        as_json: Print JSON, in single operations and bytes.

    Raises:
        ConfigError: If arguments do not fit together, a model directory is not readable, or
            training or inference does not fit.
    """
    if sum(item is not None for item in (model, size, preset)) > 1:
        raise ConfigError("give one of --model, --size and --preset")
    cluster = Cluster(workers, gpu, memory, flops, utilisation, strategy, activation_checkpointing)
    if preset is None and (
        changes or stage or data or cluster != Cluster(1, None, None, None, None)
    ):
        raise ConfigError(
            "--set, --stage, --workers, --gpu, --memory, --flops, --utilisation, --strategy, "
            "--activation-checkpointing and --data are for training; name a preset with --preset"
        )
    import json

    from ursa.model.size import Clip, latent_shape, num_sequences
    from ursa.model.size import plan as add_up

    for name, value, least in (
        ("--steps", steps, 1),
        ("--prompt-length", prompt_length, 0),
        ("--temporal-stride", temporal_stride, 1),
        ("--spatial-stride", spatial_stride, 1),
        ("--guidance", guidance, 0),
    ):
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    run = None if preset is None else load_preset(preset, changes)
    known = _planned(model, size or "1.7b", preset, run)
    frames = known.num_frames if num_frames is None else num_frames
    with _options_named():
        shape = latent_shape(
            frames,
            known.height if height is None else height,
            known.width if width is None else width,
            temporal_stride=temporal_stride or known.temporal_stride,
            spatial_stride=spatial_stride or known.spatial_stride,
        )
    if steps is None:
        steps = known.steps or (25 if frames == 1 else 50)
    is_guided = (known.guidance if guidance is None else guidance) > 1
    sequences = num_sequences(
        steps, shift=known.shift, guidance_trunc=known.guidance_trunc, is_guided=is_guided
    )
    result = add_up(
        known.config,
        Clip(shape, known.prompt_length if prompt_length is None else prompt_length),
        num_sequences=sequences,
        is_guided=is_guided,
        bytes_per_value=4 if dtype == "float32" else 2,
    )
    training = None if run is None else plan_training(run, stage, cluster, data)
    if as_json:
        values = {"network": known.name, "dtype": dtype} | result.model_dump()
        print(json.dumps(values | (training_json(training) if training else {}), indent=2))
    else:
        _print_plan(result, known, dtype, steps)
        if training is not None:
            print_training(training)
    problems = [*_too_large(result), *(training.problems if training is not None else ())]
    if problems:
        raise ConfigError("; ".join(problems))


def _too_large(plan: "Plan") -> Iterator[str]:
    """Say that no GPU holds the inference; where memory is named too, as nothing else asks."""
    from ursa.training.plan import GPUS

    largest = max(GPUS.values(), key=lambda gpu: gpu.memory_bytes or 0)
    there = largest.memory_bytes or 0
    if plan.inference_bytes > there:
        needed = short(plan.inference_bytes, "B")
        yield (
            f"inference needs {needed} at once, and {largest.name}, the largest GPU that is known "
            f"here, has {short(there, 'B')}; ask for fewer or smaller frames"
        )


@contextmanager
def _options_named() -> Iterator[None]:
    """Let an error that names a size of the library name the option that sets it."""
    import re

    try:
        yield
    except ConfigError as error:
        text = re.sub(r"^(num_frames|height|width)\b", lambda found: f"--{found[0]}", str(error))
        raise ConfigError(text.replace("--num_frames", "--num-frames", 1)) from error


def _planned(
    model: Path | None, size: "Qwen3Size", preset: str | None, run: "RunConfig | None"
) -> _Planned:
    """Return the network to plan for."""
    from ursa.model.config import read_transformer_config
    from ursa.model.size import qwen3_config
    from ursa.training.plan import run_network

    if model is not None:
        inner = model / "transformer"
        config = read_transformer_config(inner if inner.is_dir() else model)
        defaults = _json_of(model / "generation_config.json")  # a published directory has none
        named = {
            ours: defaults[name]
            for ours, name in _DEFAULTS.items()
            if defaults.get(name) is not None
        }
        planned = _Planned(str(model), config)
        scheduler = _json_of(model / "scheduler" / "scheduler_config.json")
        if scheduler.get("shift") is not None:
            planned = planned._replace(shift=scheduler["shift"])
        if (strides := strides_of(model)) is not None:
            planned = planned._replace(temporal_stride=strides[0], spatial_stride=strides[1])
        return planned._replace(**named)
    if preset is None or run is None:
        return _Planned(size, qwen3_config(size))
    sampling = run.evaluation.sampling
    return _Planned(
        name=preset,
        config=run_network(run),
        num_frames=run.tokenization.num_frames,
        height=run.tokenization.height_px,
        width=run.tokenization.width_px,
        prompt_length=run.text_tokenizer.max_prompt_length,
        steps=sampling.num_inference_steps,
        guidance=sampling.guidance_scale,
        guidance_trunc=sampling.guidance_trunc,
        shift=sampling.timestep_shift,
    )


def strides_of(model: Path) -> tuple[int, int] | None:
    """Return the strides of a model directory.

    Args:
        model: The directory.

    Returns:
        Frames per latent frame and pixels per latent row; None if there is no visual tokenizer.

    Raises:
        ConfigError: If its configuration is no JSON object.
    """
    visual = _json_of(model / "vae" / "config.json")
    if not visual:
        return None
    if visual.get("_class_name") == "AutoencoderVQ":  # frame by frame
        return 1, 2 ** (len(visual["block_out_channels"]) - 1)
    return visual.get("temporal_stride", 4), visual.get("spatial_stride", 8)


def _json_of(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if there is none."""
    import json

    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} must hold a JSON object: {error}") from error


def _print_plan(plan: "Plan", known: _Planned, dtype: str, steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    frames, rows, columns = plan.latent_shape
    table = Table("", known.name, "")
    for row in (
        ("parameters", f"{plan.num_parameters:,}", short(plan.num_parameters, "")),
        (
            "tokens",
            f"{plan.num_tokens:,}",
            f"{plan.num_visual_tokens:,} visual ({frames} x {rows} x {columns}) + prompt + BOV",
        ),
        ("one forward", short(plan.forward_flops, "FLOP"), "one sequence"),
        (
            "sampling",
            short(plan.sampling_flops, "FLOP"),
            f"{steps} steps, {plan.num_sequences} sequences through the network",
        ),
        ("weights", short(plan.weight_bytes, "B"), dtype),
        ("activations", short(plan.activation_bytes, "B"), f"{dtype}, inside a layer, at most"),
        ("logits", short(plan.logits_bytes, "B"), "float32, of the tokens that are drawn at once"),
        ("inference", short(plan.inference_bytes, "B"), "sum of the three"),
        (
            "tokens x codes",
            short(plan.code_tensor_bytes, "B"),
            f"one float32 tensor {plan.num_visual_tokens:,} x {known.config.lm_head_size:,}",
        ),
        (
            "training state",
            short(plan.training_state_bytes, "B"),
            "float32 weights, gradients, AdamW, average; no activations",
        ),
    ):
        table.add_row(*row)
    Console(width=110).print(table)


def short(count: int, unit: str) -> str:
    """Return a number with a decimal prefix: 1.98 G, 8.52 GB, 34.40 PFLOP.

    Args:
        count: The number.
        unit: What is counted.
    """
    power = min(6, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.2f} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}{unit}"
