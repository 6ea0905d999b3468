"""The visual tokenizer: frames to codes and back, whatever network is inside."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ursa.errors import ConfigError, DataError
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_CLASS_NAME = "FittedAutoencoder"


class VisualTokenizer(Protocol):
    """What the pipeline needs of a visual tokenizer."""

    temporal_stride: int
    spatial_stride: int

    @property
    def codebook(self) -> Tensor:
        """Code embeddings, shape (V, D), float32."""

    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode uint8 frames (B, 1 + 4k, H, W, 3) to ids (B, 1 + k, H / 8, W / 8), int64."""

    def decode(self, ids: Tensor) -> np.ndarray:
        """Decode ids (B, 1 + k, h, w) to uint8 frames (B, 1 + 4k, 8h, 8w, 3)."""


class AutoencoderTokenizer:
    """A `FittedAutoencoder` behind the `VisualTokenizer` protocol."""

    temporal_stride = 4
    spatial_stride = 8

    def __init__(self, network: FittedAutoencoder) -> None:
        """Take a network over for inference."""
        self.network = network.eval()

    @property
    def codebook(self) -> Tensor:
        """Code embeddings, shape (V, C), float32, in [-1, 1]."""
        return self.network.quantizer.codebook

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode frames to ids.

        Args:
            frames: uint8, shape (B, 1 + 4k, H, W, 3), H and W divisible by 8.

        Returns:
            Ids in [0, V), shape (B, 1 + k, H / 8, W / 8), int64.

        Raises:
            DataError: If the shape does not fit.
        """
        check_frames(frames, self.temporal_stride, self.spatial_stride)
        return self.network.quantizer.encode(self.network.latents(to_pixels(frames)))

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> np.ndarray:
        """Decode ids in [0, V), shape (B, 1 + k, h, w), to uint8 (B, 1 + 4k, 8h, 8w, 3)."""
        return to_frames(self.network.pixels(self.network.quantizer.decode(ids)))


def to_pixels(frames: np.ndarray) -> Tensor:
    """Scale uint8 frames (B, T, H, W, 3) to float32 pixels in [-1, 1], (B, 3, T, H, W)."""
    return torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """Round pixels in about [-1, 1], (B, 3, T, H, W), to uint8 frames (B, T, H, W, 3)."""
    scaled = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.movedim(1, -1).contiguous().numpy()


def check_frames(frames: np.ndarray, temporal_stride: int, spatial_stride: int) -> None:
    """Raise DataError unless frames are uint8 (B, 1 + 4k, H, W, 3) with H, W divisible."""
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise DataError(
            f"frames must be uint8 of shape (B, T, H, W, 3), got {frames.dtype} {frames.shape}"
        )
    num_frames, height, width = frames.shape[1:4]
    if (num_frames - 1) % temporal_stride or height % spatial_stride or width % spatial_stride:
        raise DataError(
            f"frames must be 1 + {temporal_stride}k of sizes divisible by {spatial_stride}, got "
            f"{num_frames} frames of {height}x{width}"
        )


def psnr_db(reference: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of uint8 arrays of equal shape, dB."""
    error = np.mean((reference.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(float(error), 1e-12)))


def save_visual_tokenizer(network: FittedAutoencoder, directory: Path) -> None:
    """Write config.json and model.safetensors into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": _CLASS_NAME, **network.config.model_dump(mode="json")}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2), "utf-8")
    save_file(network.state_dict(), directory / WEIGHTS_FILE)


def load_visual_tokenizer(directory: Path) -> AutoencoderTokenizer:
    """Read a directory written by `save_visual_tokenizer`.

    Raises:
        ConfigError: If it is not such a directory.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"no visual tokenizer at {directory}: {CONFIG_FILE} is missing")
    values = json.loads(path.read_text("utf-8"))
    name = values.pop("_class_name", None)
    if name not in {_CLASS_NAME, "CosmosAutoencoder"}:  # the second is its former name
        raise ConfigError(f"{path}: _class_name must be {_CLASS_NAME!r}, got {name!r}")
    network = FittedAutoencoder(FittedConfig.model_validate(values))
    path = directory / WEIGHTS_FILE
    try:
        network.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path} does not hold the weights of this network: {error}") from error
    return AutoencoderTokenizer(network)
