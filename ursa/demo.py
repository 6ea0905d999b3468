"""A page to try a model in the browser: text, first frame, motion, seed and steps go in.

The clip comes out, with the frames on the way from noise to it. Needs the extra `demo` (Gradio).
"""

import html
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ursa.errors import ConfigError, UrsaError
from ursa.generation import UrsaPipeline
from ursa.model.size import MAX_SIDE_PX
from ursa.texts import printable
from ursa.video.encode import write_video

if TYPE_CHECKING:
    import gradio

_HOST = "127.0.0.1"
_MAX_PREVIEWS = 8
_NUM_STRIP_FRAMES = 4
_MAX_PROMPT_CHARACTERS = 2000
_MAX_MOTION_PX_S = 100
_PUBLISHED_NUM_FRAMES = 49
_PUBLISHED_MOTION_PX_S = 9.0
"""What published models are asked for; their directories do not say it."""
_MAX_WAITING = 8
_MAX_UPLOAD_BYTES = 64 << 20
_WAY = "From noise to the clip"
_CACHE_S = 3600


@dataclass(frozen=True, slots=True)
class Preview:
    """What the codes look like after a step.

    Attributes:
        step: Number of steps done, from 1.
        strip: Some frames side by side, uint8 (H, n W, 3).
    """

    step: int
    strip: np.ndarray


def preview_steps(num_steps: int) -> frozenset[int]:
    """Return the steps, from 1, after which frames are decoded: eight at most, the last one too.

    Args:
        num_steps: Steps of the sampler, >= 1.
    """
    count = min(num_steps, _MAX_PREVIEWS)
    return frozenset(round(index * num_steps / count) for index in range(1, count + 1))


def draw_with_previews(
    pipeline: UrsaPipeline, *, num_steps: int, **options: Any
) -> Iterator[Preview | np.ndarray]:
    """Generate one clip in a thread of its own and yield the frames on the way.

    Whoever closes the iterator early stops the sampler after its step.

    Args:
        pipeline: The model; one clip at a time.
        num_steps: Steps of the sampler, >= 1.
        options: What `UrsaPipeline` is called with besides.

    Yields:
        Previews, then the clip, uint8 (F, H, W, 3).

    Raises:
        ConfigError: If an option does not fit.
    """
    shown = preview_steps(num_steps)
    previews: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def on_step_end(
        pipe: UrsaPipeline, step: int, _t: float, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pipe.interrupt = stopped.is_set()
        if step + 1 in shown and not pipe.interrupt:
            frames = pipe.visual_tokenizer.decode(state["latents"][:1])[0]
            previews.put(Preview(step + 1, _strip(frames)))
        return {}

    def draw() -> np.ndarray:
        try:
            frames: np.ndarray = pipeline(
                num_inference_steps=num_steps,
                output_type="np",
                callback_on_step_end=on_step_end,
                **options,
            ).frames[0]
        finally:
            previews.put(None)
        return frames

    with ThreadPoolExecutor(1, thread_name_prefix="sampler") as pool:
        clip: Future[np.ndarray] = pool.submit(draw)
        try:
            while (preview := previews.get()) is not None:
                yield preview
            yield clip.result()
        finally:
            stopped.set()


def open_page(pipeline: UrsaPipeline, folder: Path) -> "gradio.Blocks":
    """Return the page of a model.

    Args:
        pipeline: The model; it makes one clip at a time, eight requests may wait.
        folder: Where the clips are written; Gradio copies what it shows.

    Raises:
        ConfigError: If Gradio is not installed.
    """
    gr = _import_gradio()
    defaults, stride = pipeline.defaults, pipeline.visual_tokenizer.temporal_stride
    is_clip = defaults.num_frames > 1
    num_frames = defaults.num_frames if is_clip else _PUBLISHED_NUM_FRAMES

    def draw(
        prompt: str,
        image: Image.Image | None,
        motion: float,
        frames: float,
        steps: int,
        guidance: float,
        seed: float | None,
    ) -> Iterator[tuple[Any, ...]]:
        number = min(max(int(seed or 0), 0), 2**63 - 1)
        # the page sends no empty slider; a client of the API may
        steps = max(1, int(steps or defaults.num_inference_steps))
        rows: list[np.ndarray] = []
        done: list[int] = []
        started = time.perf_counter()

        def shown(text: str, result: np.ndarray | None = None) -> tuple[Any, ...]:
            label = f"{_WAY}: after steps {', '.join(map(str, done))}" if done else _WAY
            way = gr.Image(np.concatenate(rows) if rows else None, label=label)
            if result is None:
                return text, gr.skip(), gr.skip(), way
            if len(result) == 1:
                picture = gr.Image(result[0], visible=True)
                return text, gr.Video(None, visible=False), picture, way
            path = folder / f"{time.time_ns()}.mp4"
            write_video(path, result, defaults.fps)
            return text, gr.Video(path, visible=True), gr.Image(None, visible=False), way

        yield shown("starts")
        try:
            for item in draw_with_previews(
                pipeline,
                num_steps=steps,
                prompt=prompt,
                image=None if image is None else image.convert("RGB"),
                motion_score=motion,
                num_frames=int(frames or defaults.num_frames),
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(number),
            ):
                if isinstance(item, Preview):
                    rows.append(item.strip)
                    done.append(item.step)
                    yield shown(f"step {item.step} of {steps}")
                else:
                    seconds = time.perf_counter() - started
                    yield shown(f"{len(item)} frames, seed {number}, {seconds:.1f} s", item)
        except UrsaError as error:
            # the page takes it for HTML
            text = html.escape(printable(error))
            raise gr.Error(text, duration=None, print_exception=False) from error

    page: gradio.Blocks = gr.Blocks(
        title="ursa", analytics_enabled=False, delete_cache=(_CACHE_S, _CACHE_S)
    )
    with page:
        gr.Markdown(f"# ursa\nClips of {defaults.width} x {defaults.height} pixels.")
        with gr.Row():
            with gr.Column():
                inputs = [
                    gr.Textbox(
                        label="Prompt",
                        lines=2,
                        max_length=_MAX_PROMPT_CHARACTERS,
                        elem_id="prompt",
                    ),
                    gr.Image(
                        label="First frame (optional)",
                        type="pil",
                        sources=["upload", "clipboard"],
                        height=220,
                        elem_id="image",
                    ),
                    gr.Slider(
                        0,
                        max(_MAX_MOTION_PX_S, defaults.motion_score or 0),
                        value=round(defaults.motion_score or _PUBLISHED_MOTION_PX_S, 1),
                        step=0.1,
                        label="Motion, px/s at 256 px width",
                        elem_id="motion",
                    ),
                    gr.Slider(
                        1,
                        num_frames,
                        value=defaults.num_frames,
                        step=stride,
                        label="Frames",
                        elem_id="frames",
                    ),
                    gr.Slider(
                        1,
                        max(100, defaults.num_inference_steps),
                        value=defaults.num_inference_steps,
                        step=1,
                        label="Steps",
                        elem_id="steps",
                    ),
                    gr.Slider(
                        1,
                        max(15, defaults.guidance_scale),
                        value=max(1, defaults.guidance_scale),
                        step=0.1,
                        label="Guidance",
                        elem_id="guidance",
                    ),
                    gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed"),
                ]
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column():
                said = gr.Textbox(label="Result", interactive=False, elem_id="said")
                clip = gr.Video(label="Clip", loop=True, autoplay=True, elem_id="clip")
                picture = gr.Image(label="Picture", format="png", visible=False, elem_id="picture")
                way = gr.Image(label=_WAY, buttons=["download", "fullscreen"], elem_id="way")
        running = start.click(draw, inputs, [said, clip, picture, way], api_name="generate")
        stop.click(None, cancels=[running])
    page.queue(max_size=_MAX_WAITING, default_concurrency_limit=1)
    return page


def serve(pipeline: UrsaPipeline, *, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until the process is interrupted.

    Args:
        pipeline: The model.
        port: Port to listen on.
        announce: Called with the address as soon as the page is there.

    Raises:
        ConfigError: If Gradio is not installed.
        OSError: If the port is in use.
    """
    gr = _import_gradio()
    # Gradio reads what is uploaded; Pillow refuses twice as many pixels as are said here
    Image.MAX_IMAGE_PIXELS = MAX_SIDE_PX**2 // 2
    with TemporaryDirectory(prefix="ursa-demo-") as folder:
        page = open_page(pipeline, Path(folder))
        _, address, _ = page.launch(
            server_name=_HOST,
            server_port=port,
            share=False,
            max_file_size=_MAX_UPLOAD_BYTES,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            # no font is fetched from elsewhere
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        )
        announce(address)
        page.block_thread()


def _strip(frames: np.ndarray) -> np.ndarray:
    """Return some frames (F, H, W, 3) side by side."""
    count = min(len(frames), _NUM_STRIP_FRAMES)
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def _import_gradio() -> Any:
    try:
        import gradio  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError(
            "the demo page needs Gradio; Try: pip install 'ursa-pipeline[demo]'"
        ) from error
    return gradio
