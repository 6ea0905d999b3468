"""Scores over the embedding of a CLIP or SigLIP model: fit of caption and frames, aesthetics.

References:
    CLIP: Radford et al., arXiv 2103.00020. SigLIP: Zhai et al., arXiv 2303.15343.
    CLIPScore, the cosine of caption and picture: Hessel et al., arXiv 2104.08718.
    LAION aesthetic predictors, a head over normalised CLIP embeddings: Schuhmann et al.,
    arXiv 2210.08402.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ursa.annotation.networks import (
    Device,
    choose_device,
    deterministic,
    load_model,
    load_part,
    model_files,
    pixels,
)
from ursa.annotation.records import Measurement, SeenClip
from ursa.config import AestheticConfig, SimilarityConfig
from ursa.errors import ConfigError


class SimilarityScorer:
    """Score `similarity`: mean over frames of the cosine of caption and frame, in [-1, 1]."""

    def __init__(self, where: str, config: SimilarityConfig, device: Device) -> None:
        """Load the model.

        Args:
            where: Key of the configuration, for errors.
            config: The model.
            device: Where it runs.

        Raises:
            ConfigError: If it is no model with embeddings of texts and pictures.
            StorageError: If the store refuses or does not answer.
        """
        with model_files(where, config) as folder:
            self._model = load_model(AutoModel, where, folder, config, choose_device(device))
            self._processor = load_part(AutoImageProcessor, folder, backend="pil")
            self._tokenizer = load_part(AutoTokenizer, folder)
            _check_embeds(where, self._model, "get_image_features", "get_text_features")
            self._max_length = int(self._model.config.text_config.max_position_embeddings)

    def __call__(self, seen: SeenClip) -> Measurement:
        """Measure a clip.

        Args:
            seen: Frames and caption of a clip; a caption too long for the model is cut off.
        """
        texts = self._tokenizer(
            [seen.caption],
            padding="max_length",  # SigLIP was trained so, and CLIP does not mind
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._model.device)
        with deterministic():
            pictures = _embedding(
                self._model.get_image_features(
                    pixel_values=pixels(self._processor, seen.frames, self._model)
                )
            )
            caption = _embedding(self._model.get_text_features(**texts))
            score = (pictures @ caption.T).mean()
        return Measurement(scores={"similarity": float(score)})


class AestheticScorer:
    """Scores `rating` and `least_rating`: mean and least over frames of what the head says."""

    def __init__(self, where: str, config: AestheticConfig, head: Path, device: Device) -> None:
        """Load model and head.

        Args:
            where: Key of the configuration, for errors.
            config: The model.
            head: Local safetensors file of the head.
            device: Where they run.

        Raises:
            ConfigError: If one of them cannot be loaded, or they do not fit.
            StorageError: If the store refuses or does not answer.
        """
        with model_files(where, config) as folder:
            self._model = load_model(AutoModel, where, folder, config, choose_device(device))
            self._processor = load_part(AutoImageProcessor, folder, backend="pil")
            _check_embeds(where, self._model, "get_image_features")
        self._head = load_head(where, head, activation=config.activation).to(self._model.device)
        first = next(layer for layer in self._head if isinstance(layer, nn.Linear))
        size = self._embed(np.zeros((1, 32, 32, 3), np.uint8)).shape[-1]
        if first.in_features != size:
            raise ConfigError(
                f"{where}.head takes embeddings of {first.in_features} numbers, but "
                f"{config.model!r} gives {size}; take the model that the head was trained with"
            )

    def __call__(self, seen: SeenClip) -> Measurement:
        """Measure a clip.

        Args:
            seen: Frames of a clip.
        """
        with deterministic():
            found = self._head(self._embed(seen.frames))
        return Measurement(
            scores={"rating": float(found.mean()), "least_rating": float(found.min())}
        )

    def _embed(self, frames: np.ndarray) -> Tensor:
        with deterministic():
            found = self._model.get_image_features(
                pixel_values=pixels(self._processor, frames, self._model)
            )
            return _embedding(found)


def load_head(where: str, path: Path, *, activation: str) -> nn.Sequential:
    """Load a head: linear layers, one after another, in float32.

    Args:
        where: Key of the configuration, for errors.
        path: Safetensors file with `weight` and `bias` of one layer, or with those of several as
            `<anything>.<number>.weight` and `.bias`, used in order of the numbers.
        activation: "relu" or "none", between the layers.

    Returns:
        A network from embeddings to one number.

    Raises:
        ConfigError: If the file is missing, no safetensors, or its layers do not fit together.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{where}.head: {str(path)!r} cannot be read as safetensors ({error}); "
            "docs/annotation.md says how to convert a .pth file"
        ) from error
    names = sorted((name for name in tensors if name.endswith("weight")), key=_layer_number)
    layers: list[nn.Module] = []
    expected: int | None = None
    for name in names:
        weight, bias = tensors[name].float(), tensors.get(f"{name.removesuffix('weight')}bias")
        if weight.ndim != 2 or bias is None or expected not in {None, weight.shape[1]}:
            raise ConfigError(
                f"{where}.head: {name} of {str(path)!r} has shape {tuple(weight.shape)}, expected "
                f"a matrix over {expected or 'the embedding'} with a bias beside it"
            )
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias.float()})
        if layers and activation == "relu":
            layers.append(nn.ReLU())
        layers.append(layer)
        expected = weight.shape[0]
    if expected != 1:
        raise ConfigError(
            f"{where}.head: {str(path)!r} ends with {expected or 'no'} outputs, expected linear "
            "layers that end with one"
        )
    return nn.Sequential(*layers).eval().requires_grad_(requires_grad=False)


def _layer_number(name: str) -> int:
    found = re.search(r"(\d+)\.weight$", name)
    return int(found[1]) if found else 0


def _embedding(found: Any) -> Tensor:
    """Return normalised embeddings in float32, shape (B, D)."""
    values: Tensor = getattr(found, "pooler_output", found)
    return nn.functional.normalize(values.float(), dim=-1)


def _check_embeds(where: str, model: Any, *methods: str) -> None:
    for method in methods:
        if not hasattr(model, method):
            raise ConfigError(
                f"{where}: a {type(model).__name__} gives no embeddings of pictures and texts; "
                "expected a model such as CLIP or SigLIP"
            )
