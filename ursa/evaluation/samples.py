"""Samples to look at: the most frequent captions of training, from noise and from a first frame."""

import io
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ursa import storage
from ursa.artifacts import SelectedClip
from ursa.config import RunConfig
from ursa.data.addresses import address_seed
from ursa.data.clips import clip_windows
from ursa.evaluation.windows import read_window
from ursa.generation import UrsaPipeline
from ursa.video.decode import ReadFrames, read_frames_at, write_gif, write_video

STRIP_FILE = "strip.png"
_STRIP_COLUMNS = 3
_STRIP_ZOOM = 2


class Sample(NamedTuple):
    """A generated clip and the real one of the same caption.

    Attributes:
        name: "t2v-<i>", or "i2v-<i>" where the first frame was given.
        prompt: The caption.
        noise: Decoded random codes, uint8 (F, H, W, 3).
        generated: uint8 (F, H, W, 3).
        real: uint8 (F, H, W, 3).
    """

    name: str
    prompt: str
    noise: np.ndarray
    generated: np.ndarray
    real: np.ndarray


def draw_samples(
    pipeline: UrsaPipeline,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames = read_frames_at,
) -> list[Sample]:
    """Sample training captions from noise, and again from a given first frame.

    Every sample has its own generator, seeded by its name: the same prompts and seeds for every
    model of the same data.

    Args:
        pipeline: The model.
        selected: Clips; the most frequent training captions are taken.
        config: The run; `evaluation.sampling`, `tokenization` and the seed matter.
        read: Reads frames of a local file.

    Returns:
        Two samples a caption, from noise first.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    prompts = _frequent_captions(selected, config, read)
    noise_shape = (
        1 + (config.tokenization.num_frames - 1) // pipeline.visual_tokenizer.temporal_stride,
        config.tokenization.height_px // pipeline.visual_tokenizer.spatial_stride,
        config.tokenization.width_px // pipeline.visual_tokenizer.spatial_stride,
    )
    samples = []
    for index, (prompt, real) in enumerate(prompts):
        for mode in ("t2v", "i2v"):
            seed = address_seed(config.seed, "sample", mode, prompt)
            generator = torch.Generator().manual_seed(seed)
            frames = pipeline(
                prompt,
                image=real[0] if mode == "i2v" else None,
                generator=generator,
                output_type="np",
            ).frames[0]
            codes = torch.randint(
                len(pipeline.visual_tokenizer.codebook),
                (1, *noise_shape),
                generator=torch.Generator().manual_seed(seed),
            )
            noise = pipeline.visual_tokenizer.decode(codes)[0]
            samples.append(Sample(f"{mode}-{index}", prompt, noise, frames, real))
    return samples


def strip(samples: Sequence[Sample]) -> Image.Image:
    """Draw one row a sample: noise, then frames of the sample, then of the real clip.

    Args:
        samples: At least one, all of one size.

    Returns:
        RGB picture at twice the size of the frames.
    """
    rows = []
    for sample in samples:
        places = np.linspace(0, len(sample.real) - 1, _STRIP_COLUMNS).round().astype(int)
        cells = [sample.noise[0], *sample.generated[places], *sample.real[places]]
        gap = np.full((cells[0].shape[0], 4, 3), 255, np.uint8)
        parts = [cells[0], gap, *cells[1 : 1 + _STRIP_COLUMNS], gap, *cells[1 + _STRIP_COLUMNS :]]
        rows += [
            np.concatenate(parts, axis=1),
            np.full((4, sum(p.shape[1] for p in parts), 3), 255),
        ]
    picture = Image.fromarray(np.concatenate(rows).astype(np.uint8))
    size = (picture.width * _STRIP_ZOOM, picture.height * _STRIP_ZOOM)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _frequent_captions(
    selected: Sequence[SelectedClip], config: RunConfig, read: ReadFrames
) -> list[tuple[str, np.ndarray]]:
    """Return the captions with most training samples, each with the frames of its middle one.

    A sample that cannot be read gives way to the next one.
    """
    windows: dict[str, list[tuple[SelectedClip, list[int]]]] = {}
    for item in selected:
        if item.split == "train":
            for _, indices in clip_windows(item.clip, config.tokenization):
                windows.setdefault(item.clip.caption or "", []).append((item, indices))
    frequency = Counter({caption: len(found) for caption, found in windows.items()})
    found: list[tuple[str, np.ndarray]] = []
    for caption, _ in sorted(frequency.items(), key=lambda entry: (-entry[1], entry[0])):
        middle = len(windows[caption]) // 2
        for item, indices in (*windows[caption][middle:], *windows[caption][:middle]):
            frames = read_window(item, indices, config, read)
            if frames is not None:
                found.append((caption, frames))
                break
        if len(found) == config.evaluation.sampling.num_prompts:
            break
    return found


def write_samples(samples: Sequence[Sample], samples_uri: str, *, fps: float) -> tuple[str, ...]:
    """Write mp4 and gif of every sample, the prompts and the strip; return the file names."""
    with storage.scratch_directory("samples") as folder:
        for sample in samples:
            write_video(folder / f"{sample.name}.mp4", sample.generated, fps)
            write_gif(folder / f"{sample.name}.gif", sample.generated, fps)
        prompts = "".join(f"{sample.name}\t{sample.prompt}\n" for sample in samples)
        (folder / "prompts.tsv").write_text(prompts, "utf-8")
        if samples:
            buffer = io.BytesIO()
            strip(samples).save(buffer, "PNG")
            (folder / STRIP_FILE).write_bytes(buffer.getvalue())
        hashes = storage.upload_directory(folder, samples_uri)
    return tuple(hashes)
