"""Training and sampling of the 0.6B network on one GPU: speed, memory, and equal losses.

    python tests/bench/gpu.py                       # a GPU of 80 GB: some minutes
    python tests/bench/gpu.py --parts equal         # some parts
    python tests/bench/gpu.py --device cpu --small  # the same code on a CPU, in a minute

The network has the shape of Qwen3-0.6B with 151,669 text ids and 64,000 codes, random weights and
random tokens: time and memory do not depend on what they say. A video sample has 49 frames of 320 x
512 pixels, 13 x 40 x 64 = 33,280 tokens, an image 2,560; prompts have 320 ids. The trainer is that
of the pipeline: AdamW, average of the weights, bfloat16 products, weights and sums in float32.

Parts: `equal` trains on the CPU in float32, on the device in float32 and in bfloat16, in parts,
with layers computed again, and after a resume, and compares losses; `speed` times steps and their
memory; `loss` compares the loss with the plain way, logits of all tokens at once; `sampler` times a
step of sampling with guidance against the plain way; `plan` compares memory and time with what
`ursa plan` says of the card; `tokenizer` times the official visual tokenizer (random weights).
MFU counts the operations that a step needs (what is computed again does not count) over the peak of
dense bfloat16 products.
"""

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from tests import factories
from tests.bench import plan as plan_bench
from tests.bench.core import DT, SCALE, T, plain_draw, plain_jump
from ursa.artifacts import StageRequest
from ursa.config import RunConfig, StageConfig, load_config
from ursa.diffusion.loss import linear_posterior_loss, posterior_loss
from ursa.diffusion.path import MetricPath
from ursa.diffusion.solver import draw_from_head, euler_step, guide
from ursa.errors import UrsaError
from ursa.model.config import TransformerConfig
from ursa.model.size import Clip, Recomputed
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.cosmos import CosmosAutoencoder, CosmosConfig
from ursa.tokenizers.visual import AutoencoderTokenizer
from ursa.training.checkpoint import gathered_copy, restore_state, training_state
from ursa.training.distributed import Group
from ursa.training.execution import DeviceType, Execution
from ursa.training.plan import GPUS, DataSize, plan_run
from ursa.training.schedule import load_codes, path_over
from ursa.training.stage import load_text, stage_loader, transformer_config
from ursa.training.trainer import Trainer, training_flops

STAGE = plan_bench.STAGE
PEAK_FLOPS = 989e12
"""Dense bfloat16 products a second of an H100 or H200 SXM, as published."""
PARTS = ("equal", "speed", "loss", "sampler", "plan", "tokenizer")
LM_VOCAB_SIZE = 151_669
FULL: dict[str, Any] = {
    "model": {"hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "tokenization": {"num_frames": 49, "height_px": 320, "width_px": 512},
    "visual_tokenizer": {"levels": [8, 8, 8, 5, 5, 5]},
    "text_tokenizer": {"vocab_size": 300, "max_prompt_length": 320},
    "path": {"schedule": "fixed"},
}  # fmt: skip
SMALL: dict[str, Any] = factories.merged(
    FULL,
    {
        "model": {"hidden_size": 64, "intermediate_size": 192, "num_layers": 4,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "tokenization": {"num_frames": 9, "height_px": 48, "width_px": 64},
        "visual_tokenizer": {"levels": [8, 5, 5, 5]},
        "text_tokenizer": {"max_prompt_length": 32},
    },
)  # fmt: skip
SHORT = {"num_frames": 5, "height_px": 80, "width_px": 128}
"""320 tokens: what a CPU can train on too."""


class Case(NamedTuple):
    """A stage to train, and how."""

    sizes: dict[str, Any]
    batch_size: int = 1
    precision: str = "bfloat16"
    level: Recomputed = "none"
    compile_layers: bool = False
    num_parts: int = 1


SHAPES = {"image": Case({"num_frames": 1}, 16), "video": Case({})}


class Timing(NamedTuple):
    """What a case took: seconds a step (median), bytes at most, tokens and share of the peak."""

    step_s: float
    peak_bytes: int
    tokens_per_s: float
    mfu: float
    wait_s: float


class Bench:
    """What all parts share: the device, the sizes, and a folder for tokens."""

    def __init__(self, device: DeviceType, *, is_small: bool, folder: Path) -> None:
        self.device: DeviceType = device
        self.is_small = is_small
        self.base = SMALL if is_small else FULL
        self.short = {"num_frames": 5, "height_px": 48, "width_px": 64} if is_small else SHORT
        self.lm_vocab_size = 300 if is_small else LM_VOCAB_SIZE
        self._folder = folder
        self._numbers = itertools.count()
        self._made: dict[str, UrsaTransformer] = {}

    def config(self, case: Case) -> RunConfig:
        """Return the configuration of a case."""
        stage = {
            "global_batch_size": case.batch_size,
            "gradient_accumulation_steps": case.num_parts,
            "precision": case.precision,
            "learning_rate": 1e-4,
            "sample_every": None,
        }
        changes = {"tokenization": case.sizes, "stages": {STAGE: stage}}
        return load_config("tiny", factories.merged(self.base, changes))

    def request(self, case: Case) -> StageRequest:
        """Write random tokens of the sizes of a case."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        return plan_bench.write_request(self.config(case), folder)

    def network(self, request: StageRequest) -> TransformerConfig:
        """Return the network of a case, with the text ids of Qwen3."""
        network = transformer_config(request)
        sizes = {
            "lm_vocab_size": self.lm_vocab_size,
            "vocab_size": self.lm_vocab_size + network.lm_head_size,
        }
        return network.model_copy(update=sizes)

    def model(self, request: StageRequest) -> UrsaTransformer:
        """Return a copy of the network of a case on the CPU; drawing 0.6B weights takes long."""
        network = self.network(request)
        key = network.model_dump_json()
        if key not in self._made:
            torch.manual_seed(0)
            self._made[key] = UrsaTransformer(network)
        return copy.deepcopy(self._made[key])

    def trainer(
        self, case: Case, request: StageRequest, *, device: DeviceType | None = None
    ) -> Trainer:
        """Build the trainer of a case; the first weights are the same everywhere."""
        config = request.config
        codes, levels = load_codes(request.visual_tokenizer)
        return Trainer(
            stage=STAGE,
            config=getattr(config.stages, STAGE),
            seed=0,
            model=self.model(request),
            path=path_over(request, codes, levels),
            text_tokenizer=load_text(request.text_tokenizer),
            loader=stage_loader(request),
            max_prompt_length=config.text_tokenizer.max_prompt_length,
            group=Group(0, 1),
            execution=Execution(
                device=device or self.device,
                activation_checkpointing=case.level,
                compile_layers=case.compile_layers,
            ),
        )


def wait(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def clean(device: str) -> None:
    """Give back what no longer exists, and let the peak of memory begin anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Return the most that was allocated on a GPU since `clean`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def timed(device: str, run: Callable[[], object], repeats: int = 5) -> tuple[float, int]:
    """Return the median of seconds, after one run that does not count, and the peak of memory."""
    clean(device)
    taken = []
    for _ in range(1 + repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]), peak_bytes(device)


def say(**values: object) -> None:
    """Print a line of JSON, so that what was measured survives whatever follows."""
    print(json.dumps(values), flush=True)


def measure_speed(bench: Bench, case: Case, num_steps: int = 4) -> Timing:
    """Time the steps of a case after the second."""
    request = bench.request(case)
    trainer = bench.trainer(case, request)
    clean(bench.device)
    steps = []
    try:
        for step in range(2 + num_steps):
            wait(bench.device)
            found = trainer.step(step)
            wait(bench.device)
            steps.append(found)
    finally:
        trainer.close()
    kept = steps[2:]
    seconds = statistics.median(each["train/step_s"] for each in kept)
    clip = clip_of(request)
    needed = case.batch_size * sum(training_flops(trainer.model.config, clip, None))
    return Timing(
        step_s=seconds,
        peak_bytes=peak_bytes(bench.device),
        tokens_per_s=case.batch_size * clip.num_visual_tokens / seconds,
        mfu=needed / seconds / PEAK_FLOPS,
        wait_s=statistics.median(each["train/data_wait_s"] for each in kept),
    )


def clip_of(request: StageRequest) -> Clip:
    """Return the sizes of a sample."""
    main = request.datasets.get("video", "train")
    return Clip(main.latent_shape, request.config.text_tokenizer.max_prompt_length)


def speed(bench: Bench, *, compiled: bool = True) -> None:
    """Time videos one at a time and images sixteen at a time."""
    for name, case in SHAPES.items():
        chosen = [case._replace(level=level) for level in get_args(Recomputed)]
        if compiled:
            chosen += [each._replace(compile_layers=True) for each in chosen[::3]]
        for each in chosen:
            values = {"part": "speed", "shape": name, "level": each.level}
            values |= {"batch": each.batch_size, "compiled": each.compile_layers}
            try:
                say(**values, **measure_speed(bench, each)._asdict())
            except (torch.OutOfMemoryError, UrsaError) as error:
                say(**values, failed=str(error).partition("\n")[0][:200])
            clean(bench.device)


def losses(
    bench: Bench, case: Case, request: StageRequest, num_steps: int, device: DeviceType
) -> list[float]:
    """Return the losses of the first steps."""
    trainer = bench.trainer(case, request, device=device)
    try:
        return [trainer.step(step)["train/loss"] for step in range(num_steps)]
    finally:
        trainer.close()


def resumed_losses(bench: Bench, case: Case, request: StageRequest, num_steps: int) -> list[float]:
    """Return the losses with a checkpoint taken over by a new trainer half way."""
    first = bench.trainer(case, request)
    found = [first.step(step)["train/loss"] for step in range(num_steps // 2)]
    state = training_state(first.trained, first.average, first.optimizer)
    kept = gathered_copy(state, keep=True)
    first.close()
    second = bench.trainer(case, request)
    restore_state(kept, second.trained, second.average, second.optimizer)
    found += [second.step(step)["train/loss"] for step in range(num_steps // 2, num_steps)]
    second.close()
    return found


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the greatest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def equal(bench: Bench, num_steps: int = 3) -> None:
    """Compare losses: CPU and device, precisions, parts, levels, and after a resume."""
    case = Case(bench.short, 4, "float32")
    request = bench.request(case)
    began = time.perf_counter()
    expected = losses(bench, case, request, num_steps, "cpu")
    say(part="equal", what="cpu, float32", losses=expected, seconds=time.perf_counter() - began)
    here = losses(bench, case, request, num_steps, bench.device)
    again = losses(bench, case, request, num_steps, bench.device)
    say(part="equal", what="device, float32, against the CPU", losses=here,
        relative=difference(here, expected))  # fmt: skip
    say(part="equal", what="the same once more", relative=difference(again, here))
    others = {
        "two parts a step": case._replace(num_parts=2),
        "four parts a step": case._replace(num_parts=4),
        "layers computed again": case._replace(level="layer"),
        "layers compiled": case._replace(compile_layers=True),
    }
    for what, other in others.items():
        stage = {"gradient_accumulation_steps": other.num_parts}
        changed = request.model_copy(
            update={
                "config": load_config(
                    "tiny",
                    factories.merged(
                        bench.base,
                        {"tokenization": case.sizes, "stages": {STAGE: stage_of(request) | stage}},
                    ),
                )
            }
        )
        try:
            found = losses(bench, other, changed, num_steps, bench.device)
        except UrsaError as error:
            say(part="equal", what=what, failed=str(error)[:200])
            continue
        say(part="equal", what=what, relative=difference(found, here))
    found = resumed_losses(bench, case, request, num_steps)
    say(part="equal", what="a checkpoint taken over half way", relative=difference(found, here))
    half = case._replace(precision="bfloat16")
    found = losses(bench, half, bench.request(half), num_steps, bench.device)
    say(part="equal", what="device, bfloat16, against the CPU", losses=found,
        relative=difference(found, expected))  # fmt: skip


def stage_of(request: StageRequest) -> dict[str, Any]:
    """Return the settings of the stage as plain values."""
    stage: StageConfig = getattr(request.config.stages, STAGE)
    return stage.model_dump(mode="json")


def loss(bench: Bench) -> None:
    """Time loss and gradients of hidden states against logits of all tokens at once."""
    clip, size = clip_of(bench.request(Case({}))), bench.config(Case({})).model.hidden_size
    codes = bench.config(Case({})).visual_tokenizer.codebook_size
    half = torch.bfloat16
    hidden = torch.randn(1, clip.num_visual_tokens, size, device=bench.device, dtype=half)
    weight = torch.randn(codes, size, device=bench.device) / size**0.5
    x_1 = torch.randint(codes, (1, clip.num_visual_tokens), device=bench.device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def forget() -> None:
        hidden.grad = weight.grad = None

    def ours() -> None:
        forget()
        linear_posterior_loss(hidden, weight, x_1).loss.backward()

    def plain() -> None:
        forget()
        posterior_loss(hidden @ weight.to(half).T, x_1).loss.backward()

    held = hidden.nbytes + weight.nbytes
    for name, run in {"plain": plain, "ours": ours}.items():
        seconds, most = timed(bench.device, run)
        say(part="loss", way=name, tokens=clip.num_visual_tokens, seconds=seconds,
            bytes_beyond_inputs=most - held)  # fmt: skip


@torch.inference_mode()
def sampler(bench: Bench, shape: str, case: Case) -> None:
    """Time a step of sampling with guidance: the network, and what comes after it, both ways."""
    request = bench.request(case)
    clip, network = clip_of(request), bench.network(request)
    model = bench.model(request).to(bench.device, torch.bfloat16).eval()
    codes, levels = load_codes(request.visual_tokenizer)
    path = path_over(request, codes, levels).to(bench.device)
    x_t = torch.randint(network.lm_head_size, (2, *clip.latent_shape), device=bench.device)
    text = torch.zeros(2, clip.prompt_length, dtype=torch.long, device=bench.device)
    forward_s, _ = timed(bench.device, lambda: model.hidden_states(text, x_t), 3)
    states = model.hidden_states(text, x_t)
    numbers = torch.rand(3, *clip.latent_shape, device=bench.device, dtype=torch.float64)
    now = torch.full((1, clip.latent_shape[0]), T, dtype=torch.float64)
    inputs = _Plain(path, codes.to(bench.device), x_t[0].flatten(), numbers[:1].flatten(1))

    def ours() -> Tensor:
        guided = guide(*states.chunk(2), SCALE).view(1, *clip.latent_shape, -1)
        drawn = draw_from_head(guided, model.lm_head.weight, numbers[:1].float())
        return euler_step(path, x_t[:1], drawn, t=now, t_next=now + DT, uniforms=numbers[1:, None])

    def plain() -> Tensor:
        logits = guide(*(states @ model.lm_head.weight.T), SCALE)
        return plain_jump(inputs, plain_draw(inputs, logits))  # type: ignore[arg-type]

    for way, run in {"ours": ours, "plain": plain}.items():
        clean(bench.device)
        held = torch.cuda.memory_allocated() if bench.device == "cuda" else 0
        try:
            seconds, most = timed(bench.device, run, 3)
        except torch.OutOfMemoryError as error:
            say(part="sampler", shape=shape, way=way, failed=str(error)[:100])
            continue
        say(part="sampler", shape=shape, way=way, forward_s=forward_s, seconds=seconds,
            share_of_step=seconds / (forward_s + seconds), bytes=most - held)  # fmt: skip


class _Plain:
    """What the plain formulae of the core benchmark read, on the device."""

    def __init__(self, path: MetricPath, codes: Tensor, x_t: Tensor, uniforms: Tensor) -> None:
        self.path, self.codes, self.x_t, self.uniforms = path, codes, x_t, uniforms
        self.generator = torch.Generator(codes.device).manual_seed(0)


def plan(bench: Bench) -> None:
    """Compare memory and time with what `ursa plan` says of this card."""
    name = torch.cuda.get_device_name().lower() if bench.device == "cuda" else "h100"
    machine = next((GPUS[key] for key in GPUS if key in name), GPUS["h100"])
    levels: tuple[Recomputed, ...] = ("none", "layer")
    for shape, case in SHAPES.items():
        for level in levels:
            each = case._replace(level=level)
            samples = {"image": 0, "video": plan_bench.NUM_SAMPLES}
            data = DataSize(
                num_clips=1, num_train=samples, num_validation=samples, num_tokens=0
            )  # fmt: skip
            execution = Execution(device=bench.device, activation_checkpointing=level)
            (planned,) = plan_run(
                bench.config(each), machine, execution=execution, data=data, stages=(STAGE,)
            )
            memory = planned.memory.model_dump()
            say(part="plan", shape=shape, level=level, machine=machine.name, memory=memory,
                total_bytes=planned.memory.total_bytes, step_s=planned.step_s)  # fmt: skip


def tokenizer(bench: Bench) -> None:
    """Time the official visual tokenizer on clips: what bulk tokenization waits for."""
    small = {"block_out_channels": (16, 16, 32), "layers_per_block": 1} if bench.is_small else {}
    coder = AutoencoderTokenizer(CosmosAutoencoder(CosmosConfig(**small)).eval())
    sizes = (5, 64, 96) if bench.is_small else (49, 320, 512)
    # a CPU pools no bfloat16
    dtypes = (torch.float32, torch.bfloat16)[: 1 if bench.device == "cpu" else 2]
    for batch_size, dtype in itertools.product((1, 4), dtypes):
        coder.to(device=bench.device, dtype=dtype)
        frames = np.random.default_rng(0).integers(0, 256, (batch_size, *sizes, 3), np.uint8)
        clean(bench.device)
        encode_s, most = timed(bench.device, lambda: coder.encode(frames), 3)  # noqa: B023
        ids = coder.encode(frames)
        decode_s, _ = timed(bench.device, lambda: coder.decode(ids), 3)  # noqa: B023
        count = batch_size * sizes[0]
        say(part="tokenizer", batch_size=batch_size, dtype=str(dtype), peak_bytes=most,
            encoded_frames_per_s=count / encode_s,
            decoded_frames_per_s=count / decode_s)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts; each prints lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a network of 0.3M parameters")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args(arguments)
    is_gpu = given.device == "cuda"
    say(
        machine=torch.cuda.get_device_name() if is_gpu else platform.processor(),
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.device, is_small=given.small, folder=Path(folder))
        for part in given.parts:
            began = time.perf_counter()
            if part == "speed":
                speed(bench, compiled=not given.no_compile)
            elif part == "sampler":
                for shape, case in SHAPES.items():
                    sampler(bench, shape, case)
                    clean(bench.device)
            else:
                {"equal": equal, "loss": loss, "plan": plan, "tokenizer": tokenizer}[part](bench)
            say(part=part, seconds_in_all=time.perf_counter() - began)


if __name__ == "__main__":
    main()
