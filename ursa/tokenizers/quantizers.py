"""Quantizers: continuous latents to ids and ids to codes.

All share `encode(z) -> ids`, `decode(ids) -> codes`, `codebook` and `codebook_size`. They run in
float32 at least, whatever the weights of the network around them are.

Dimensions: C = channels of a latent, V = codebook size.

References:
    Finite scalar quantization: arXiv 2309.15505. Lookup-free quantization: arXiv 2310.05737.
    Index back-propagation quantization (VQ by inner product): arXiv 2412.02692.
"""

import torch
from torch import Tensor, nn

from ursa.errors import ConfigError

_MAX_SCORES = 2**26
"""Inner products held at once by `VQuantizer.encode`: 256 MiB of float32."""
_MAX_BITS = 30


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
        basis = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        # integers: casting the network to another dtype must not round what follows from them
        self.register_buffer("_level", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", basis, persistent=False)

    _level: Tensor
    _basis: Tensor

    @property
    def codebook_size(self) -> int:
        """Number of codes V."""
        return int(self._level.prod())

    @property
    def codebook(self) -> Tensor:
        """All codes in order of their id, shape (V, C), float32, in [-1, 1]."""
        return self.decode(torch.arange(self.codebook_size, device=self._level.device))

    def bound(self, z: Tensor) -> Tensor:
        """Squash latents of shape (..., C) into the open range of their levels, float32.

        Args:
            z: Latents, shape (..., C), any floating type.

        Returns:
            Shape (..., C), at least float32; channel c rounds to -(L_c // 2)..(L_c - 1) // 2.
        """
        half = (self._level - 1) * 1.001 / 2
        offset = torch.where(self._level % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """Round latents to codes; gradients pass straight through the rounding.

        Args:
            z: Latents, shape (..., C).

        Returns:
            Codes in [-1, 1], shape (..., C).
        """
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self._level // 2)

    def encode(self, z: Tensor) -> Tensor:
        """Round latents to ids.

        Args:
            z: Latents, shape (..., C).

        Returns:
            Ids in [0, V), shape (...), int64.
        """
        digits = self.bound(z).round().long() + self._level // 2
        return (digits * self._basis).sum(-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Turn ids into codes.

        Args:
            ids: In [0, V), not checked, shape (...), of an integer type.

        Returns:
            Codes in [-1, 1], shape (..., C), float32.
        """
        digits = (ids.unsqueeze(-1) // self._basis) % self._level
        half = self._level // 2
        return (digits - half).float() / half


class VQuantizer(nn.Module):
    """Vector quantization by the largest inner product: id = argmax_k <z, e_k>.

    Neither z nor e_k is normalised, so this is not the nearest code. Of equal products the first
    wins.
    """

    def __init__(self, num_codes: int, num_channels: int) -> None:
        """Make the table of codes.

        Args:
            num_codes: V, at least 1.
            num_channels: C, at least 1.

        Raises:
            ConfigError: If one of them is smaller than 1.
        """
        super().__init__()
        if num_codes < 1 or num_channels < 1:
            raise ConfigError(
                f"a VQ codebook needs at least one code and channel, got {num_codes} codes of "
                f"{num_channels} channels"
            )
        self.embedding = nn.Embedding(num_codes, num_channels)

    @property
    def codebook_size(self) -> int:
        """Number of codes V."""
        return self.embedding.num_embeddings

    @property
    def codebook(self) -> Tensor:
        """All codes in order of their id, shape (V, C), float32."""
        return self.embedding.weight.detach().float()

    def encode(self, z: Tensor) -> Tensor:
        """Find the code of the largest inner product with each latent.

        Args:
            z: Latents, shape (..., C), any floating type.

        Returns:
            Ids in [0, V), shape (...), int64.
        """
        weight = self.embedding.weight
        # in half precision many of 131,072 products would be equal
        dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
        codes = weight.to(dtype).T
        rows = z.to(dtype).reshape(-1, z.shape[-1])
        # one row has V products: a picture at once would take gigabytes
        parts = rows.split(max(1, _MAX_SCORES // self.codebook_size))
        return torch.cat([(part @ codes).argmax(-1) for part in parts]).view(z.shape[:-1])

    def decode(self, ids: Tensor) -> Tensor:
        """Look codes up.

        Args:
            ids: In [0, V), shape (...), int32 or int64.

        Returns:
            Codes, shape (..., C), in the dtype of the weights.
        """
        codes: Tensor = self.embedding(ids)
        return codes


class LFQuantizer(nn.Module):
    """Lookup-free quantization: each channel is one bit, 1 where z > 0; codes are -1 and +1.

    id = sum_c [z_c > 0] 2^(C - 1 - c): the first channel is the most significant bit.
    """

    def __init__(self, num_codes: int, num_channels: int) -> None:
        """Keep the number of bits.

        Args:
            num_codes: V = 2^C.
            num_channels: C, in 1..30.

        Raises:
            ConfigError: If the two do not belong together.
        """
        super().__init__()
        if not 1 <= num_channels <= _MAX_BITS or num_codes != 2**num_channels:
            raise ConfigError(
                f"LFQ has 2^C codes of C channels, C in 1..{_MAX_BITS}, got {num_codes} codes of "
                f"{num_channels} channels"
            )
        self.codebook_size = num_codes
        basis = 2 ** torch.arange(num_channels - 1, -1, -1)
        self.register_buffer("_basis", basis, persistent=False)

    _basis: Tensor

    @property
    def codebook(self) -> Tensor:
        """All codes in order of their id, shape (V, C), float32, -1 or +1."""
        return self.decode(torch.arange(self.codebook_size, device=self._basis.device))

    def encode(self, z: Tensor) -> Tensor:
        """Read the signs of latents as bits.

        Args:
            z: Latents, shape (..., C).

        Returns:
            Ids in [0, V), shape (...), int64.
        """
        return ((z > 0) * self._basis).sum(-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Turn ids into codes.

        Args:
            ids: In [0, V), not checked, shape (...), of an integer type.

        Returns:
            Codes, -1 or +1, shape (..., C), float32.
        """
        return 2 * (ids.unsqueeze(-1) & self._basis).ne(0).float() - 1
