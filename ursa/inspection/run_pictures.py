"""Pictures of a run report: curves, memory, reconstructions, and how tokens settle."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ursa.artifacts import SelectedClip
from ursa.config import RunConfig
from ursa.data.clips import clip_windows, local_clip
from ursa.errors import VideoDecodeError
from ursa.generation import UrsaPipeline
from ursa.tokenizers.visual import VisualTokenizer, psnr_db
from ursa.video.decode import FrameSize, ReadFrames

Curve = Sequence[tuple[int, float]]
"""(step, value), in the order of the steps."""

MAX_COLUMNS = 8
_GAP_PX = 3
_COLOURS = {"train/loss": "#9aa4b2", "val/loss": "#2a7f62"}


def loss_curves(stages: Mapping[str, Mapping[str, Curve]]) -> bytes | None:
    """Draw the training and the held-out loss of each stage.

    Args:
        stages: Curves by metric name, by stage in their order.

    Returns:
        PNG; None if there is no curve.
    """
    shown = {name: curves for name, curves in stages.items() if curves.get("train/loss")}
    if not shown:
        return None
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(panels, shown.items(), strict=True):
        for key, colour in _COLOURS.items():
            _draw(axes, curves.get(key, ()), key, colour, marked=key.startswith("val"))
        axes.set(title=name, xlabel="step")
    panels[0].set_ylabel("cross-entropy, nats")
    panels[-1].legend()
    return _png(figure)


def memory_curves(stages: Mapping[str, Mapping[str, Curve]]) -> bytes | None:
    """Draw the most memory that worker 0 has held, by step over all stages.

    Args:
        stages: Curves by metric name, by stage in their order.

    Returns:
        PNG; None if there is no curve.
    """
    key = "train/peak_memory_bytes"
    if not any(curves.get(key) for curves in stages.values()):
        return None
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    axes, before = figure.subplots(), 0
    for name, curves in stages.items():
        curve = [(before + step, value / 2**20) for step, value in curves.get(key, ())]
        _draw(axes, curve, name, None, marked=len(curve) < 2)
        before = curve[-1][0] if curve else before
    axes.set(xlabel="step, one stage after another", ylabel="MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _png(figure)


def _draw(axes: Axes, curve: Curve, label: str, colour: str | None, *, marked: bool) -> None:
    if curve:
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=label, color=colour, marker="o" if marked else None, ms=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


class Reconstruction(NamedTuple):
    """A window of a clip, as it is and as the visual tokenizer gives it back.

    Attributes:
        name: The clip.
        split: "train" or "validation".
        psnr_db: Of all its frames.
        picture: Frames of the window above those of the reconstruction, RGB (H, W, 3), uint8.
    """

    name: str
    split: str
    psnr_db: float
    picture: np.ndarray


def reconstructions(
    tokenizer: VisualTokenizer,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames,
    *,
    each: int,
) -> list[Reconstruction]:
    """Put windows of clips through the visual tokenizer.

    Args:
        tokenizer: The visual tokenizer.
        selected: Clips; the middle window of some of each split is taken.
        config: The run; `tokenization` matters.
        read: Reads frames of a local file.
        each: How many of each split; of clips that cannot be read there is none.

    Returns:
        Held-out ones first.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    size = FrameSize(config.tokenization.height_px, config.tokenization.width_px)
    found = []
    for split in ("validation", "train"):
        clips = [item.clip for item in selected if item.kept and item.split == split]
        places = np.linspace(0, len(clips) - 1, min(each, len(clips))).round().astype(int)
        for clip in (clips[place] for place in places):
            windows = list(clip_windows(clip, config.tokenization))
            if not windows:
                continue
            try:
                with local_clip(clip) as path:
                    (real,) = read(path, windows[len(windows) // 2][1], [size])
            except VideoDecodeError:
                continue
            made = tokenizer.decode(tokenizer.encode(real[None]))[0]
            shown = np.linspace(0, len(real) - 1, min(MAX_COLUMNS, len(real))).round().astype(int)
            rows = [np.concatenate(list(frames[shown]), axis=1) for frames in (real, made)]
            gap = np.full((_GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
            picture = np.concatenate([rows[0], gap, rows[1]])
            found.append(Reconstruction(clip.source_uri, split, psnr_db(real, made), picture))
    return found


class Flips(NamedTuple):
    """How the tokens of a clip settle while it is drawn.

    Attributes:
        codes: After each step, shape (steps, T, h, w).
        times: t at which each step begins.
    """

    codes: Tensor
    times: tuple[float, ...]


def draw_with_codes(pipeline: UrsaPipeline, prompt: str, seed: int) -> Flips:
    """Draw a clip and keep its tokens after each step.

    Args:
        pipeline: The model.
        prompt: Its prompt.
        seed: Of its generator.
    """
    codes, times = [], []

    def keep(_: UrsaPipeline, _step: int, t: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
        codes.append(state["latents"][0].cpu().clone())
        times.append(float(t))
        return {}

    pipeline(
        prompt,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=keep,
    )
    return Flips(torch.stack(codes), tuple(times))


def flip_strip(tokenizer: VisualTokenizer, flips: Flips) -> bytes:
    """Draw the middle frame on its way, and below which of its tokens have changed.

    Args:
        tokenizer: Turns codes into frames.
        flips: The codes.

    Returns:
        PNG: in the upper row the frame after some of the steps, the last among them; in the lower
        how often each token of its latent frame has changed since the column before.
    """
    num_steps = len(flips.codes)
    columns = np.unique(np.linspace(0, num_steps - 1, min(MAX_COLUMNS, num_steps)).round())
    shown = [int(column) for column in columns]
    frame = flips.codes.shape[1] // 2
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    panels = figure.subplots(2, MAX_COLUMNS)
    changed = flips.codes[1:, frame] != flips.codes[:-1, frame]
    counts = [changed[first:last].sum(0) for first, last in itertools.pairwise(shown)]
    most = max([1, *(int(count.max()) for count in counts)])
    for column, step in enumerate(shown):
        frames = tokenizer.decode(flips.codes[step : step + 1])[0]
        panels[0, column].imshow(frames[len(frames) // 2])
        panels[0, column].set_title(f"step {step + 1}\nfrom t {flips.times[step]:.2f}", fontsize=8)
        if column:
            panels[1, column].imshow(counts[column - 1], vmin=0, vmax=most, cmap="magma")
            share = float((counts[column - 1] > 0).float().mean())
            panels[1, column].set_xlabel(f"{share:.0%} flipped", fontsize=8)
    for axes in panels.ravel():
        axes.set(xticks=[], yticks=[])
    for axes in (panels[1, 0], *panels[:, len(shown) :].ravel()):
        axes.set_axis_off()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()
