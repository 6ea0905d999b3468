"""`ursa generate`: a clip from a prompt, and from frames if some are given."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ursa.cli.models import check_device, model_directory
from ursa.cli.plan import strides_of
from ursa.errors import ConfigError, VideoDecodeError, size_hint

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ursa.generation import SampleDefaults

_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "flow_shift": "--shift",
    "temperature": "--temperature",
    "cond_noise_scale": "--noise",
    "motion_score": "--motion",
    "num_frames": "--num-frames",
    "window_frames": "--window",
    "overlap_frames": "--given-frames",
    "height": "--height",
    "width": "--width",
    "clock": "--clock",
    "times of steps": "--clock with --steps",
    "last_image": "--last-image",
    "image": "--image",
    "video": "--video",
    "negative_prompt": "--negative",
}
"""Options by the library's arguments."""
_PUBLISHED_FRAMES, _PUBLISHED_STEPS, _PUBLISHED_MOTION = 49, 50, 9.0


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
            anew: a small model changes a lot from 0.05 on, a large one a little at 0.1. Frames of
            --video that others follow are written as they are; what follows sees the noised ones.
        num_frames: 1 + 4k frames, with --window any number; 1 is an image. What the model was
            trained on if left out, 49 for a published one.
        window: Frames at once, 1 + 4k: a longer clip is made window by window.
        height: Pixels, divisible by 8.
        width: Pixels, divisible by 8.
        steps: Steps of the sampler; 50 for clips of a published model.
        guidance: Classifier-free guidance, 1 is off.
        shift: Timestep shift of the sampler, 1 is none.
        temperature: Of the draw of codes; 1 is the model's own law, less is cleaner, less varied.
        solver: How codes move between steps; exact has no error of time, euler is the paper's.
        clock: When steps start; entropy takes equal falls of the held-out loss.
        motion: Asked motion, px/s at 256 px width; 9 for clips of a published model.
        negative: What the clip shall not show.
        seed: Makes the clip repeatable; drawn and printed if left out.
        device: Where to run, such as cpu or cuda.
        quiet: Print the path alone.

    Raises:
        UrsaError: If an argument does not fit, or a model or file cannot be read.
    """
    _check_files(out, image=image, last_image=last_image, video=video)
    sizes = {
        "--num-frames": num_frames,
        "--window": window,
        "--given-frames": given_frames,
        "--height": height,
        "--width": width,
    }
    _check_numbers(sizes, seed)
    _check_given(out, sizes, noise, image=image, video=video)
    import torch

    from ursa.generation import SampleDefaults, UrsaPipeline, slide_window
    from ursa.generation.limits import check_texts

    check_device(device)
    _check_sampler(steps, guidance, shift, temperature, noise)
    check_texts("the prompt", [prompt])
    check_texts("--negative", [negative or ""])
    first, last = _open_image("--image", image), _open_image("--last-image", last_image)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    started = time.perf_counter()
    with model_directory(model) as directory:
        _check_sizes(directory, sizes)
        _check_memory(directory, sizes, device)
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    pipeline.set_progress_bar_config(disable=True if quiet else None, desc="steps")
    defaults, stride = pipeline.defaults, pipeline.visual_tokenizer.temporal_stride
    if defaults == SampleDefaults() and out.suffix.lower() != ".png":
        # published directories name nothing: what their authors use for clips
        defaults = defaults.model_copy(update={"num_frames": _PUBLISHED_FRAMES})
        steps, motion = steps or _PUBLISHED_STEPS, _PUBLISHED_MOTION if motion is None else motion
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
    given = None if video is None else _read_video(video, overlap, defaults, (height, width))
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

    with _options_named():
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
    count = f"{len(frames)} frame{'s' if len(frames) > 1 else ''}"
    print(f"{out}  {written}{count}, seed {seed}, {seconds:.1f} s")


@contextmanager
def _options_named() -> Iterator[None]:
    """Let an error that names an argument of the library name the option that sets it."""
    try:
        yield
    except ConfigError as error:
        pattern = rf"^(?:{'|'.join(_OPTIONS)})\b|\bwindow_frames\b"
        text = re.sub(pattern, lambda found: _OPTIONS[found[0]], str(error))
        raise ConfigError(text) from error


def _check_sizes(directory: Path, sizes: dict[str, int | None]) -> None:
    """Check sizes against the strides of a local model, before its weights are read."""
    strides = strides_of(directory)
    if strides is None:
        return
    num_frames, window = sizes["--num-frames"], sizes["--window"]
    if window is not None and num_frames is not None:
        # the shorter of the two is what the model makes at once; windows add up to any number
        sizes = sizes | {"--num-frames" if window < num_frames else "--window": None}
    for name, size in sizes.items():
        is_side = name in {"--height", "--width"}
        stride = strides[1] if is_side else strides[0]
        if size is not None and (hint := size_hint(size, stride, stride if is_side else 1)):
            fits = f"divisible by {stride}" if is_side else f"1 + {stride}k"
            raise ConfigError(f"{name} must be {fits}, got {size}; {hint}")


def _check_memory(directory: Path, sizes: dict[str, int | None], device: str) -> None:
    """Check sizes against the memory of the device, before the weights are read."""
    strides = strides_of(directory)
    if strides is None:
        return
    import torch

    from ursa.generation.files import sample_defaults
    from ursa.generation.limits import check_frames, check_memory
    from ursa.model.config import read_transformer_config
    from ursa.model.size import Clip, latent_shape

    defaults = sample_defaults(directory)
    total = sizes["--num-frames"] or defaults.num_frames
    height, width = sizes["--height"] or defaults.height, sizes["--width"] or defaults.width
    with _options_named():
        frames = min(sizes["--window"] or total, total)
        # of a last window that is shorter the surplus is made too
        frames += -(frames - 1) % strides[0]
        shape = latent_shape(
            frames, height, width, temporal_stride=strides[0], spatial_stride=strides[1]
        )
    check_frames(max(total, sizes["--given-frames"] or 0), height, width)
    check_memory(
        read_transformer_config(directory / "transformer"),
        Clip(shape, defaults.max_prompt_length),
        num_videos=1,
        frame_px=(frames, height, width),
        is_guided=False,
        bytes_per_value=2,
        device=torch.device(device),
    )


def _check_files(out: Path, **inputs: Path | None) -> None:
    if out.suffix.lower() not in {".mp4", ".gif", ".png"}:
        raise ConfigError(f"--out must end in .mp4, .gif or .png, got {out.name!r}")
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a directory; name a file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {out.parent}; make it first")
    for name, path in inputs.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no file {path}")


def _check_numbers(sizes: dict[str, int | None], seed: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must be from 0 to 2**63 - 1, got {seed}")


def _check_given(
    out: Path, sizes: dict[str, int | None], noise: float, **files: Path | None
) -> None:
    """Check that frames that are given leave something to make."""
    given = [f"--{name}" for name, path in files.items() if path is not None]
    if len(given) > 1:
        raise ConfigError("--image and --video both give the first frames; leave one out")
    if noise > 0 and not given and sizes["--window"] is None:
        raise ConfigError("--noise is for given frames: give --image or --video, or leave it out")
    if sizes["--given-frames"] is not None and not files["video"] and sizes["--window"] is None:
        raise ConfigError("--given-frames is for --video or --window; leave it out")
    is_one_frame = sizes["--num-frames"] == 1 or (
        out.suffix.lower() == ".png" and sizes["--num-frames"] is None
    )
    if given and is_one_frame and noise == 0:
        raise ConfigError(
            f"a single frame holds what {given[0]} gives: write an .mp4 or .gif of more frames, or "
            "let the frame change with --noise"
        )


def _check_sampler(
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    temperature: float | None,
    noise: float,
) -> None:
    from ursa.generation.arguments import check_sampler

    with _options_named():
        check_sampler(
            num_inference_steps=1 if steps is None else steps,
            guidance_scale=1.0 if guidance is None else guidance,
            flow_shift=1.0 if shift is None else shift,
            temperature=1.0 if temperature is None else temperature,
            cond_noise_scale=noise,
        )


def _open_image(option: str, path: Path | None) -> "Image | None":
    if path is None:
        return None
    from ursa.generation.limits import open_picture

    return open_picture(path, option)


def _read_video(
    path: Path, num_frames: int, defaults: "SampleDefaults", size: tuple[int, int]
) -> "np.ndarray":
    from ursa.config import load_config
    from ursa.video.foreign import read_last_frames

    try:
        return read_last_frames(
            path,
            num_frames,
            fps=defaults.fps,
            height_px=size[0],
            width_px=size[1],
            limits=load_config("tiny").ingestion,
        )
    except VideoDecodeError as error:
        raise VideoDecodeError(
            f"--video: {error}; give another video, or fewer --given-frames"
        ) from error


def _write_frames(out: Path, frames: "np.ndarray", fps: float) -> None:
    from PIL import Image

    from ursa.video.decode import write_gif, write_video

    try:
        if out.suffix.lower() == ".png":
            Image.fromarray(frames[0]).save(out)
        elif out.suffix.lower() == ".gif":
            write_gif(out, frames, fps)
        else:
            write_video(out, frames, fps)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written ({error})") from error
