"""The visual tokenizer: frames to ids and back, whatever network is inside.

Dimensions: B = batch, T = frames, T' = latent frames, H, W = rows and columns of pixels, h, w = of
codes, C = channels, V = codebook size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ursa.errors import DataError, size_hint
from ursa.tokenizers.cosmos import CosmosAutoencoder
from ursa.tokenizers.fitted import FittedAutoencoder
from ursa.tokenizers.ibq import ImageAutoencoder
from ursa.tokenizers.quantizers import FSQuantizer
from ursa.tokenizers.weights import read_network, write_network

VisualNetwork = FittedAutoencoder | CosmosAutoencoder | ImageAutoencoder
"""What they share: `config`, `quantizer`, `temporal_stride`, `spatial_stride`,
`latents(pixels) -> (B, T', h, w, C)` and `pixels(codes) -> (B, 3, T, H, W)`."""


class VisualTokenizer(Protocol):
    """What the pipeline needs of a visual tokenizer.

    Attributes:
        temporal_stride: Frames a latent frame after the first.
        spatial_stride: Pixels a row and column of codes.
    """

    temporal_stride: int
    spatial_stride: int

    @property
    def codebook(self) -> Tensor:
        """Code embeddings, shape (V, C), float32."""

    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode frames to ids.

        Args:
            frames: uint8, shape (B, T, H, W, 3).

        Returns:
            Ids in [0, V), shape (B, T', h, w), int64.

        Raises:
            DataError: If the shape does not fit the strides.
        """

    def decode(self, ids: Tensor) -> np.ndarray:
        """Decode ids to frames.

        Args:
            ids: In [0, V), shape (B, T', h, w), of an integer type.

        Returns:
            uint8 frames, shape (B, T, H, W, 3).

        Raises:
            DataError: If the shape or an id does not fit.
        """


class AutoencoderTokenizer:
    """An autoencoder with a quantizer behind the `VisualTokenizer` protocol.

    With s = `temporal_stride`, 1 + s k frames are 1 + k latent frames (s = 1: frame by frame).
    """

    def __init__(self, network: VisualNetwork) -> None:
        """Take a network over for inference, on its device and in its dtype.

        Args:
            network: Any of the three; it is put into evaluation mode.
        """
        self.network = network.eval()
        self.temporal_stride = network.temporal_stride
        self.spatial_stride = network.spatial_stride

    @property
    def codebook(self) -> Tensor:
        """Code embeddings, shape (V, C), float32, on the network's device."""
        return self.network.quantizer.codebook

    @property
    def levels(self) -> tuple[int, ...] | None:
        """Levels of an FSQ tokenizer; None of another."""
        quantizer = self.network.quantizer
        return quantizer.levels if isinstance(quantizer, FSQuantizer) else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are; the decoder of an `ImageAutoencoder` may differ."""
        return next(self.network.parameters()).dtype

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move or cast the network in place; a configured `decoder_dtype` is kept.

        Args:
            device: None leaves it where it is.
            dtype: A floating type; None leaves it. Quantizers run in float32 at least.

        Returns:
            This tokenizer.
        """
        self.network.to(device=device, dtype=dtype)
        if isinstance(self.network, ImageAutoencoder) and self.network.config.decoder_dtype:
            self.network.decoder.to(dtype=getattr(torch, self.network.config.decoder_dtype))
        return self

    @torch.no_grad()
    def encode(self, frames: np.ndarray, *, batch_size: int | None = None) -> Tensor:
        """Encode frames to ids.

        Args:
            frames: uint8, shape (B, T, H, W, 3) with T = 1 + s k, H and W divisible by
                `spatial_stride`.
            batch_size: Videos at once; None is all.

        Returns:
            Ids in [0, V), shape (B, T', h, w), int64, on the network's device.

        Raises:
            DataError: If the shape or `batch_size` does not fit, or the latents are not numbers.
        """
        check_frames(frames, self.temporal_stride, self.spatial_stride)
        parts = []
        for part in _parts(torch.from_numpy(frames.copy()), batch_size):
            pixels = to_pixels(part.to(self.device)).to(self.dtype)
            latents = self.network.latents(pixels)
            if bool(latents.isnan().any()):
                raise DataError(
                    f"the visual tokenizer gives NaN latents in {self.dtype}; load it as "
                    "float32 or bfloat16, or check its weights"
                )
            parts.append(self.network.quantizer.encode(latents))
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, ids: Tensor, *, batch_size: int | None = None) -> np.ndarray:
        """Decode ids to frames.

        Args:
            ids: In [0, V), shape (B, T', h, w), of an integer type, on any device.
            batch_size: Videos decoded at once; None is all.

        Returns:
            uint8 frames, shape (B, T, H, W, 3).

        Raises:
            DataError: If the shape, an id or `batch_size` does not fit.
        """
        truncates = not isinstance(self.network, FittedAutoencoder)
        return np.concatenate(
            [to_frames(pixels, truncates=truncates) for pixels in self._decoded(ids, batch_size)]
        )

    @torch.no_grad()
    def decode_pixels(self, ids: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Decode ids to unrounded pixels.

        Args:
            ids: In [0, V), shape (B, T', h, w), of an integer type, on any device.
            batch_size: Videos decoded at once; None is all.

        Returns:
            Pixels in about [-1, 1], not clamped, shape (B, 3, T, H, W), float32, on the network's
            device.

        Raises:
            DataError: If the shape, an id or `batch_size` does not fit.
        """
        return torch.cat([pixels.float() for pixels in self._decoded(ids, batch_size)])

    def _decoded(self, ids: Tensor, batch_size: int | None) -> Iterator[Tensor]:
        check_ids(ids, self.network.quantizer.codebook_size)
        for part in _parts(ids.long(), batch_size):
            codes = self.network.quantizer.decode(part.to(self.device))
            yield self.network.pixels(codes.to(self.dtype))


def _parts(batch: Tensor, batch_size: int | None) -> Iterator[Tensor]:
    size = len(batch) if batch_size is None else batch_size
    if size < 1:
        raise DataError(f"batch_size must be at least 1 and the batch not empty, got {size}")
    yield from batch.split(size)


def to_pixels(frames: np.ndarray | Tensor) -> Tensor:
    """Scale frames to pixels.

    Args:
        frames: uint8, shape (B, T, H, W, 3).

    Returns:
        Pixels in [-1, 1], shape (B, 3, T, H, W), float32.
    """
    return torch.as_tensor(frames).movedim(-1, 1).float() / 127.5 - 1


def to_frames(pixels: Tensor, *, truncates: bool = False) -> np.ndarray:
    """Turn pixels into frames.

    Args:
        pixels: In about [-1, 1], clamped here, shape (B, 3, T, H, W), on any device.
        truncates: Whether values are truncated, as the official code does with the tokenizers it
            has, or rounded.

    Returns:
        uint8 frames, shape (B, T, H, W, 3).
    """
    scaled = pixels.float() * 127.5 + 127.5
    scaled = (scaled if truncates else scaled.round()).clamp(0, 255).to(torch.uint8)
    return scaled.movedim(1, -1).contiguous().cpu().numpy()


def check_frames(frames: np.ndarray, temporal_stride: int, spatial_stride: int) -> None:
    """Check that a tokenizer can encode frames.

    Args:
        frames: Any array.
        temporal_stride: s; the number of frames must be 1 + s k.
        spatial_stride: What height and width must be divisible by.

    Raises:
        DataError: Unless frames are uint8 (B, T, H, W, 3) of such sizes; it names the nearest.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise DataError(
            f"frames must be uint8 of shape (B, T, H, W, 3), got {frames.dtype} {frames.shape}"
        )
    num_frames, height, width = frames.shape[1:4]
    wrong = [
        hint
        for name, size, stride, first in (
            ("numbers of frames", num_frames, temporal_stride, 1),
            ("heights", height, spatial_stride, spatial_stride),
            ("widths", width, spatial_stride, spatial_stride),
        )
        if (hint := size_hint(size, stride, first, name))
    ]
    if wrong:
        raise DataError(
            f"frames must be 1 + {temporal_stride}k of sizes divisible by {spatial_stride}, got "
            f"{num_frames} frames of {height}x{width}; {'; '.join(wrong)}"
        )


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Check that ids can be decoded.

    Args:
        ids: Any tensor.
        codebook_size: V.

    Raises:
        DataError: Unless ids are integers in [0, V) of shape (B, T', h, w), none of them 0.
    """
    if ids.ndim != 4 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(
            f"ids must be integers of shape (B, latent frames, rows, columns), got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    wrong = (ids < 0) | (ids >= codebook_size)
    if bool(wrong.any()):
        raise DataError(
            f"id {int(ids[wrong][0])} is outside the codebook of {codebook_size} codes: ids must "
            f"be in 0..{codebook_size - 1}, without the offset of the text vocabulary"
        )


def psnr_db(reference: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio, 10 log10(255^2 / mean squared error).

    Args:
        reference: uint8, any shape.
        reconstruction: uint8, of the same shape.

    Returns:
        Decibels; 168 at most, which equal arrays have.
    """
    error = np.mean((reference.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(float(error), 1e-12)))


def save_visual_tokenizer(network: VisualNetwork, directory: Path) -> None:
    """Write a network's config.json and weights into a directory.

    The official classes are written with the official file name, keys and fields, so that the
    official code reads them (it ignores `causal_attention`, which is written where it is true).

    Args:
        network: Any of the three.
        directory: Made if missing.
    """
    write_network(network, directory)


def load_visual_tokenizer(directory: Path) -> AutoencoderTokenizer:
    """Read a directory written by `save_visual_tokenizer` or by the official code.

    Args:
        directory: Holds config.json, whose `_class_name` selects the network, and
            diffusion_pytorch_model.safetensors (whole or sharded with its index) or
            model.safetensors.

    Returns:
        The tokenizer, on the CPU in the type of its file (`to` moves and casts it).

    Raises:
        ConfigError: If it is not such a directory, or the weights are not those of the network.
    """
    return AutoencoderTokenizer(read_network(directory)).to()
