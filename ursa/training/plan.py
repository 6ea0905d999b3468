"""What a training stage costs before it starts: memory of a worker, time, storage. No tensors.

Bytes are counted on what `ursa.training.trainer` holds at the moments that can be the fullest; time
is operations over a rate that is measured (`ursa.training.probe`) or published (`GPUS`). How near
this comes is measured by `make bench-plan`; formulae in docs/plan.md.

Dimensions: P = parameters, T = those that are trained, V = codes, h = hidden size, N = visual
tokens of a sample.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import computed_field

from ursa.config import (
    STAGES,
    FrozenModel,
    LoraConfig,
    RunConfig,
    StageConfig,
    StageName,
    bucket_batch_size,
)
from ursa.errors import ConfigError
from ursa.model.config import TransformerConfig
from ursa.model.size import (
    Clip,
    adapter_parameters,
    forward_flops,
    latent_shape,
    num_parameters,
    num_trained,
    recomputed_bytes,
    recomputed_flops,
    saved_bytes,
)
from ursa.training.execution import DEFAULT_EXECUTION, Execution

FLOAT_BYTES = 4
LOSS_PART_ELEMENTS = 2**24
"""Logits that the loss holds at once, as in `ursa.diffusion.loss`."""
TRAINING_FORWARDS = 3
"""A backward pass costs two forward passes: gradients of states, and of weights."""
UTILISATION = 0.4
"""Share of a published peak that large products, attention and what is between them reach."""
_SMALL_CODEBOOK = 1 << 16
GPU_PART_ELEMENTS = 1 << 25
"""Logits that the loss holds at once on a GPU, as in `ursa.diffusion.loss`: 8 bytes each there."""
Precision = Literal["float32", "bfloat16"]
_HALF_SHARE = 0.75
"""Of activations counted in float32, what is kept with bfloat16 products on a GPU: 0.46 to 0.87 in
five runs (docs/results.md)."""
_UPDATE_BYTES = 64
"""Read and written a parameter by clipping, AdamW and the average."""
_LOADER_BYTES = 64
"""A visual token of the batches in work and ahead: clean, noisy and random numbers, 8 bytes each,
twice, and what the noise is drawn with."""
_ROW_BYTES = 400
"""Names, caption and motion of a sample in memory."""
LOADER_BLOCKS_BYTES = 2 * 2**28
"""Samples that the loader holds at most, as in `ursa.data.order`."""
_SHARD_ROW_BYTES = 120
"""The same in a shard, compressed."""
_LIBRARY_BYTES = 32_000_000
"""Libraries and workspaces that the first step loads."""
_HOLES = 0.2
"""Share of the activations that lies idle between blocks: measured with glibc's allocator, where
it is the same whatever the backward pass computes again."""
_HOLES_OF_ADAPTERS = 0.8
"""The same beside adapters, on a CPU: no gradients and moments of all weights fill them."""
_LARGEST_TENSORS = 4
"""Copies of the largest tensor that starting weights, AdamW and gradients make for a moment."""
_TABLE_BYTES = 3
"""Tables of the path, a code and kind of code: an order in 16 bits, distances, offsets."""


_ROWS = ("embed_tokens", "lm_head")
"""What there is beside the layers and the last norm."""


class Machine(FrozenModel):
    """What one worker has.

    Attributes:
        name: How it is called.
        memory_bytes: Memory for its process; None is not known, and the largest GPU is the limit.
        process_bytes: Of it, what Python, torch and drivers take before there is a model.
        peak_flops: Operations a second at float32, as published; None is not known.
        peak_half_flops: The same of bfloat16 products that are summed in float32; None is that of
            float32.
        memory_bytes_per_s: Speed of its memory, as published.
        link_bytes_per_s: Speed at which workers exchange gradients.
        is_gpu: Whether its memory is not the one that checkpoints are copied to.
    """

    name: str
    memory_bytes: int | None = None
    process_bytes: int = 1_000_000_000
    peak_flops: float | None = None
    peak_half_flops: float | None = None
    memory_bytes_per_s: float = 1e12
    link_bytes_per_s: float = 25e9
    is_gpu: bool = False


GPUS: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        # float32 without tensor cores, bfloat16 with them, dense, and memory speed, of the makers'
        # data sheets
        Machine(
            name="h200",
            is_gpu=True,
            memory_bytes=141_000_000_000,
            peak_flops=67e12,
            peak_half_flops=989e12,
            memory_bytes_per_s=4.8e12,
        ),
        Machine(
            name="h100",
            is_gpu=True,
            memory_bytes=80_000_000_000,
            peak_flops=67e12,
            peak_half_flops=989e12,
            memory_bytes_per_s=3.35e12,
        ),
        Machine(
            name="a100-80",
            is_gpu=True,
            memory_bytes=80_000_000_000,
            peak_flops=19.5e12,
            peak_half_flops=312e12,
            memory_bytes_per_s=2.0e12,
        ),
        Machine(
            name="a100-40",
            is_gpu=True,
            memory_bytes=40_000_000_000,
            peak_flops=19.5e12,
            peak_half_flops=312e12,
            memory_bytes_per_s=1.55e12,
        ),
        Machine(
            name="l40s",
            is_gpu=True,
            memory_bytes=48_000_000_000,
            peak_flops=91.6e12,
            peak_half_flops=362e12,
            memory_bytes_per_s=0.86e12,
        ),
        Machine(
            name="rtx4090",
            is_gpu=True,
            memory_bytes=24_000_000_000,
            peak_flops=82.6e12,
            peak_half_flops=165e12,
            memory_bytes_per_s=1.0e12,
        ),
    )
}
"""TF32 is off in training: in float32 the rates of tensor cores do not count."""


class Speed(FrozenModel):
    """Rates of one worker, and where they come from.

    Attributes:
        layer_flops: Operations a second in the layers, forward and backward.
        head_flops: The same in embedding, last norm, head and loss.
        layer_parameters_per_s: Parameters of layers that are updated a second.
        row_parameters_per_s: The same of embedding and head.
        source: How it is known, in words.
    """

    layer_flops: float
    head_flops: float
    layer_parameters_per_s: float
    row_parameters_per_s: float
    source: str


class DataSize(FrozenModel):
    """Samples of a data root under the run's settings.

    Attributes:
        num_clips: Selected clips.
        num_train: Training samples by modality, of all buckets.
        num_validation: Held-out samples by modality.
        num_tokens: Visual tokens of all of them.
    """

    num_clips: int
    num_train: dict[str, int]
    num_validation: dict[str, int]
    num_tokens: int


class TrainingMemory(FrozenModel):
    """Bytes of a worker at its fullest moment, over what its process takes without a model.

    Attributes:
        moment: backward: gradients are made from what the forward pass has kept; exchange: workers
            average them; merge: adapters and weights are written as one, after the last step.
        weight_bytes: Of the network; of shards the worker's part and what is gathered at once.
        gradient_bytes: Of its gradients, all of them: other blocks than those that activations
            leave. Twice while workers exchange them, that of the head twice with several parts.
        optimizer_bytes: The two moments of AdamW.
        average_bytes: The averaged network, or what of it is trained.
        activation_bytes: What the forward pass keeps of a micro batch, and one layer's work.
        loss_bytes: Gradient of the last states, and logits in work.
        loader_bytes: Blocks of samples, the batch in work and the one ahead, tables of the path.
        checkpoint_bytes: The copy that is written while steps go on, or the merged weights.
        allocator_bytes: Libraries, holes between blocks, and copies of the largest tensor.
        total_bytes: Sum of the parts.
    """

    moment: Literal["backward", "exchange", "merge"]
    weight_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int = 0
    loss_bytes: int = 0
    loader_bytes: int
    checkpoint_bytes: int = 0
    allocator_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(name for name in TrainingMemory.model_fields if name.endswith("_bytes"))
"""Names of the parts, as a plan lists them."""


class StagePlan(FrozenModel):
    """What one stage costs.

    Attributes:
        stage: Its name.
        num_parameters: P, adapters too.
        num_trained: T: P, or parameters of adapters and of what is trained whole beside them.
        tokens_per_sample: Prompt, BOV and visual tokens.
        visual_tokens_per_sample: N.
        samples_per_step: Of all workers.
        micro_batch: Samples that a worker puts through the network at once.
        tokens_per_step: Of all workers.
        max_steps: Optimizer steps.
        num_samples: Samples seen.
        num_tokens: Tokens seen.
        num_epochs: Times that each training sample is seen; None without data.
        flops: Operations of all steps and workers.
        memory: Of a worker.
        step_s: Seconds of a step, without validation and checkpoints; None if no rate is known.
        worker_hours: Hours of all steps times workers; GPU-hours where workers are GPUs.
        checkpoint_bytes: Checkpoints of the stage in storage, one more than kept while it writes,
            and the merged weights.
        problems: What does not fit, and what to change.
    """

    stage: StageName
    num_parameters: int
    num_trained: int
    tokens_per_sample: int
    visual_tokens_per_sample: int
    samples_per_step: int
    micro_batch: int
    tokens_per_step: int
    max_steps: int
    num_samples: int
    num_tokens: int
    num_epochs: float | None
    flops: int
    memory: TrainingMemory
    step_s: float | None
    worker_hours: float | None
    checkpoint_bytes: int
    problems: tuple[str, ...]


class _Work(NamedTuple):
    """What decides the cost of a stage."""

    network: TransformerConfig
    clip: Clip
    local_batch: int
    micro_batch: int
    num_parts: int
    num_workers: int
    execution: Execution
    lora: LoraConfig | None = None
    precision: Precision = "float32"

    @property
    def num_parameters(self) -> int:
        """P, adapters too."""
        return num_parameters(self.network) + adapter_parameters(self.network, self.lora)

    @property
    def num_trained(self) -> int:
        """T."""
        return num_trained(self.network, self.lora)

    @property
    def trains(self) -> frozenset[str]:
        """Which of embedding and head are trained whole."""
        return frozenset(_ROWS if self.lora is None else self.lora.whole_modules)

    @property
    def is_sharded(self) -> bool:
        """Whether each worker holds a part of the weights."""
        return self.execution.strategy == "fsdp" and self.num_workers > 1


def run_network(config: RunConfig) -> TransformerConfig:
    """Return the network of a run before there are tokenizers, with the sizes that they may reach.

    Args:
        config: The run; `model` and the two tokenizers matter. Tokenizers that exist already count
            as `vocab_size` and `levels` say.
    """
    text, codes = config.text_tokenizer.vocab_size, config.visual_tokenizer.codebook_size
    values = config.model.model_dump()
    values["num_hidden_layers"] = values["max_window_layers"] = values.pop("num_layers")
    return TransformerConfig(
        **values, vocab_size=text + codes, lm_vocab_size=text, lm_head_size=codes, bov_token_id=0
    )


def stage_clip(config: RunConfig, stage: StageName) -> Clip:
    """Return the sizes of a sample of a stage, of the main bucket.

    Batches of other buckets have about as many tokens.

    Args:
        config: The run.
        stage: Its name.

    Raises:
        ConfigError: If a side is longer than pictures may be.
    """
    samples, strides = config.tokenization, config.visual_tokenizer
    shape = latent_shape(
        1 if _stage_config(config, stage).modality == "image" else samples.num_frames,
        samples.height_px,
        samples.width_px,
        temporal_stride=strides.temporal_stride,
        spatial_stride=strides.spatial_stride,
    )
    return Clip(shape, config.text_tokenizer.max_prompt_length)


def micro_batch(config: RunConfig, stage: StageName, num_workers: int) -> int:
    """Return how many samples a worker puts through the network at once.

    Args:
        config: The run.
        stage: Its name.
        num_workers: Workers, which the batch need not fill evenly.
    """
    settings = _stage_config(config, stage)
    local = math.ceil(settings.global_batch_size / num_workers)
    return math.ceil(local / settings.gradient_accumulation_steps)


def plan_run(
    config: RunConfig,
    machine: Machine,
    *,
    num_workers: int = 1,
    execution: Execution = DEFAULT_EXECUTION,
    speeds: Mapping[StageName, Speed] | None = None,
    data: DataSize | None = None,
    stages: tuple[StageName, ...] = STAGES,
) -> list[StagePlan]:
    """Plan stages of a run.

    Args:
        config: The run.
        machine: What each worker has.
        num_workers: Workers that share the batch.
        execution: How they compute: each with the whole model or a part, what is computed again.
        speeds: Rates by stage; None takes the machine's published peak, if there is one.
        data: Samples there are; None leaves epochs out.
        stages: Which.

    Returns:
        One plan a stage, in their order.

    Raises:
        ConfigError: If there is no worker, or a side is longer than pictures may be.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers must be at least 1, got {num_workers}")
    return [
        _plan_stage(
            config,
            _work(config, stage, num_workers, execution),
            stage,
            machine,
            (speeds or {}).get(
                stage, published_speed(machine, precision=_stage_config(config, stage).precision)
            ),
            data,
        )
        for stage in stages
    ]


def published_speed(
    machine: Machine, utilisation: float = UTILISATION, *, precision: Precision = "float32"
) -> Speed | None:
    """Return the rates that a data sheet promises, less what is never reached.

    Args:
        machine: What a worker has.
        utilisation: Share of the peak that is reached, in (0, 1].
        precision: Of the products.

    Returns:
        Rates; None if no peak is known.
    """
    peak, kind = machine.peak_flops, "float32"
    if precision == "bfloat16" and machine.peak_half_flops is not None:
        peak, kind = machine.peak_half_flops, precision
    if peak is None:
        return None
    rate, update = peak * utilisation, machine.memory_bytes_per_s / _UPDATE_BYTES
    return Speed(
        layer_flops=rate,
        head_flops=rate,
        layer_parameters_per_s=update,
        row_parameters_per_s=update,
        source=f"{peak / 1e12:g} TFLOP/s in {kind} x {utilisation:g} assumed",
    )


def token_bytes(config: RunConfig, data: DataSize) -> int:
    """Return the bytes of all token shards, at most: ids are stored compressed.

    Args:
        config: The run.
        data: Samples there are.
    """
    count = sum(data.num_train.values()) + sum(data.num_validation.values())
    return _id_bytes(config) * data.num_tokens + _SHARD_ROW_BYTES * count


def _plan_stage(
    config: RunConfig,
    work: _Work,
    stage: StageName,
    machine: Machine,
    speed: Speed | None,
    data: DataSize | None,
) -> StagePlan:
    settings, num_workers = _stage_config(config, stage), work.num_workers
    count = None if data is None else data.num_train[settings.modality]
    held = path_bytes(config)
    row_bytes = _id_bytes(config) * work.clip.num_visual_tokens + _ROW_BYTES
    held += min((count or 0) * row_bytes, LOADER_BLOCKS_BYTES)
    memory = training_memory(work, samples_bytes=held, on_gpu=machine.is_gpu)
    samples = settings.max_steps * settings.global_batch_size
    seconds = None if speed is None else _step_s(work, speed, machine)
    problems = _problems(config, stage, machine, work, held)
    if count == 0:
        problems.append(
            f"{stage}: the data hold no {settings.modality} sample for training; add videos, "
            "loosen the selection or shorten tokenization.num_frames"
        )
    return StagePlan(
        stage=stage,
        num_parameters=work.num_parameters,
        num_trained=work.num_trained,
        tokens_per_sample=work.clip.num_tokens,
        visual_tokens_per_sample=work.clip.num_visual_tokens,
        samples_per_step=settings.global_batch_size,
        micro_batch=work.micro_batch,
        tokens_per_step=settings.global_batch_size * work.clip.num_tokens,
        max_steps=settings.max_steps,
        num_samples=samples,
        num_tokens=samples * work.clip.num_tokens,
        num_epochs=samples / count if count else None,
        flops=samples * sum(training_flops(work.network, work.clip, work.lora)),
        memory=memory,
        step_s=seconds,
        worker_hours=None if seconds is None else seconds * settings.max_steps * num_workers / 3600,
        # weights, average and two moments
        checkpoint_bytes=(settings.keep_checkpoints + 1) * 4 * FLOAT_BYTES * work.num_trained
        + (FLOAT_BYTES * num_parameters(work.network) if work.lora is not None else 0),
        problems=tuple(problems),
    )


def training_memory(work: _Work, *, samples_bytes: int, on_gpu: bool = False) -> TrainingMemory:
    """Return what a worker holds when it holds most.

    Args:
        work: What a worker does in a step.
        samples_bytes: Blocks of training samples in memory, and tables of the path.
        on_gpu: Samples, tables and the copy that is written while steps go on lie elsewhere then,
            and torch's own allocator leaves none of the holes of the C library.

    Returns:
        The fullest of the moments of `TrainingMemory`.
    """
    network, clip = work.network, work.clip
    h = network.hidden_size
    whole, trained = FLOAT_BYTES * work.num_parameters, FLOAT_BYTES * work.num_trained
    rows = {
        "embed_tokens": FLOAT_BYTES * h * network.vocab_size,
        "lm_head": FLOAT_BYTES * h * network.lm_head_size,
    }
    trained_rows = {name: count for name, count in rows.items() if name in work.trains}
    tokens, visual = work.micro_batch * clip.num_tokens, work.micro_batch * clip.num_visual_tokens
    recomputed = work.execution.activation_checkpointing
    saved = work.micro_batch * saved_bytes(network, clip, recomputed, work.lora)
    # what one layer makes again; gradients of an MLP's inner states, and of the states around it
    inner = work.micro_batch * recomputed_bytes(network, clip, recomputed, work.lora)
    inner += FLOAT_BYTES * tokens * (3 * network.intermediate_size + 2 * h)
    codes = network.lm_head_size
    part, each = (GPU_PART_ELEMENTS, 8) if on_gpu else (LOSS_PART_ELEMENTS, FLOAT_BYTES)
    logits = each * min(visual * codes, max(1, part // codes) * codes)
    states = FLOAT_BYTES * visual * h
    # on a processor those of weights that are not trained too: they are loaded there
    is_whole = work.lora is None or not on_gpu
    width = h if work.lora is None or is_whole else work.lora.rank
    largest = max(
        FLOAT_BYTES * network.intermediate_size * width,
        *(rows if is_whole else trained_rows).values(),
        0,
    )
    copies = _LARGEST_TENSORS * largest
    batches = _LOADER_BYTES * work.local_batch * clip.num_visual_tokens
    gradients = trained + (trained_rows.get("lm_head", 0) if work.num_parts > 1 else 0)
    held = {"weight_bytes": whole, "average_bytes": trained, "optimizer_bytes": 2 * trained}
    gathered = 0
    if work.is_sharded:
        held = {name: math.ceil(count / work.num_workers) for name, count in held.items()}
        around = sum(rows.values()) + FLOAT_BYTES * h
        layer = (whole - around) // network.num_hidden_layers
        # embedding, norm and head from forward to backward; the layer in work and the one after it
        gathered = around + 2 * layer
        # their gradients, and the buffer that they are scattered from
        kept_rows = around if work.lora is None else sum(trained_rows.values())
        gradients = math.ceil(trained / work.num_workers) + 2 * kept_rows
    if not on_gpu:  # copies lie in the memory of the processor
        held["checkpoint_bytes"] = 4 * trained
    holes = _HOLES if work.lora is None or on_gpu else _HOLES_OF_ADAPTERS
    # what is computed again passes through the memory of a processor as if it were kept
    once = saved if on_gpu else work.micro_batch * saved_bytes(network, clip, lora=work.lora)
    moments = [
        TrainingMemory(
            moment="backward",
            **held | {"weight_bytes": held["weight_bytes"] + gathered},
            gradient_bytes=gradients,
            # logits are gone when the layers go backwards
            activation_bytes=saved + max(0, inner - logits),
            loss_bytes=states + logits,
            loader_bytes=samples_bytes + batches,
            allocator_bytes=_LIBRARY_BYTES + int(holes * once) + copies,
        ),
    ]
    if work.num_workers > 1 and not work.is_sharded:
        moments.append(
            TrainingMemory(
                moment="exchange",
                **held,
                gradient_bytes=2 * trained,
                loader_bytes=samples_bytes + batches,
                allocator_bytes=_LIBRARY_BYTES + copies,
            )
        )
    if work.lora is not None and not on_gpu:
        moments.append(
            TrainingMemory(
                moment="merge",
                **held | {"checkpoint_bytes": whole},
                loader_bytes=samples_bytes + batches,
                allocator_bytes=_LIBRARY_BYTES + copies,
            )
        )
    if on_gpu:
        share = _HALF_SHARE if work.precision == "bfloat16" else 1.0
        moments = [
            memory.model_copy(
                update={
                    "activation_bytes": int(share * memory.activation_bytes),
                    "loader_bytes": 0,
                    "allocator_bytes": 0,
                }
            )
            for memory in moments
        ]
    return max(moments, key=lambda memory: memory.total_bytes)


def path_bytes(config: RunConfig) -> int:
    """Return the bytes of the path's tables: an order of all codes for each kind of code.

    Codes are of one kind if mirrored and exchanged axes turn one into the other.

    Args:
        config: The run.
    """
    kinds = 1
    for level, count in Counter(config.visual_tokenizer.levels).items():
        # levels of an odd number are symmetric about 0
        places = (level + 1) // 2 if level % 2 else level
        kinds *= math.comb(places + count - 1, count)
    return _TABLE_BYTES * kinds * config.visual_tokenizer.codebook_size


def _work(
    config: RunConfig,
    stage: StageName,
    num_workers: int,
    execution: Execution = DEFAULT_EXECUTION,
    parts: int | None = None,
) -> _Work:
    settings = _stage_config(config, stage)
    local = math.ceil(settings.global_batch_size / num_workers)
    micro = math.ceil(local / (parts or settings.gradient_accumulation_steps))
    return _Work(
        network=run_network(config),
        clip=stage_clip(config, stage),
        local_batch=local,
        micro_batch=micro,
        num_parts=math.ceil(local / micro),
        num_workers=num_workers,
        execution=execution,
        lora=settings.lora,
        precision=settings.precision,
    )


def _step_s(work: _Work, speed: Speed, machine: Machine) -> float:
    """Return the seconds of a step: products, update, exchange."""
    num_workers, network = work.num_workers, work.network
    layers, head = training_flops(network, work.clip, work.lora)
    trained_rows = {"embed_tokens": network.vocab_size, "lm_head": network.lm_head_size}
    rows = network.hidden_size * sum(trained_rows[name] for name in work.trains)
    again = recomputed_flops(network, work.clip, work.execution.activation_checkpointing)
    # a ring sends each gradient twice, less what a worker has already; shards are gathered twice
    # and their gradients scattered once for each part of the batch
    values = 2 * work.num_trained
    if work.is_sharded:
        values = work.num_parts * (2 * work.num_parameters + work.num_trained)
    exchanged = FLOAT_BYTES * values * (num_workers - 1) / num_workers
    updated = work.num_workers if work.is_sharded else 1
    return (
        work.local_batch * ((layers + again) / speed.layer_flops + head / speed.head_flops)
        + (work.num_trained - rows) / speed.layer_parameters_per_s / updated
        + rows / speed.row_parameters_per_s / updated
        + exchanged / machine.link_bytes_per_s
    )


def training_flops(
    network: TransformerConfig, clip: Clip, lora: LoraConfig | None
) -> tuple[int, int]:
    """Return the operations of one sequence, forward and backward, in the layers and in the head.

    A weight that is not trained has no gradient, which is one of three products of a matrix;
    attention multiplies states alone. What the first layer leaves out beyond that is counted.

    Args:
        network: The network.
        clip: Sizes of a sample.
        lora: The adapters, if only they are trained.
    """
    layers, head = split_flops(network, clip)
    if lora is None:
        return TRAINING_FORWARDS * layers, TRAINING_FORWARDS * head
    heads = network.num_attention_heads * network.head_dim
    attention = network.num_hidden_layers * 4 * clip.num_tokens**2 * heads
    adapters = 2 * clip.num_tokens * adapter_parameters(network, lora)
    return (
        2 * layers + attention + TRAINING_FORWARDS * adapters,
        (TRAINING_FORWARDS if "lm_head" in lora.whole_modules else 2) * head,
    )


def split_flops(network: TransformerConfig, clip: Clip) -> tuple[int, int]:
    """Return the operations of a forward pass in the layers and in the head.

    Args:
        network: The network.
        clip: Sizes of a sample.
    """
    head = 2 * clip.num_visual_tokens * network.hidden_size * network.lm_head_size
    return forward_flops(network, clip) - head, head


def _problems(
    config: RunConfig, stage: StageName, machine: Machine, planned: _Work, samples_bytes: int
) -> list[str]:
    """Return what keeps a stage from running, and what to change."""
    settings, found = _stage_config(config, stage), []
    num_workers, execution = planned.num_workers, planned.execution
    uneven = [
        size
        for size in _batch_sizes(config, stage, settings.global_batch_size)
        if size % num_workers and settings.global_batch_size % num_workers == 0
    ]
    if uneven:
        found.append(uneven_batch(stage, settings, min(uneven), num_workers))
    if settings.global_batch_size % num_workers:
        below = settings.global_batch_size // num_workers * num_workers
        near = " or ".join(str(size) for size in (below, below + num_workers) if size)
        found.append(
            f"{stage}: global_batch_size {settings.global_batch_size} must be divisible by the "
            f"{num_workers} workers; try stages.{stage}.global_batch_size={near}"
        )
    if machine.memory_bytes is None:  # what no machine has must not pass for a plan
        machine = max(GPUS.values(), key=lambda gpu: gpu.memory_bytes or 0)
    there = machine.memory_bytes or 0
    room = there - machine.process_bytes

    def needed(parts: int | None = None) -> TrainingMemory:
        work = _work(config, stage, num_workers, execution, parts)
        return training_memory(work, samples_bytes=samples_bytes, on_gpu=machine.is_gpu)

    now = needed()
    if now.total_bytes <= room:
        return found
    local = math.ceil(settings.global_batch_size / num_workers)
    # parts that make a smaller micro batch
    parts = [math.ceil(local / size) for size in range(local, 0, -1)]
    fits = next((count for count in parts if needed(count).total_bytes <= room), None)
    least = needed(local)
    if fits is not None:
        # accumulation counts parts of a worker's batch
        advice = f"--set stages.{stage}.gradient_accumulation_steps={fits}"
    elif least.moment != "backward" or least.activation_bytes < least.total_bytes / 2:
        advice = "a smaller model or workers with more memory"
        if not planned.is_sharded:
            advice = (
                "several workers with URSA_TRAIN_STRATEGY=fsdp (ursa plan --strategy fsdp), "
                f"{advice}: else each holds weights, gradients, optimizer and average whole, "
                "however many there are"
            )
    else:
        advice = (
            "a smaller tokenization.num_frames, height_px or width_px, or workers with more "
            "memory: one sample alone is too large"
        )
        if execution.activation_checkpointing != "layer":
            advice = (
                "URSA_ACTIVATION_CHECKPOINTING=layer (ursa plan --activation-checkpointing layer), "
                + advice
            )
    found.append(
        f"{stage}: a worker needs {_gigabytes(now.total_bytes + machine.process_bytes)} and "
        f"{machine.name} has {_gigabytes(there)}; try {advice}"
    )
    return found


def uneven_batch(stage: StageName, settings: StageConfig, size: int, num_workers: int) -> str:
    """Say that a batch cannot be shared out evenly, and what to change.

    Args:
        stage: Name of the stage.
        settings: Of the stage.
        size: Samples a step, of the main size or of a bucket.
        num_workers: Workers that share it.
    """
    main = settings.global_batch_size
    what = f"{stage}: global_batch_size {main}"
    if size != main:
        what += f" is {size} for samples of a bucket with more tokens, which"
    return (
        f"{what} must be divisible by the {num_workers} workers; try "
        f"stages.{stage}.global_batch_size={math.ceil(main / size) * num_workers}, fewer workers"
        + (", or leave that size out of tokenization.extra_buckets" if size != main else "")
    )


def _batch_sizes(config: RunConfig, stage: StageName, main: int) -> list[int]:
    """Return the samples a step of the extra buckets that a stage has."""
    tokens = math.prod(stage_clip(config, stage).latent_shape)
    strides = config.visual_tokenizer
    is_image = _stage_config(config, stage).modality == "image"
    shapes = [
        latent_shape(
            1 if is_image else bucket.num_frames,
            bucket.height_px,
            bucket.width_px,
            temporal_stride=strides.temporal_stride,
            spatial_stride=strides.spatial_stride,
        )
        for bucket in config.tokenization.extra_buckets
    ]
    return [bucket_batch_size(main, tokens, math.prod(shape)) for shape in shapes]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _id_bytes(config: RunConfig) -> int:
    return 2 if config.visual_tokenizer.codebook_size <= _SMALL_CODEBOOK else 4


def _stage_config(config: RunConfig, stage: StageName) -> StageConfig:
    found: StageConfig = getattr(config.stages, stage)
    return found
