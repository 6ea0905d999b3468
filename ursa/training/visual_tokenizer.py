"""Fit the visual tokenizer to the selected clips: principal components first, then descent.

The linear branch starts as the PCA of 4x8x8 blocks with one FSQ level range a component and a
least-squares decoder, which is the floor that the fit is measured against. Then all weights descend
on the squared error through straight-through rounding. A part of the samples is cropped, flipped
and recoloured, so that the tokenizer serves clips it has not seen.

Dimensions: B = batch, T = frames, H, W = rows and columns, C = code channels.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, Clip, ClipSelection, TokenizerRef
from ursa.config import RunConfig, StageConfig, VisualTokenizerConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.clips import clip_windows, local_clip, read_selection
from ursa.errors import (
    CheckpointError,
    ConfigError,
    DataExhaustedError,
    NonFiniteLossError,
    VideoDecodeError,
)
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.visual import (
    AutoencoderTokenizer,
    load_visual_tokenizer,
    psnr_db,
    save_visual_tokenizer,
    to_pixels,
)
from ursa.training.checkpoint import (
    latest_checkpoint,
    restore_state,
    save_checkpoint,
    training_state,
)
from ursa.training.optim import build_average, build_optimizer, learning_rate
from ursa.training.trainer import OnMetrics
from ursa.video.decode import FrameSize
from ursa.video.reader import ClipReader
from ursa.video.variants import ZOOM, shrink

logger = logging.getLogger(__name__)

_MEASURED_WINDOWS = 64
_WINDOW_FIELDS = {"fps", "num_frames", "height_px", "width_px", "window_stride_s"}
_PCA_BLOCKS = 40_000
_FIT = "fit"
_WARMUP_STEPS = 20
_EMA_DECAY = 0.99
_LOG_EVERY = 20


def fit_visual_tokenizer(
    selection: ClipSelection,
    config: RunConfig,
    *,
    output_uri: str,
    on_metrics: OnMetrics | None = None,
) -> TokenizerRef:
    """Fit a visual tokenizer, or commit the one that the configuration points to.

    Args:
        selection: Clips; those of the training split are fitted, the held-out ones measured.
        config: The run; `visual_tokenizer` and the sample size of `tokenization` matter.
        output_uri: Root of all data of the run.
        on_metrics: Called with (step, metrics).

    Returns:
        The committed tokenizer. One that was fitted has its PSNR in dB (`psnr_train`,
        `psnr_validation`), those of the PCA start (`psnr_pca_train`, `psnr_pca_validation`),
        whether that start was kept (`kept_pca`, 0 or 1) and its use of codes (`codes_used`,
        `code_perplexity`).

    Raises:
        ConfigError: If `directory_uri` holds no tokenizer of the configured strides.
        DataExhaustedError: If no training clip is long enough for one sample.
        NonFiniteLossError: If the fit diverges.
        CheckpointError: If the store does not give back a checkpoint as it was written.
        ShardFormatError: If a table of the clips is missing or damaged.
        VideoDecodeError: If a clip cannot be read.
        StorageError: If the store refuses or does not answer.
    """
    settings = config.visual_tokenizer
    source = settings.directory_uri
    print_ = fingerprint(
        SCHEMA_VERSION,
        "visual",
        settings.model_dump(mode="json", exclude={"refit_growth"}),
        None if source else config.tokenization.model_dump(mode="json", include=_WINDOW_FIELDS),
        selection.fingerprint if source is None else None,
    )
    folder_uri = storage.join(output_uri, "tokenizers", "visual", print_[:32])
    manifest_uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(manifest_uri, TokenizerRef)
    if done is not None:
        return done
    if source is not None:
        with storage.local_directory(source) as folder:
            network = load_visual_tokenizer(folder).network
        found = (network.temporal_stride, network.spatial_stride)
        if found != (wanted := (settings.temporal_stride, settings.spatial_stride)):
            raise ConfigError(
                f"the visual tokenizer at {source} has temporal and spatial strides {found}, but "
                f"visual_tokenizer says {wanted}; change the strides or directory_uri"
            )
        metrics: dict[str, float] = {}
    else:
        try:
            network, metrics = _fit(selection, config, folder_uri, print_, on_metrics)
        except CheckpointError:
            # another run that has finished removes the checkpoints of all
            done = storage.load_record(manifest_uri, TokenizerRef)
            if done is None:
                raise
            return done
    with storage.scratch_directory("tokenizer") as scratch:
        save_visual_tokenizer(network, scratch)
        directory_uri = storage.unique_place(folder_uri, "model")
        hashes = storage.upload_directory(scratch, directory_uri)
    result = storage.commit_record(
        manifest_uri,
        TokenizerRef(
            manifest_uri=manifest_uri,
            directory_uri=directory_uri,
            kind="visual",
            vocab_size=network.quantizer.codebook_size,
            metrics=metrics,
            sha256=hashes,
            fingerprint=print_,
        ),
    )
    storage.remove_directory(storage.join(folder_uri, _FIT))  # not needed any more
    return result


def _fit(
    selection: ClipSelection,
    config: RunConfig,
    folder_uri: str,
    print_: str,
    on_metrics: OnMetrics | None,
) -> tuple[FittedAutoencoder, dict[str, float]]:
    settings = config.visual_tokenizer
    selected = read_selection(selection)
    train = _read_windows([item.clip for item in selected if item.split == "train"], config)
    held_out = _read_windows([item.clip for item in selected if item.split == "validation"], config)
    if not len(train):
        raise DataExhaustedError(
            f"no training clip is long enough for one sample of "
            f"{config.tokenization.num_frames} frames at {config.tokenization.fps:g} frames per "
            "second; lower tokenization.num_frames or ingestion.min_clip_s, or add videos"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = FittedAutoencoder(
            FittedConfig(
                levels=settings.levels,
                hidden_channels=settings.hidden_channels,
                num_residual_blocks=settings.num_residual_blocks,
            )
        )
    start_from_pca(network, to_pixels(shrink(_spread(train, 2 * _MEASURED_WINDOWS))))
    measured = {"train": shrink(_spread(train, _MEASURED_WINDOWS))}
    if len(held_out):
        measured["validation"] = shrink(_spread(held_out, _MEASURED_WINDOWS))
    metrics = {f"psnr_pca_{split}": _psnr(network, windows) for split, windows in measured.items()}
    logger.info("PCA start: %s", {key: round(value, 2) for key, value in metrics.items()})
    start = copy.deepcopy(network)
    network = _descend(network, train, settings, folder_uri, print_, on_metrics)
    fitted = {f"psnr_{split}": _psnr(network, windows) for split, windows in measured.items()}
    judge = list(measured)[-1]
    kept_pca = fitted[f"psnr_{judge}"] < metrics[f"psnr_pca_{judge}"]
    if kept_pca:
        logger.warning(
            "the fit ends at %.2f dB on the %s clips, below its PCA start of %.2f dB, which is "
            "kept; raise visual_tokenizer.max_steps or augmented_fraction",
            fitted[f"psnr_{judge}"],
            judge,
            metrics[f"psnr_pca_{judge}"],
        )
        network = start.eval()
        fitted = {f"psnr_{split}": metrics[f"psnr_pca_{split}"] for split in measured}
    metrics |= {**fitted, "kept_pca": float(kept_pca)}
    metrics |= code_usage(AutoencoderTokenizer(network), measured["train"])
    logger.info("fitted: %s", {key: round(value, 2) for key, value in metrics.items()})
    if on_metrics is not None:
        on_metrics(settings.max_steps, {f"tokenizer/{key}": v for key, v in metrics.items()})
    return network, metrics


def start_from_pca(network: FittedAutoencoder, pixels: Tensor) -> None:
    """Set the linear branch to the principal components of the blocks of some videos.

    Each component is scaled so that its FSQ rounding loses least; the decoder is the least-squares
    map from codes to blocks.

    Args:
        network: The autoencoder to start.
        pixels: Videos in [-1, 1], shape (B, 3, 1 + 4k, H, W).
    """
    quantizer = network.quantizer
    with torch.no_grad():
        blocks = network.blocks(pixels).movedim(1, -1).flatten(0, -2)
        blocks = blocks[:: max(1, len(blocks) // _PCA_BLOCKS)]
        mean = blocks.mean(0)
        _, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        num_codes = len(quantizer.levels)
        components = vectors.flip(1)[:, :num_codes].T
        scores = (blocks - mean) @ components.T
        deviation = scores.std(0).clamp_min(1e-6)
        scale = torch.ones(num_codes)
        for channel in range(num_codes):
            errors = []
            for candidate in np.linspace(0.4, 2.5, 22):
                trial = torch.zeros_like(scores)
                trial[:, channel] = scores[:, channel] / deviation[channel] * float(candidate)
                code = quantizer.quantize(trial)[:, channel : channel + 1]
                target = scores[:, channel : channel + 1]
                fitted = _affine_map(code, target)
                errors.append((float((_apply(fitted, code) - target).square().mean()), candidate))
            scale[channel] = float(min(errors)[1])
        analysis = components * (scale / deviation).unsqueeze(-1)
        offset = -(analysis @ mean)
        solution = _affine_map(quantizer.quantize(blocks @ analysis.T + offset), blocks)
    network.set_linear(analysis, offset, solution[:-1].T, solution[-1])


def code_usage(tokenizer: AutoencoderTokenizer, windows: np.ndarray) -> dict[str, float]:
    """Return how many codes some videos use, and the perplexity of that use.

    Args:
        tokenizer: The tokenizer.
        windows: Videos, uint8, shape (B, 1 + 4k, H, W, 3).

    Returns:
        `codes_used`, and `code_perplexity` = exp(-sum_k p_k ln p_k), p_k the share of code k.
    """
    ids = torch.cat([tokenizer.encode(part).flatten() for part in _batches(windows)])
    counts = torch.bincount(ids, minlength=len(tokenizer.codebook)).double()
    share = counts[counts > 0] / counts.sum()
    return {
        "codes_used": float(len(share)),
        "code_perplexity": float(torch.exp(-(share * share.log()).sum())),
    }


def _descend(
    network: FittedAutoencoder,
    windows: np.ndarray,
    settings: VisualTokenizerConfig,
    folder_uri: str,
    print_: str,
    on_metrics: OnMetrics | None,
) -> FittedAutoencoder:
    """Minimise the squared error; return the network with its averaged weights."""
    if not settings.max_steps:
        return network
    recipe = _recipe(settings)
    optimizer = build_optimizer(network, recipe)
    average = build_average(network, recipe)
    checkpoints_uri = storage.join(folder_uri, _FIT)
    first = 0
    resumed = latest_checkpoint(checkpoints_uri, fingerprint=print_)
    if resumed is not None:
        first = resumed[1].step
        restore_state(resumed[2], network, average, optimizer)
        logger.info("the visual tokenizer goes on from step %d", first)
    for step in range(first, settings.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        batch = _fitting_batch(windows, settings, step)
        loss = functional.mse_loss(network(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"visual tokenizer, step {step}: loss {float(loss)}, gradient norm {float(norm)}; "
                f"lower visual_tokenizer.learning_rate {settings.learning_rate:g}"
            )
        optimizer.step()
        average.update_parameters(network)
        count = step + 1
        if on_metrics is not None and count % _LOG_EVERY == 0:
            error = float(loss.detach())
            psnr = 10 * math.log10(4 / error)
            on_metrics(count, {"tokenizer/loss": error, "tokenizer/psnr": psnr})
        if count % settings.checkpoint_every == 0 and count < settings.max_steps:
            save_checkpoint(
                training_state(network, average, optimizer),
                checkpoints_uri,
                step=count,
                num_samples_seen=count * settings.batch_size,
                fingerprint=print_,
                keep=1,
            )
    fitted = average.module
    assert isinstance(fitted, FittedAutoencoder)
    return fitted.eval()


def _recipe(settings: VisualTokenizerConfig) -> StageConfig:
    """Express the fit in the terms of a training stage, to share schedule and optimizer."""
    return StageConfig(
        init_from=None,
        lora=None,
        modality="video",
        timesteps="synchronous",
        synchronous_fraction=1.0,
        timestep_shift=1.0,
        scale_shift=False,
        image_fraction=0.0,
        new_fraction=None,
        sample_every=None,
        max_steps=settings.max_steps,
        global_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        precision="float32",
        learning_rate=settings.learning_rate,
        final_learning_rate=0.0,
        warmup_steps=min(_WARMUP_STEPS, settings.max_steps),
        adam_betas=(0.9, 0.95),
        weight_decay=0.01,
        max_grad_norm=1.0,
        ema_decay=_EMA_DECAY,
        prompt_dropout=0.0,
        motion_prefix_probability=0.0,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=1,
        validate_every=settings.max_steps,
        log_every=_LOG_EVERY,
    )


def _fitting_batch(windows: np.ndarray, settings: VisualTokenizerConfig, step: int) -> Tensor:
    """Draw the samples of a step, some of them augmented; a pure function of the step."""
    generator = torch.Generator().manual_seed(address_seed(settings.seed, "visual_tokenizer", step))
    chosen = torch.randint(len(windows), (settings.batch_size,), generator=generator)
    augmented = torch.rand(settings.batch_size, generator=generator)
    videos = []
    for index, draw in zip(chosen.tolist(), augmented.tolist(), strict=True):
        pixels = to_pixels(windows[index : index + 1])[0]
        if draw < settings.augmented_fraction:
            videos.append(_augment(pixels, generator))
        else:
            videos.append(functional.avg_pool3d(pixels, (1, ZOOM, ZOOM)))
    return torch.stack(videos)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Crop at a random scale, flip in space and time, recolour: (3, T, zH, zW) to (3, T, H, W)."""
    height, width = pixels.shape[2] // ZOOM, pixels.shape[3] // ZOOM
    scale, top, left, flip_x, flip_t, flip_y, recolour, gain, lift = torch.rand(
        9, generator=generator
    ).tolist()
    rows, columns = (int(size * (1 + scale * (ZOOM - 1))) for size in (height, width))
    top = int(top * (ZOOM * height - rows + 1))
    left = int(left * (ZOOM * width - columns + 1))
    pixels = pixels[:, :, top : top + rows, left : left + columns]
    pixels = functional.interpolate(
        pixels.transpose(0, 1), size=(height, width), mode="bilinear", antialias=True
    ).transpose(0, 1)
    for probability, draw, axis in ((0.5, flip_x, 3), (0.5, flip_t, 1), (0.2, flip_y, 2)):
        if draw < probability:
            pixels = pixels.flip(axis)
    if recolour < 0.5:
        channels = torch.randperm(3, generator=generator)
        tint = 0.3 * (torch.rand(3, 1, 1, 1, generator=generator) - 0.5)
        pixels = (pixels[channels] + 1) * (0.5 + gain + tint) - 1 + 0.6 * (lift - 0.5)
    return pixels.clamp(-1, 1)


def _read_windows(clips: Sequence[Clip], config: RunConfig) -> np.ndarray:
    """Read fitting windows at ZOOM times the sample size, evenly spread if there are many.

    A clip that cannot be decoded is left out: tokenization names it and counts it as failed. One
    that cannot be read for now is an error, since a fit without it would be kept for good.

    Raises:
        ClipUnavailableError: If a clip is missing or damaged, or time or memory ran out.
    """
    samples = config.tokenization
    spans = [(clip, indices) for clip in clips for _, indices in clip_windows(clip, samples)]
    limit = config.visual_tokenizer.max_windows
    spans = [spans[i * len(spans) // limit] for i in range(limit)] if len(spans) > limit else spans
    shape = (samples.num_frames, ZOOM * samples.height_px, ZOOM * samples.width_px, 3)
    windows = np.empty((len(spans), *shape), np.uint8)
    filled = 0
    with ClipReader() as reader:
        for clip, group in groupby(spans, key=lambda span: span[0]):
            parts = [indices for _, indices in group]
            wanted = sorted({index for indices in parts for index in indices})
            try:
                with local_clip(clip) as path:
                    (frames,) = reader.read(path, wanted, [FrameSize(*shape[1:3])])
            except VideoDecodeError as error:
                if error.transient:
                    raise
                logger.warning("left out of the fit: %s", error)
                continue
            place = {index: position for position, index in enumerate(wanted)}
            for indices in parts:
                windows[filled] = frames[[place[index] for index in indices]]
                filled += 1
    return windows[:filled]


def _spread(windows: np.ndarray, limit: int) -> np.ndarray:
    count = min(len(windows), limit)
    return windows[[i * len(windows) // count for i in range(count)]]


def _batches(windows: np.ndarray, size: int = 8) -> Iterator[np.ndarray]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _psnr(network: FittedAutoencoder, windows: np.ndarray) -> float:
    tokenizer = AutoencoderTokenizer(network)
    decoded = np.concatenate(
        [tokenizer.decode(tokenizer.encode(part)) for part in _batches(windows)]
    )
    network.train()
    return psnr_db(windows, decoded)


def _affine_map(source: Tensor, target: Tensor) -> Tensor:
    # normal equations in float64: unlike lstsq they repeat to the bit wherever the data lie
    inputs = torch.cat([source, torch.ones(len(source), 1)], 1).double()
    gram = inputs.T @ inputs + 1e-9 * len(inputs) * torch.eye(inputs.shape[1])
    solution: Tensor = torch.linalg.solve(gram, inputs.T @ target.double())
    return solution.float()


def _apply(solution: Tensor, source: Tensor) -> Tensor:
    return source @ solution[:-1] + solution[-1]
