"""Metrics of drawn clips: from prompts, from a held-out first frame, and of asked motion.

Every clip has a generator of its own, seeded by what it is: all models of the same data and seed
are drawn with the same prompts, first frames and random numbers, and compared clip by clip.

References:
    Energy distance: Szekely and Rizzo, J. Stat. Plan. Inference 143 (2013).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ursa.artifacts import Measure, MeasuredCases, Measurements, SelectedClip
from ursa.config import ModelFilesConfig, RunConfig
from ursa.data.addresses import address_seed
from ursa.data.clips import clip_windows
from ursa.evaluation.clips import ClipValues, measure_clip, measure_motion, psnr, ssim
from ursa.evaluation.features import (
    frechet_distance,
    latents,
    network_features,
    reduce_features,
    rms_distances,
    statistics,
    thumbnail,
)
from ursa.evaluation.measures import group_cases, join, mean_measure, plain_measure
from ursa.evaluation.windows import Window, group_windows, iter_windows
from ursa.generation import UrsaPipeline
from ursa.video.decode import ReadFrames, read_frames_at

logger = logging.getLogger(__name__)

LEAST_FRAMES = 3
"""Shorter clips have no motion to measure."""
_REFERENCE_CLIPS = 32
"""Training windows whose features stand for real clips."""


class Draw(NamedTuple):
    """A clip to draw.

    Attributes:
        prompt: Its prompt.
        seed: Of its generator.
        image: First frame, uint8 (H, W, 3), if it is given.
    """

    prompt: str
    seed: int
    image: np.ndarray | None = None


class Drawn(NamedTuple):
    """Drawn clips.

    Attributes:
        codes: Shape (N, T, h, w), int64.
        frames: uint8 (N, F, H, W, 3).
    """

    codes: Tensor
    frames: np.ndarray


class _Real(NamedTuple):
    """Real clips that drawn ones are compared with.

    Attributes:
        thumbnails: Of the training windows, shape (M, D).
        captions: Of the same windows.
        some: Frames of some of them, evenly spread.
        held_out: Held-out windows.
    """

    thumbnails: np.ndarray
    captions: list[str]
    some: list[np.ndarray]
    held_out: list[Window]

    def nearest(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Return the distance of clips to the nearest training window, levels, shape (N,)."""
        found = rms_distances(np.stack([thumbnail(frames) for frames in clips]), self.thumbnails)
        return np.asarray(found.min(axis=1))


def measure_drawn(
    pipeline: UrsaPipeline,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames = read_frames_at,
) -> Measurements:
    """Draw clips and measure them.

    Args:
        pipeline: The model.
        selected: Clips: prompts and nearest clips are from training, first frames from held-out
            ones.
        config: The run; `evaluation`, `tokenization` and the seed matter.
        read: Reads frames of a local file.

    Returns:
        The metrics of docs/evaluation.md; without held-out clips none of `i2v_*` and `real_*`;
        nothing of clips of fewer than three frames.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if config.tokenization.num_frames < LEAST_FRAMES:
        logger.warning("clips of %d frames are not measured", config.tokenization.num_frames)
        return Measurements()
    real = _read_real(selected, config, read)
    parts = []
    if real.held_out:
        parts += [_real_measures(real, config), _continued(pipeline, real.held_out, config)]
    prompts = frequent_prompts(selected, config)
    if prompts:
        parts.append(_from_prompts(pipeline, prompts, real, config))
    if prompts and len(config.evaluation.clips.asked_motion) > 1:
        parts.append(_asked_motion(pipeline, prompts, config))
    return join(*parts)


def frequent_prompts(selected: Sequence[SelectedClip], config: RunConfig) -> list[str]:
    """Return the captions with most training windows, most frequent first.

    Args:
        selected: Clips.
        config: The run; `evaluation.clips.num_prompts` and `tokenization` matter.
    """
    counts = Counter(
        item.clip.caption or ""
        for item in selected
        if item.split == "train"
        for _ in clip_windows(item.clip, config.tokenization)
    )
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [caption for caption, _ in ordered[: config.evaluation.clips.num_prompts]]


def draw_clips(
    pipeline: UrsaPipeline,
    draws: Sequence[Draw],
    config: RunConfig,
    *,
    num_steps: int | None = None,
    motion: float | None = None,
) -> Drawn:
    """Draw clips; each is the same whatever others are drawn beside it.

    Args:
        pipeline: The model.
        draws: At least one; all with a first frame, or none.
        config: The run; `tokenization` and the batch size of `evaluation` matter.
        num_steps: Steps of the sampler; the model's own if None.
        motion: Asked motion, px/s at 256 px width.
    """
    codes = []
    size = config.evaluation.batch_size
    logger.info(
        "drawing %d clips%s%s%s",
        len(draws),
        " from prompts" if draws[0].image is None else " from first frames",
        "" if num_steps is None else f", {num_steps} steps",
        "" if motion is None else f", asked motion {motion:g} px/s",
    )
    for start in range(0, len(draws), size):
        batch = draws[start : start + size]
        images = [draw.image for draw in batch if draw.image is not None]
        codes.append(
            pipeline(
                [draw.prompt for draw in batch],
                image=images or None,
                height=config.tokenization.height_px,
                width=config.tokenization.width_px,
                num_frames=config.tokenization.num_frames,
                num_inference_steps=num_steps,
                motion_score=motion,
                generator=[torch.Generator().manual_seed(draw.seed) for draw in batch],
                output_type="latent",
            ).frames.cpu()
        )
    joined = torch.cat(codes)
    frames = pipeline.visual_tokenizer.decode(joined, batch_size=size)
    return Drawn(joined, np.asarray(frames))


def _read_real(selected: Sequence[SelectedClip], config: RunConfig, read: ReadFrames) -> _Real:
    settings = config.evaluation.clips
    thumbnails, captions, some = [], [], []
    every = max(1, settings.max_train_windows // _REFERENCE_CLIPS)
    windows = iter_windows(selected, "train", config, read, limit=settings.max_train_windows)
    for number, window in enumerate(windows):
        thumbnails.append(thumbnail(window.frames))
        captions.append(window.caption)
        if number % every == 0:
            some.append(window.frames)
    held_out = iter_windows(selected, "validation", config, read, limit=settings.num_windows)
    return _Real(np.array(thumbnails), captions, some, list(held_out))


def _value_measures(
    prefix: str, values: Sequence[ClipValues], group: MeasuredCases
) -> list[Measure]:
    columns = zip(ClipValues._fields, zip(*values, strict=True), strict=True)
    return [mean_measure(f"{prefix}_{name}", column, group) for name, column in columns]


def _real_measures(real: _Real, config: RunConfig) -> Measurements:
    """Measure held-out windows as they are: what the numbers of drawn clips mean."""
    group = group_windows("held_out", real.held_out, config.tokenization)
    clips = [window.frames for window in real.held_out]
    values = [measure_clip(frames, config.tokenization.fps) for frames in clips]
    measures = _value_measures("real", values, group)
    if len(real.thumbnails):
        nearest = real.nearest(clips)
        measures.append(mean_measure("real_nearest_train_distance", list(nearest), group))
    return Measurements(measures=tuple(measures), cases=(group,))


def _continued(
    pipeline: UrsaPipeline, windows: Sequence[Window], config: RunConfig
) -> Measurements:
    """Measure image-to-video: held-out windows from their first frame on."""
    group = group_windows("held_out", windows, config.tokenization)
    draws = [
        Draw(
            window.caption,
            address_seed(config.seed, "evaluation", "i2v", window.name),
            window.frames[0],
        )
        for window in windows
    ]
    drawn = draw_clips(pipeline, draws, config)
    values = [measure_clip(frames, config.tokenization.fps) for frames in drawn.frames]
    measures = _value_measures("i2v", values, group)
    size = config.evaluation.batch_size
    real = np.stack([window.frames for window in windows])
    codes = pipeline.visual_tokenizer.encode(real, batch_size=size).cpu()
    is_equal = (drawn.codes == codes).double().mean((2, 3))  # (N, T)
    first = (real[:, :1], drawn.frames[:, :1])
    later = (real[:, 1:], drawn.frames[:, 1:])
    still = (real[:, 1:], np.broadcast_to(real[:, :1], real[:, 1:].shape))
    for name, pair in (("i2v_first_frame", first), ("i2v_later", later), ("still_later", still)):
        measures += _likeness(name, *pair, group)
    measures.append(mean_measure("i2v_first_token_accuracy", is_equal[:, 0].tolist(), group))
    if is_equal.shape[1] > 1:
        accuracy = is_equal[:, 1:].mean(1).tolist()
        measures.append(mean_measure("i2v_later_token_accuracy", accuracy, group))
    for count in config.evaluation.clips.fewer_steps:
        fewer = draw_clips(pipeline, draws, config, num_steps=count)
        measures += _likeness(f"steps{count}_i2v_later", real[:, 1:], fewer.frames[:, 1:], group)
    return Measurements(measures=tuple(measures))  # the group is that of the real windows


def _likeness(
    name: str, real: np.ndarray, drawn: np.ndarray, group: MeasuredCases
) -> list[Measure]:
    pairs = list(zip(real, drawn, strict=True))
    return [
        mean_measure(f"{name}_psnr", [psnr(*pair) for pair in pairs], group),
        mean_measure(f"{name}_ssim", [ssim(*pair) for pair in pairs], group),
    ]


def _prompt_draws(prompts: Sequence[str], config: RunConfig) -> tuple[list[Draw], MeasuredCases]:
    """Return the draws of all prompts, seeds of a prompt side by side, and their names."""
    count = config.evaluation.clips.seeds_per_prompt
    draws = [
        Draw(prompt, address_seed(config.seed, "evaluation", "t2v", prompt, str(number)))
        for prompt in prompts
        for number in range(count)
    ]
    names = [f"{prompt} #{number}" for prompt in prompts for number in range(count)]
    return draws, group_cases("t2v", names, (("prompt", [draw.prompt for draw in draws]),))


def _from_prompts(
    pipeline: UrsaPipeline, prompts: Sequence[str], real: _Real, config: RunConfig
) -> Measurements:
    """Measure text-to-video against training windows and with other seeds."""
    fps = config.tokenization.fps
    draws, group = _prompt_draws(prompts, config)
    clips = draw_clips(pipeline, draws, config).frames
    values = [measure_clip(frames, fps) for frames in clips]
    measures = _value_measures("t2v", values, group)
    groups = [group]
    if not len(real.thumbnails):
        return Measurements(measures=tuple(measures), cases=tuple(groups))
    nearest = real.nearest(clips)
    measures.append(mean_measure("t2v_nearest_train_distance", list(nearest), group))
    if real.held_out:
        usual = real.nearest([window.frames for window in real.held_out]).mean()
        ratios = list(nearest / max(usual, 1e-9))
        measures.append(mean_measure("t2v_nearest_train_ratio", ratios, group))
    if len(clips) > 1 and len(real.some) > 1:
        measures.append(_frechet_measure(pipeline, clips, values, real, config))
    by_prompt = _RealByPrompt.of(prompts, real)
    if by_prompt.prompts and config.evaluation.clips.seeds_per_prompt > 1:
        prompt_group = group_cases("prompts", by_prompt.prompts, ())
        groups.append(prompt_group)
        drawn = by_prompt.compare(prompts, clips)
        measures += [
            mean_measure("t2v_diversity", drawn.within, prompt_group),
            mean_measure("real_diversity", by_prompt.within, prompt_group),
            mean_measure("t2v_energy_distance", drawn.energy, prompt_group),
        ]
        for count in config.evaluation.clips.fewer_steps:
            fewer = draw_clips(pipeline, draws, config, num_steps=count).frames
            name = f"steps{count}_t2v_energy_distance"
            energy = by_prompt.compare(prompts, fewer).energy
            measures.append(mean_measure(name, energy, prompt_group))
    return Measurements(measures=tuple(measures), cases=tuple(groups))


class _Compared(NamedTuple):
    """Of each prompt the mean distance of two of its clips, and their distance from real ones."""

    within: list[float]
    energy: list[float]


class _RealByPrompt(NamedTuple):
    """Training windows of each prompt that has two of them or more, and their mean distance."""

    prompts: list[str]
    rows: list[np.ndarray]
    within: list[float]

    @classmethod
    def of(cls, prompts: Sequence[str], real: _Real) -> Self:
        captions = np.array(real.captions)
        known = [prompt for prompt in prompts if (captions == prompt).sum() > 1]
        rows = [real.thumbnails[captions == prompt] for prompt in known]
        return cls(known, rows, [_mean_pair(rms_distances(each, each)) for each in rows])

    def compare(self, prompts: Sequence[str], clips: np.ndarray) -> _Compared:
        """Compare clips with the windows of their prompt; those of a prompt lie side by side."""
        count = len(clips) // len(prompts)
        found = _Compared([], [])
        for prompt, real, within in zip(self.prompts, self.rows, self.within, strict=True):
            place = prompts.index(prompt) * count
            rows = np.stack([thumbnail(frames) for frames in clips[place : place + count]])
            own = _mean_pair(rms_distances(rows, rows))
            found.within.append(own)
            found.energy.append(2 * float(rms_distances(rows, real).mean()) - own - within)
        return found


def _mean_pair(distances: np.ndarray) -> float:
    """Return the mean distance of two clips that are not the same one."""
    return float(distances[np.triu_indices(len(distances), 1)].mean())


def _frechet_measure(
    pipeline: UrsaPipeline,
    clips: np.ndarray,
    values: Sequence[ClipValues],
    real: _Real,
    config: RunConfig,
) -> Measure:
    features = config.evaluation.clips.features
    if isinstance(features, ModelFilesConfig):
        name, both = "network", network_features(features, [*clips, *real.some])
        rows, reference = both[: len(clips)], both[len(clips) :]
    elif features == "latents":
        name, rows = features, latents(pipeline.visual_tokenizer, list(clips))
        reference = latents(pipeline.visual_tokenizer, real.some)
    else:
        name = features
        rows = np.stack([statistics(*pair) for pair in zip(clips, values, strict=True)])
        fps = config.tokenization.fps
        measured = [(frames, measure_clip(frames, fps)) for frames in real.some]
        reference = np.stack([statistics(*pair) for pair in measured])
    reference, rows = reduce_features(reference, rows)
    # without interval: few clips make it larger, and a resample holds fewer different ones
    return plain_measure(f"t2v_frechet_{name}", frechet_distance(rows, reference))


def _asked_motion(
    pipeline: UrsaPipeline, prompts: Sequence[str], config: RunConfig
) -> Measurements:
    """Measure whether more motion is made where more is asked: same prompt, same random numbers."""
    asked = sorted(config.evaluation.clips.asked_motion)
    draws, group = _prompt_draws(prompts, config)
    produced = np.array(
        [
            [
                measure_motion(frames, config.tokenization.fps)
                for frames in draw_clips(pipeline, draws, config, motion=score).frames
            ]
            for score in asked
        ]
    )
    measures = [
        mean_measure(f"asked{score:g}_motion", list(row), group)
        for score, row in zip(asked, produced, strict=True)
    ]
    adherence = [rank_correlation(column) for column in produced.T]
    measures.append(mean_measure("motion_adherence", adherence, group))
    return Measurements(measures=tuple(measures))  # the group is that of the clips from prompts


def rank_correlation(values: np.ndarray) -> float:
    """Return Spearman's correlation of values with their order.

    Args:
        values: Shape (N,), N > 1; in the order in which they are to rise.

    Returns:
        In [-1, 1]; 0 if all are equal.
    """
    from scipy.stats import rankdata  # noqa: PLC0415  (half a second)

    ranks = rankdata(values)
    if np.ptp(ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
