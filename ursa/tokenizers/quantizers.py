"""Quantizers: continuous latents to codes and back.

Dimensions: C = channels (one FSQ level each), V = codebook size.

References:
    Finite scalar quantization: arXiv 2309.15505.
"""

import torch
from torch import Tensor, nn

from ursa.errors import ConfigError


class FSQuantizer(nn.Module):
    """Finite scalar quantization: every channel is rounded to one of a few levels.

    bound(z) = tanh(z + atanh(off / half)) * half - off with half = 1.001 (L - 1) / 2 and off = 0.5
    for even L, else 0; code = round(bound(z)) / (L // 2);
    id = sum_c (round(bound(z_c)) + L_c // 2) * basis_c with the first channel fastest.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        """Keep the levels.

        Args:
            levels: Number of levels of each channel, each >= 2.

        Raises:
            ConfigError: If a level is smaller than 2.
        """
        super().__init__()
        if not levels or min(levels) < 2:
            raise ConfigError(f"FSQ levels must be at least 2 each, got {levels}")
        self.levels = tuple(levels)
        level = torch.tensor(levels)
        basis = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        half = (level - 1) * 1.001 / 2
        offset = torch.where(level % 2 == 0, 0.5, 0.0)
        self.register_buffer("_level", level, persistent=False)
        self.register_buffer("_basis", basis, persistent=False)
        self.register_buffer("_half", half, persistent=False)
        self.register_buffer("_offset", offset, persistent=False)
        self.register_buffer("_shift", torch.atanh(offset / half), persistent=False)

    _level: Tensor
    _basis: Tensor
    _half: Tensor
    _offset: Tensor
    _shift: Tensor

    @property
    def codebook_size(self) -> int:
        """Number of codes V."""
        return int(self._level.prod())

    @property
    def codebook(self) -> Tensor:
        """All codes in order of their id, shape (V, C), float32, in [-1, 1]."""
        return self.decode(torch.arange(self.codebook_size, device=self._level.device))

    def bound(self, z: Tensor) -> Tensor:
        """Squash latents of shape (..., C) into the open range of their levels."""
        return torch.tanh(z + self._shift) * self._half - self._offset

    def quantize(self, z: Tensor) -> Tensor:
        """Return codes in [-1, 1], shape (..., C); gradients pass straight through the rounding."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self._level // 2)

    def encode(self, z: Tensor) -> Tensor:
        """Return ids in [0, V) of latents of shape (..., C), shape (...), int64."""
        digits = self.bound(z).round().long() + self._level // 2
        return (digits * self._basis).sum(-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Return codes in [-1, 1] of ids of shape (...), shape (..., C), float32."""
        digits = (ids.unsqueeze(-1) // self._basis) % self._level
        half = self._level // 2
        return (digits - half).float() / half
