"""The evaluation step: what a model does on clips it never saw, and samples to look at.

Sound without any pretrained weights: cross-entropy and accuracy by t against the untrained network
and the unigram distribution, reconstruction of the tokenizer, and the flicker of samples, which is
only read beside their dynamic degree (a frozen video does not flicker).
"""

import io
import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    CheckpointRef,
    ClipSelection,
    EvalReport,
    ExportedModel,
    LossGrid,
    SelectedClip,
    TokenDatasets,
)
from ursa.comparison import Champion, ScoresPlace, compare_with, measure
from ursa.config import RunConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.clips import clip_windows, local_clip, read_selection
from ursa.data.dataset import TokenSamples, code_counts, spread
from ursa.errors import VideoDecodeError
from ursa.gate import comparison_metrics, comparison_text, failed_gates, metric_intervals
from ursa.generation import UrsaPipeline
from ursa.model.transformer import build_transformer
from ursa.tokenizers.visual import psnr_db
from ursa.training.trainer import OnMetrics
from ursa.training.validation import (
    SETTING_PREFIX,
    copy_accuracy,
    gain_metrics,
    grid_metrics,
    settings_of,
)
from ursa.video.decode import FrameSize, ReadFrames, read_frames_at, write_gif, write_video
from ursa.video.reader import ClipReader

logger = logging.getLogger(__name__)

STRIP_FILE = "strip.png"
_STRIP_COLUMNS = 3
_STRIP_ZOOM = 2
_PSNR_WINDOWS = 32


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


def evaluate(
    model: ExportedModel,
    datasets: TokenDatasets,
    selection: ClipSelection,
    config: RunConfig,
    *,
    output_uri: str,
    champion: Champion | None,
    on_metrics: OnMetrics | None = None,
) -> EvalReport:
    """Measure a model on held-out tokens, sample it and decide whether it passes the gate.

    Args:
        model: The exported model.
        datasets: Token data sets; the validation ones are measured.
        selection: Clips, for real frames beside the samples.
        config: The run; `evaluation` and `release` matter.
        output_uri: Root of all data of the run.
        champion: The present champion, measured on the same samples and noise; None without one.
        on_metrics: Called once with (steps trained, metrics).

    Returns:
        The committed report with its samples: mp4 and gif of every prompt, and `strip.png`.

    Raises:
        ConfigError: If the model directory is damaged.
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard or a table of the clips is missing or damaged.
        VideoDecodeError: If a clip cannot be read.
        StorageError: If the store refuses or does not answer.
    """
    print_ = fingerprint(
        "evaluation",
        SCHEMA_VERSION,
        model.fingerprint,
        datasets.fingerprint,
        config.evaluation,
        config.release,
        None if champion is None else champion.model_key,
        config.seed,
    )
    folder_uri = storage.join(output_uri, "evaluations", print_[:32])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(manifest_uri, EvalReport)
    if done is not None:
        return done
    with storage.local_directory(model.directory_uri) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory)
    metrics, grids = held_out_metrics(pipeline, datasets, config)
    metrics |= stage_metrics(model.checkpoint)
    place = ScoresPlace(model, datasets, config, output_uri)
    scores = place.commit(model.content_key, grids)
    intervals = metric_intervals(scores) if scores else ()
    comparison = None
    if champion is not None:
        comparison = compare_with(champion, pipeline, scores, place)
        logger.info("%s", comparison_text(comparison))
    metrics |= comparison_metrics(intervals, comparison)
    selected = read_selection(selection)
    with ClipReader() as reader:
        metrics |= tokenizer_metrics(pipeline, selected, config, reader.read)
        samples = draw_samples(pipeline, selected, config, reader.read)
    metrics |= sample_metrics(samples)
    samples_uri = storage.unique_place(folder_uri, "samples")
    files = _write_samples(samples, samples_uri, fps=config.tokenization.fps)
    failed = failed_gates(metrics, comparison, config)
    if on_metrics is not None:
        on_metrics(model.checkpoint.step, metrics)
    return storage.commit_record(
        manifest_uri,
        EvalReport(
            manifest_uri=manifest_uri,
            model=model,
            metrics=metrics,
            grids=tuple(grid for grid in grids if grid.is_finite),
            samples_uri=samples_uri,
            samples=files,
            intervals=intervals,
            comparison=comparison,
            gate_passed=not failed,
            failed_gates=failed,
            fingerprint=print_,
        ),
    )


def held_out_metrics(
    pipeline: UrsaPipeline, datasets: TokenDatasets, config: RunConfig
) -> tuple[dict[str, float], tuple[LossGrid, ...]]:
    """Return losses and accuracies by t of the model, an untrained one and the unigram.

    Args:
        pipeline: The model.
        datasets: Token data sets; without held-out samples the training ones alone are measured.
        config: The run; `evaluation` and the seed matter.

    Returns:
        Metrics and, of held-out samples, the grids behind them. `eval/loss_t*`,
        `eval/accuracy_t*`, `eval/untrained_loss_t*`, `eval/untrained_accuracy_t*`,
        `eval/train_loss_t*`, `eval/train_accuracy_t*`, the means over t `eval/loss`,
        `eval/accuracy` and so on, and `eval/unigram_loss`, `eval/unigram_accuracy`,
        `eval/chance_accuracy`; `eval/loss_frame*`; of clips of several latent frames the same as
        `eval/async_*` and `eval/i2v_*`, with their gains over one t for all frames, and
        `eval/copy_accuracy`. Losses in nats, accuracies in [0, 1].

    Raises:
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard is missing or damaged.
    """
    limit = config.evaluation.max_samples
    train = TokenSamples(datasets.video_train, max_samples=limit)
    untrained = build_transformer(
        pipeline.transformer.config,
        seed=address_seed(config.seed, "untrained"),
        codebook=pipeline.visual_tokenizer.codebook,
    )

    metrics = grid_metrics(measure(pipeline, train, config), "eval/train_")
    if not datasets.video_validation.num_samples:
        logger.warning("no held-out clips: the model is measured on training clips only")
        return metrics, ()
    held_out = TokenSamples(datasets.video_validation, max_samples=limit)
    grids = tuple(
        measure(pipeline, held_out, config, setting=setting) for setting in settings_of(held_out)
    )
    metrics |= grid_metrics(grids[0], "eval/", by_frame=True)
    metrics |= grid_metrics(
        measure(pipeline, held_out, config, network=untrained), "eval/untrained_"
    )
    metrics |= unigram_metrics(code_counts(datasets.video_train), held_out)
    for grid in grids[1:]:
        prefix = f"eval/{SETTING_PREFIX[grid.setting]}"
        metrics |= grid_metrics(grid, prefix) | gain_metrics(grid, grids[0], prefix)
        metrics["eval/copy_accuracy"] = copy_accuracy(
            held_out, batch_size=config.evaluation.batch_size
        )
    return metrics, grids


def stage_metrics(checkpoint: CheckpointRef) -> dict[str, float]:
    """Return what the last stage changed, as it and the stage before were measured at their ends.

    Args:
        checkpoint: Result of the last stage.

    Returns:
        `eval/before_*` and `eval/after_*` of loss, accuracy, `i2v_*` and `async_*`, both of the
        same samples and noise, `eval/*_change` and its standard error `eval/*_change_se`; nothing
        if the stage began from weights of another run or after a stage on images.
    """
    metrics = {}
    for name, value in checkpoint.metrics.items():
        bare = name.removeprefix("val/")
        if bare.startswith("before_"):
            metrics[f"eval/{bare}"] = value
            after = bare.removeprefix("before_")
            metrics[f"eval/after_{after}"] = checkpoint.metrics[f"val/{after}"]
        elif bare.endswith(("_change", "_change_se")):
            metrics[f"eval/{bare}"] = value
    return metrics


def unigram_metrics(train_counts: np.ndarray, held_out: TokenSamples) -> dict[str, float]:
    """Return loss and accuracy of always predicting the training tokens' distribution.

    Measured on the same held-out samples as the model. Codes never seen in training get the
    weight of one occurrence (Laplace), so the loss is finite.

    Args:
        train_counts: How often each code occurs in training, shape (V,).
        held_out: Samples that are predicted.

    Returns:
        `eval/unigram_loss` in nats, `eval/unigram_accuracy` and `eval/chance_accuracy` = 1 / V in
        [0, 1].
    """
    counts = 1.0 + train_counts
    target = held_out.batch(range(len(held_out))).visual_ids.flatten().numpy()
    return {
        "eval/unigram_loss": float(-np.log(counts[target] / counts.sum()).mean()),
        "eval/unigram_accuracy": float((target == counts.argmax()).mean()),
        "eval/chance_accuracy": 1.0 / len(counts),
    }


def tokenizer_metrics(
    pipeline: UrsaPipeline,
    selected: Sequence[SelectedClip],
    config: RunConfig,
    read: ReadFrames = read_frames_at,
) -> dict[str, float]:
    """Return the reconstruction quality of the visual tokenizer by split.

    Args:
        pipeline: Holds the tokenizer.
        selected: Clips; at most 32 windows of each split, evenly spread, are measured.
        config: The run; `tokenization` matters.
        read: Reads frames of a local file.

    Returns:
        PSNR in dB: `eval/tokenizer_psnr_train`, `eval/tokenizer_psnr_validation`; a split without
        windows that can be read is absent.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    metrics = {}
    for split in ("train", "validation"):
        windows = [
            (item, indices)
            for item in selected
            if item.split == split
            for _, indices in clip_windows(item.clip, config.tokenization)
        ]
        if windows:
            chosen = [windows[place] for place in spread(len(windows), _PSNR_WINDOWS)]
            found = [_read(item, indices, config, read) for item, indices in chosen]
            readable = [frames for frames in found if frames is not None]
            if not readable:
                continue
            real = np.stack(readable)
            decoded = pipeline.visual_tokenizer.decode(pipeline.visual_tokenizer.encode(real))
            metrics[f"eval/tokenizer_psnr_{split}"] = psnr_db(real, decoded)
    return metrics


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


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return temporal flicker and dynamic degree of generated and of the real clips.

    Flicker is VBench's (arXiv 2311.17982): 1 - mean absolute difference of neighbouring frames /
    255; dynamic degree is here the share of pixels that change by more than 8 levels from the first
    frame to the last.

    Args:
        samples: Clips.

    Returns:
        `eval/<kind>_temporal_flicker` and `eval/<kind>_dynamic_degree`, both in [0, 1], kind
        generated or real; nothing without samples, and no flicker of clips of one frame.
    """
    metrics = {}
    for kind in ("generated", "real"):
        videos = [getattr(sample, kind).astype(np.float32) for sample in samples]
        moving = [video for video in videos if len(video) > 1]
        if moving:
            metrics[f"eval/{kind}_temporal_flicker"] = float(
                np.mean([1 - np.abs(np.diff(video, axis=0)).mean() / 255 for video in moving])
            )
        if videos:
            metrics[f"eval/{kind}_dynamic_degree"] = float(
                np.mean([(np.abs(video[-1] - video[0]).mean(-1) > 8).mean() for video in videos])
            )
    return metrics


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
            frames = _read(item, indices, config, read)
            if frames is not None:
                found.append((caption, frames))
                break
        if len(found) == config.evaluation.sampling.num_prompts:
            break
    return found


def _read(
    item: SelectedClip, indices: Sequence[int], config: RunConfig, read: ReadFrames
) -> np.ndarray | None:
    """Return frames of a clip; None if it cannot be read, as tokenization may have found too."""
    size = FrameSize(config.tokenization.height_px, config.tokenization.width_px)
    try:
        with local_clip(item.clip) as path:
            return read(path, indices, [size])[0]
    except VideoDecodeError as error:
        logger.warning("left out of the evaluation: %s", error)
        return None


def _write_samples(samples: Sequence[Sample], samples_uri: str, *, fps: float) -> tuple[str, ...]:
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
