"""Distances between clips and between sets of clips, by features that need no download.

A thumbnail is the whole clip, 16 pixels wide: its distance sees layout, colour and motion, and no
detail. Frechet distances of the features here are no FVD: that name is for the I3D network.

Dimensions: N, M = clips, D = features.

References:
    Frechet distance of normal laws: Dowson and Landau, J. Multivar. Anal. 12 (1982).
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ursa.config import ModelFilesConfig
from ursa.errors import ConfigError
from ursa.evaluation.clips import ClipValues
from ursa.tokenizers.visual import AutoencoderTokenizer

THUMBNAIL_WIDTH_PX = 16


def thumbnail(frames: np.ndarray) -> np.ndarray:
    """Return a clip as a small one in one row.

    Args:
        frames: uint8 (F, H, W, 3).

    Returns:
        Levels, float32 (D,).
    """
    height_px, width_px = frames.shape[1:3]
    height = max(1, round(height_px * THUMBNAIL_WIDTH_PX / width_px))
    size = (THUMBNAIL_WIDTH_PX, height)
    small = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack(small).astype(np.float32).ravel()


def rms_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the root mean square difference of every pair of rows.

    Args:
        one: Shape (N, D).
        other: Shape (M, D).

    Returns:
        Shape (N, M), in the unit of the rows.
    """
    pairs = torch.cdist(torch.from_numpy(one).double(), torch.from_numpy(other).double())
    return np.asarray(pairs / np.sqrt(one.shape[1]))


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the squared Frechet distance of the normal laws of two sets of features.

    Few rows make it too large; `reduce_features` keeps fewer features than rows.

    Args:
        one: Shape (N, D), N > 1.
        other: Shape (M, D), M > 1.

    Returns:
        At least 0.
    """
    shift = one.mean(axis=0) - other.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (one, other))
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None)).sum()
    found = shift @ shift + np.trace(first) + np.trace(second) - 2 * roots
    return float(max(found, 0.0))


def reduce_features(reference: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale features by their spread in a reference and keep its main directions.

    Args:
        reference: Features of real clips, shape (M, D).
        rows: Features of other clips, shape (N, D).

    Returns:
        Both with at most half as many features as there are rows in the smaller set.
    """
    spread = reference.std(axis=0)
    centre, scale = reference.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)
    real, drawn = (reference - centre) / scale, (rows - centre) / scale
    count = max(1, min(len(real), len(drawn)) // 2)
    if real.shape[1] <= count:
        return real, drawn
    _, _, directions = np.linalg.svd(real, full_matrices=False)
    return real @ directions[:count].T, drawn @ directions[:count].T


def statistics(frames: np.ndarray, values: ClipValues) -> np.ndarray:
    """Return colour, contrast, detail and motion of a clip.

    Args:
        frames: uint8 (F, H, W, 3).
        values: Its measurements.

    Returns:
        Mean and deviation of each channel over the clip, and logarithms of sharpness, motion,
        change of frames and flicker of brightness, shape (10,).
    """
    pixels = frames.reshape(-1, 3).astype(np.float64)
    logs = [values.sharpness, values.motion, 255 * (1 - values.temporal_flicker)]
    logs.append(values.luminance_flicker)
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), np.log1p(logs)])


def latents(tokenizer: AutoencoderTokenizer, clips: Sequence[np.ndarray]) -> np.ndarray:
    """Return mean, deviation and mean change in time of the codes of clips.

    Args:
        tokenizer: The visual tokenizer; its codebook has C channels.
        clips: uint8 (F, H, W, 3) each.

    Returns:
        Shape (N, 3C), or (N, 2C) of clips of one latent frame.
    """
    rows = []
    for frames in clips:
        codes = tokenizer.encode(frames[None])[0]
        values = tokenizer.codebook.cpu().double()[codes.cpu()]  # (T, h, w, C)
        flat = values.flatten(0, 2)
        parts = [flat.mean(0), flat.std(0)]
        if len(values) > 1:
            parts.append(values.diff(dim=0).abs().mean((0, 1, 2)))
        rows.append(torch.cat(parts).numpy())
    return np.stack(rows)


def network_features(config: ModelFilesConfig, clips: Sequence[np.ndarray]) -> np.ndarray:
    """Return the embedding of clips by an image network of transformers.

    Args:
        config: The network: CLIP, SigLIP, DINO and others that pool a picture to a vector.
        clips: uint8 (F, H, W, 3) each.

    Returns:
        Mean over frames, and of clips of several frames the mean change between them, shape (N, D).

    Raises:
        ConfigError: If it is no such network.
        StorageError: If the store refuses or does not answer.
    """
    from transformers import AutoImageProcessor, AutoModel  # noqa: PLC0415  (seconds)

    from ursa.annotation.networks import (  # noqa: PLC0415
        choose_device,
        deterministic,
        load_model,
        load_part,
        model_files,
        pixels,
    )

    where = "evaluation.clips.features"
    with model_files(where, config) as folder:
        model = load_model(AutoModel, where, folder, config, choose_device("auto"))
        processor = load_part(AutoImageProcessor, folder, backend="pil")
    rows = []
    with deterministic():
        for frames in clips:
            places = np.linspace(0, len(frames) - 1, min(config.num_frames, len(frames)))
            prepared = pixels(processor, frames[places.round().astype(int)], model)
            found = _pooled(model, prepared).float().cpu()
            parts = [found.mean(0)]
            if len(found) > 1:
                parts.append(found.diff(dim=0).abs().mean(0))
            rows.append(torch.cat(parts).numpy())
    return np.stack(rows)


def _pooled(model: Any, prepared: Tensor) -> Tensor:
    """Return one vector a picture, shape (T, D)."""
    embed = getattr(model, "get_image_features", model)
    output = embed(pixel_values=prepared)
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise ConfigError(
            f"evaluation.clips.features: a {type(model).__name__} has no vector of a whole picture "
            "(pooler_output); give a CLIP, SigLIP or DINO model"
        )
    return torch.as_tensor(pooled)
