"""The `ursa` command: generate clips, show configurations. Imports only what a command needs."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ursa import __version__
from ursa.errors import ConfigError, UrsaError

app = App(name="ursa", version=__version__, help="Video generation models from your own videos.")
_REGISTRY_PREFIX = "models:/"


@app.command
def generate(
    prompt: str,
    *,
    model: str,
    out: Path = Path("out.mp4"),
    image: Path | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    motion: float | None = None,
    seed: int | None = None,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Generate a clip from a prompt, and from a first frame if one is given.

    Example: ursa generate "a red ball rolls" --model models:/ursa@champion --seed 0 --out ball.mp4

    Args:
        prompt: What the clip shows.
        model: A model directory, or models:/NAME@ALIAS in the registry (MLFLOW_TRACKING_URI).
        out: Where to write; .mp4, .gif or .png (first frame).
        image: First frame of the clip; it is kept.
        num_frames: 1 + 4k frames; 1 is an image.
        height: Pixels, divisible by 8.
        width: Pixels, divisible by 8.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance, 1 is off.
        temperature: Of the draw of codes; 1 is the model's own law, less is cleaner, less varied.
        motion: Asked motion, px/s at 256 px width.
        seed: Makes the clip repeatable; drawn and printed if left out.
        quiet: Print the path alone.
    """
    if out.suffix not in {".mp4", ".gif", ".png"}:
        raise ConfigError(f"--out must end in .mp4, .gif or .png, got {out.name!r}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {out.parent}; make it first")
    if image is not None and not image.is_file():
        raise ConfigError(f"--image: there is no file {image}")
    import torch
    from PIL import Image

    from ursa.generation import UrsaPipeline
    from ursa.video.decode import write_gif, write_video

    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    started = time.perf_counter()
    with _model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory)
    total = steps or pipeline.defaults.num_inference_steps

    def show(step: int, _t: float, _codes: torch.Tensor) -> None:
        if sys.stderr.isatty() and not quiet:
            sys.stderr.write(f"\rstep {step + 1}/{total}" + ("\n" if step + 1 == total else ""))

    frames = pipeline(
        prompt,
        image=None if image is None else Image.open(image),
        num_frames=1 if out.suffix == ".png" and num_frames is None else num_frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        temperature=temperature,
        motion_score=motion,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=show,
    ).frames[0]
    if out.suffix == ".png":
        Image.fromarray(frames[0]).save(out)
    elif out.suffix == ".gif":
        write_gif(out, frames, pipeline.defaults.fps)
    else:
        write_video(out, frames, pipeline.defaults.fps)
    seconds = time.perf_counter() - started
    print(out if quiet else f"{out}  {len(frames)} frames, seed {seed}, {seconds:.1f} s")


@app.command
def config(preset: str = "tiny") -> None:
    """Print a preset as the pipeline reads it.

    Example: ursa config small

    Args:
        preset: Name of the preset.
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
    with tempfile.TemporaryDirectory(prefix="ursa-model-") as folder:
        # the library knows no tracker: the command line of MLflow does the talking
        command = [sys.executable, "-m", "mlflow", "artifacts", "download"]
        command += ["--artifact-uri", model, "--dst-path", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ConfigError(
                f"{model} cannot be downloaded: {last}; start the services with `make up` and set "
                "MLFLOW_TRACKING_URI, for instance to http://127.0.0.1:5000"
            )
        found = sorted(Path(folder).rglob("model_index.json"))
        if not found:
            raise ConfigError(f"{model} holds no ursa model (model_index.json is missing)")
        yield found[0].parent


def main() -> None:
    """Run the command line; an error is one line and exit status 1."""
    try:
        app()
    except UrsaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
