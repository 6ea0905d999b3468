"""The `ursa` command: generate clips, plan sizes, show configurations; imports what is needed."""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import App, Parameter

from ursa import __version__
from ursa.errors import ConfigError, UrsaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ursa.model.config import TransformerConfig
    from ursa.model.size import Plan, Qwen3Size

app = App(
    name="ursa",
    version=__version__,
    help="Video generation models from your own videos.",
    help_format="plaintext",  # the others load a Markdown parser, a quarter of a second
)
_REGISTRY_PREFIX = "models:/"


@app.command
def generate(
    prompt: str,
    *,
    model: str,
    out: Path = Path("out.mp4"),
    image: Path | None = None,
    last_image: Path | None = None,
    video: Path | None = None,
    given_frames: int | None = None,
    noise: float = 0.0,
    num_frames: int | None = None,
    window: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    temperature: float | None = None,
    solver: Literal["exact", "euler", "euler_beta"] | None = None,
    clock: Literal["official", "linear", "entropy"] | None = None,
    motion: float | None = None,
    negative: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Generate a clip from a prompt, and from frames if some are given.

    Example: ursa generate "a red ball rolls" --model models:/ursa@champion --seed 0 --out ball.mp4

    Example: ursa generate "a ball" --model DIR --image ball.png --num-frames 33 --window 9

    Args:
        prompt: What the clip shows.
        model: A model directory, a name on the hub, or models:/NAME@ALIAS in the registry at
            MLFLOW_TRACKING_URI, http://127.0.0.1:5000 if that is not set.
        out: Where to write; .mp4, .gif or .png (first frame).
        image: First frame of the clip; it is kept.
        last_image: Last frame of the clip; with --image the clip goes from one to the other.
        video: A video to go on from: its last frames are the first ones of the clip.
        given_frames: How many frames of --video, or of the window before, are given, 1 + 4k; about
            half a window if left out.
        noise: Noise of the given frames, 0 to 1; 0 keeps them. The network draws what is noised
            anew: a small model changes a lot from 0.05 on, a large one a little at 0.1.
        num_frames: 1 + 4k frames, with --window any number; 1 is an image.
        window: Frames at once, 1 + 4k: a longer clip is made window by window.
        height: Pixels, divisible by 8.
        width: Pixels, divisible by 8.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance, 1 is off.
        shift: Timestep shift of the sampler, 1 is none.
        temperature: Of the draw of codes; 1 is the model's own law, less is cleaner, less varied.
        solver: How codes move between steps; exact has no error of time, euler is the paper's.
        clock: When steps start; entropy takes equal falls of the held-out loss.
        motion: Asked motion, px/s at 256 px width.
        negative: What the clip shall not show.
        seed: Makes the clip repeatable; drawn and printed if left out.
        device: Where to run, such as cpu or cuda.
        quiet: Print the path alone.

    Raises:
        UrsaError: If an argument does not fit, or a model or file cannot be read.
    """
    _check_files(out, image=image, last_image=last_image, video=video)
    for name, value in (
        ("--num-frames", num_frames),
        ("--window", window),
        ("--given-frames", given_frames),
        ("--height", height),
        ("--width", width),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must be from 0 to 2**63 - 1, got {seed}")
    if image is not None and video is not None:
        raise ConfigError("--image and --video both give the first frames; leave one out")
    import torch

    from ursa.config import load_config
    from ursa.generation import UrsaPipeline, slide_window
    from ursa.video.foreign import read_last_frames

    _check_device(device)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    started = time.perf_counter()
    with _model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    pipeline.set_progress_bar_config(disable=True if quiet else None, desc="steps")
    defaults, stride = pipeline.defaults, pipeline.visual_tokenizer.temporal_stride
    total = num_frames or (1 if out.suffix.lower() == ".png" else defaults.num_frames)
    height, width = height or defaults.height, width or defaults.width
    window = min(window or total, total)
    overlap = given_frames or max(1, 1 + (window - 1) // (2 * stride) * stride)
    whole = video is not None and overlap >= total
    if whole and noise == 0:
        raise ConfigError(
            f"--given-frames {overlap} leaves none of {total} frames to make: give fewer, or let "
            "them change with --noise"
        )
    first, last = _open_image(image), _open_image(last_image)
    given: np.ndarray | None = None
    if video is not None:
        given = read_last_frames(
            video,
            overlap,
            fps=defaults.fps,
            height_px=height,
            width_px=width,
            limits=load_config("tiny").ingestion,
        )
    generator = torch.Generator().manual_seed(seed)
    num_done = overlap if video else 0

    def draw(known: "np.ndarray | None", count: int) -> "np.ndarray":
        nonlocal num_done
        num_done = count if known is None else num_done + count - len(known)
        frames: np.ndarray = pipeline(
            prompt,
            negative,
            image=first if known is None else None,
            last_image=last if num_done >= total else None,
            video=known,
            height=height,
            width=width,
            num_frames=count,
            num_inference_steps=steps,
            guidance_scale=guidance,
            flow_shift=shift,
            temperature=temperature,
            solver=solver,
            clock=clock,
            motion_score=motion,
            cond_noise_scale=noise,
            generator=generator,
            output_type="np",
        ).frames[0]
        return frames

    if whole and given is not None:
        frames = draw(given[-total:], total)
    else:
        frames = slide_window(
            draw,
            num_frames=total,
            window_frames=window,
            overlap_frames=overlap,
            temporal_stride=stride,
            given=given,
        )
    _write_frames(out, frames, defaults.fps)
    seconds = time.perf_counter() - started
    if quiet:
        print(out)
        return
    written = "first of " if out.suffix.lower() == ".png" and len(frames) > 1 else ""
    print(f"{out}  {written}{len(frames)} frames, seed {seed}, {seconds:.1f} s")


def _check_files(out: Path, **inputs: Path | None) -> None:
    if out.suffix.lower() not in {".mp4", ".gif", ".png"}:
        raise ConfigError(f"--out must end in .mp4, .gif or .png, got {out.name!r}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {out.parent}; make it first")
    for name, path in inputs.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no file {path}")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used: {first}; try cpu") from error


def _open_image(path: Path | None) -> "Image | None":
    if path is None:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is not an image that can be read: {error}") from error


def _write_frames(out: Path, frames: "np.ndarray", fps: float) -> None:
    from PIL import Image

    from ursa.video.decode import write_gif, write_video

    if out.suffix.lower() == ".png":
        Image.fromarray(frames[0]).save(out)
    elif out.suffix.lower() == ".gif":
        write_gif(out, frames, fps)
    else:
        write_video(out, frames, fps)


@app.command
def demo(*, model: str, port: int = 7860, device: str = "cpu") -> None:
    """Open a page in the browser to try a model: prompt, first frame, motion, seed, steps.

    Example: ursa demo --model models:/ursa@champion

    Args:
        model: As in `ursa generate`.
        port: Port on 127.0.0.1.
        device: Where to run, such as cpu or cuda.

    Raises:
        UrsaError: If the port is taken, or the model cannot be read.
    """
    _check_port(port)
    from ursa.demo import serve
    from ursa.generation import UrsaPipeline

    _check_device(device)

    with _model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    pipeline.set_progress_bar_config(disable=True)
    serve(pipeline, port=port, announce=lambda url: print(f"{url}  (Ctrl+C ends it)"))


def _check_port(port: int) -> None:
    import socket

    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be opened on 127.0.0.1: {error}; give another"
        ) from error


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


@app.command
def plan(
    *,
    model: Path | None = None,
    size: Literal["0.6b", "1.7b", "4b"] | None = None,
    preset: Literal["tiny", "small"] | None = None,
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

    Example: ursa plan --size 1.7b --num-frames 49 --height 320 --width 512

    Args:
        model: A model directory, or its transformer/; the sizes are those that it was trained on.
        size: A network of the paper, from the Qwen3 of that size; 1.7b if nothing is named.
        preset: The network of a preset at the preset's sizes.
        num_frames: 1 + 4k frames; 1 is an image.
        height: Pixels, divisible by 8.
        width: Pixels, divisible by 8.
        prompt_length: Text tokens.
        steps: Steps of the sampler; 50, for an image 25.
        guidance: Classifier-free guidance, 1 is off.
        dtype: Of weights and activations at inference.
        temporal_stride: Frames per latent frame of the visual tokenizer; the model's, or 4.
        spatial_stride: Pixels per latent row of the visual tokenizer; the model's, or 8.
        as_json: Print JSON, in single operations and bytes.

    Raises:
        ConfigError: If arguments do not fit together, or a model directory is not readable.
    """
    if sum(item is not None for item in (model, size, preset)) > 1:
        raise ConfigError("give one of --model, --size and --preset")
    import json

    from ursa.model.size import Clip, latent_shape, num_sequences
    from ursa.model.size import plan as add_up

    known = _planned(model, size or "1.7b", preset)
    frames = known.num_frames if num_frames is None else num_frames
    shape = latent_shape(
        frames,
        known.height if height is None else height,
        known.width if width is None else width,
        temporal_stride=temporal_stride or known.temporal_stride,
        spatial_stride=spatial_stride or known.spatial_stride,
    )
    if steps is None:
        steps = known.steps or (25 if frames == 1 else 50)
    for name, value, least in (("--steps", steps, 1), ("--prompt-length", prompt_length, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
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
    if as_json:
        print(json.dumps({"network": known.name, "dtype": dtype} | result.model_dump(), indent=2))
    else:
        _print_plan(result, known, dtype, steps)


def _planned(model: Path | None, size: "Qwen3Size", preset: str | None) -> _Planned:
    """Return the network to plan for."""
    from ursa.config import load_config
    from ursa.model.config import TransformerConfig, read_transformer_config
    from ursa.model.size import qwen3_config

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
        visual = _json_of(model / "vae" / "config.json")
        if scheduler.get("shift") is not None:
            planned = planned._replace(shift=scheduler["shift"])
        if visual.get("_class_name") == "AutoencoderVQ":  # frame by frame
            spatial = 2 ** (len(visual["block_out_channels"]) - 1)
            planned = planned._replace(temporal_stride=1, spatial_stride=spatial)
        elif "temporal_stride" in visual:
            strides = visual["temporal_stride"], visual["spatial_stride"]
            planned = planned._replace(temporal_stride=strides[0], spatial_stride=strides[1])
        return planned._replace(**named)
    if preset is None:
        return _Planned(size, qwen3_config(size))
    run = load_config(preset)
    text, codes = run.text_tokenizer.vocab_size, run.visual_tokenizer.codebook_size
    network = run.model.model_dump()
    network["num_hidden_layers"] = network["max_window_layers"] = network.pop("num_layers")
    sampling = run.evaluation.sampling
    return _Planned(
        name=preset,
        config=TransformerConfig(
            **network,
            vocab_size=text + codes,
            lm_vocab_size=text,
            lm_head_size=codes,
            bov_token_id=0,
        ),
        num_frames=run.tokenization.num_frames,
        height=run.tokenization.height_px,
        width=run.tokenization.width_px,
        prompt_length=run.text_tokenizer.max_prompt_length,
        steps=sampling.num_inference_steps,
        guidance=sampling.guidance_scale,
        guidance_trunc=sampling.guidance_trunc,
        shift=sampling.timestep_shift,
    )


path_app = App(
    name="path", help="The schedule of the probability path: fit one, or show a model's."
)
app.command(path_app)


@path_app.command
def fit(
    *,
    levels: str | None = None,
    tokenizer: Path | None = None,
    metric: Literal["normalized", "product"] = "normalized",
    distance: Literal["squared", "euclidean"] = "squared",
    out: Path | None = None,
) -> None:
    """Fit alpha and c, and a table, so that the mean distance falls linearly in t.

    Example: ursa path fit --levels 8,8,8,5,5,5 --out schedule.png

    Args:
        levels: FSQ levels, with commas between.
        tokenizer: Instead of levels, a directory of a visual tokenizer.
        metric: Distances of normalised codes, or of FSQ codes as they are.
        distance: What is to fall linearly.
        out: Where to draw it, .png.
    """
    if (levels is None) == (tokenizer is None):
        raise ConfigError("give --levels or --tokenizer, one of the two")
    if out is not None and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise ConfigError(f"--out must be a .png in a directory that exists, got {out}")
    from ursa.config import load_config
    from ursa.diffusion.grid import grid_codes
    from ursa.generation import SchedulerConfig
    from ursa.tokenizers.visual import load_visual_tokenizer
    from ursa.training.schedule import FittedSchedule

    if tokenizer is not None:
        visual = load_visual_tokenizer(tokenizer)
        codes, sizes = visual.codebook, visual.levels
    else:
        try:
            sizes = tuple(int(level) for level in str(levels).split(","))
        except ValueError as error:
            raise ConfigError(
                f"--levels must be numbers such as 8,8,8,5,5,5, got {levels}"
            ) from error
        codes = grid_codes(sizes)
    codebook = SchedulerConfig(metric=metric).codebook(codes, sizes)
    config = load_config("tiny").path.model_copy(update={"distance": distance, "metric": metric})
    fitted = FittedSchedule.of(codebook, config)
    print(f"codes      {fitted.num_codes}, {fitted.collisions} of them equal to another")
    print(
        f"power      alpha {fitted.alpha:.4f}, c {fitted.c:.4f}: off the line by at most "
        f"{fitted.power_deviation:.2g}, Pearson {fitted.power_pearson:.6f}"
    )
    print(
        f"table      {len(fitted.log_beta)} knots: off by at most {fitted.table_deviation:.2g}, "
        f"Pearson {fitted.table_pearson:.8f}"
    )
    if fitted.num_rows < fitted.num_codes:
        print(f"           fitted to {fitted.num_rows} codes, measured on as many others")
    if out is not None:
        out.write_bytes(fitted.picture())
        print(f"drawn      {out}")


@path_app.command
def show(*, model: str) -> None:
    """Show the schedule of a model, and how straight the mean distance falls under it.

    Example: ursa path show --model models:/ursa@champion

    Args:
        model: As in `ursa generate`.
    """
    import torch

    from ursa.diffusion.linearization import measure_linearity
    from ursa.diffusion.path import MetricPath
    from ursa.generation import UrsaPipeline

    with _model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory)
    path, scheduler = pipeline.path, pipeline.scheduler
    if not isinstance(path, MetricPath):
        print("mixture path: no distances and no schedule")
        return
    table = "" if scheduler.log_beta is None else f"table of {len(scheduler.log_beta)} knots, near "
    print(f"schedule   {table}alpha {scheduler.alpha}, c {scheduler.c}; metric {scheduler.metric}")
    times = torch.tensor([0.04, 0.2, 0.5, 0.8, 0.9, 0.96, 0.99], dtype=torch.float64)
    print("t         " + "".join(f"{t:9.3g}" for t in times.tolist()))
    print("beta      " + "".join(f"{b:9.3g}" for b in path.beta(times).tolist()))
    for name, euclidean in (("squared", False), ("euclidean", True)):
        if euclidean and scheduler.metric == "product":
            continue
        found = measure_linearity(path.codebook, path.schedule, euclidean=euclidean)
        print(
            f"{name:10} off the straight line by at most {found.max_deviation:.2g}, "
            f"Pearson {found.pearson:.6f}"
        )


def _json_of(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if there is none."""
    import json

    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _print_plan(plan: "Plan", known: _Planned, dtype: str, steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    frames, rows, columns = plan.latent_shape
    table = Table("", known.name, "")
    for row in (
        ("parameters", f"{plan.num_parameters:,}", _short(plan.num_parameters, "")),
        (
            "tokens",
            f"{plan.num_tokens:,}",
            f"{plan.num_visual_tokens:,} visual ({frames} x {rows} x {columns}) + prompt + BOV",
        ),
        ("one forward", _short(plan.forward_flops, "FLOP"), "one sequence"),
        (
            "sampling",
            _short(plan.sampling_flops, "FLOP"),
            f"{steps} steps, {plan.num_sequences} sequences through the network",
        ),
        ("weights", _short(plan.weight_bytes, "B"), dtype),
        ("activations", _short(plan.activation_bytes, "B"), f"{dtype}, inside a layer, at most"),
        ("logits", _short(plan.logits_bytes, "B"), "float32, of the tokens that are drawn at once"),
        ("inference", _short(plan.inference_bytes, "B"), "sum of the three"),
        (
            "tokens x codes",
            _short(plan.code_tensor_bytes, "B"),
            f"one float32 tensor {plan.num_visual_tokens:,} x {known.config.lm_head_size:,}",
        ),
        (
            "training state",
            _short(plan.training_state_bytes, "B"),
            "float32 weights, gradients, AdamW, average; no activations",
        ),
    ):
        table.add_row(*row)
    Console(width=110).print(table)


def _short(count: int, unit: str) -> str:
    """Return a number with a decimal prefix: 1.98 G, 8.52 GB, 34.40 PFLOP."""
    power = min(5, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.2f} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


@app.command
def config(preset: str = "tiny") -> None:
    """Print a preset as the pipeline reads it.

    Example: ursa config small

    Args:
        preset: Name of the preset.

    Raises:
        ConfigError: If there is no such preset.
    """
    import yaml

    from ursa.config import load_config

    print(yaml.safe_dump(load_config(preset).model_dump(mode="json"), sort_keys=False))


@contextmanager
def _model_directory(model: str) -> Iterator[Path]:
    """Yield a local model directory; a registry URI is downloaded with the mlflow command."""
    if not model.startswith(_REGISTRY_PREFIX):
        yield Path(model)
        return
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_mlflow()
    _check_answers(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="ursa-model-") as folder:
        # the library knows no tracker: the command line of MLflow does the talking
        command = [sys.executable, "-m", "mlflow", "artifacts", "download"]
        command += ["--artifact-uri", model, "--dst-path", folder]
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ConfigError(
                f"{model} cannot be had from {tracking_uri}: {last.partition(': ')[2] or last}; "
                "its models, versions and aliases are on the page /#/models there"
            )
        found = sorted(Path(folder).rglob("model_index.json"))
        if not found:
            raise ConfigError(f"{model} holds no ursa model (model_index.json is missing)")
        yield found[0].parent


def _local_mlflow() -> str:
    """Return the address of the tracking server that `make up` starts."""
    return f"http://127.0.0.1:{os.environ.get('URSA_MLFLOW_PORT') or 5000}"


def _check_answers(tracking_uri: str) -> None:
    """Raise ConfigError if nothing listens there: MLflow itself would try for minutes."""
    import socket
    from urllib.parse import urlsplit

    address = urlsplit(tracking_uri)
    if address.scheme not in {"http", "https"}:
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"no MLflow server answers at {tracking_uri} ({error}); start the services with "
            "`make up`, or set MLFLOW_TRACKING_URI to the address of yours"
        ) from error


def main() -> None:
    """Run the command line; an error is one line and exit status 1."""
    try:
        app()
    except UrsaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
