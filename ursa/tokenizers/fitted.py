"""A causal video autoencoder with finite scalar quantization, in the style of Cosmos DV 4x8x8.

1 + 4k frames of H x W pixels become 1 + k latent frames of H/8 x W/8 codes. Pixels pass a Haar
wavelet patcher (4x4x4) and a 2x2 space-to-depth; then come two branches whose outputs add up: a
linear one that starts as the principal components of the blocks, and a residual network of
factorised causal convolutions (space, then time) that starts at zero. Fitting therefore begins at
the PCA solution and can only be measured against it.

Causal in time: latent frame i depends on frames 0..4i alone, so a picture is encoded as the first
latent frame of any video that begins with it.

Dimensions: B = batch, T = frames or latent frames, H, W = rows and columns, C = channels.

References:
    Cosmos tokenizer: arXiv 2501.03575, section 4; URSA: arXiv 2510.24717, section 4.1.
"""

import torch
from torch import Tensor, nn

from ursa.config import FrozenModel
from ursa.errors import ConfigError
from ursa.tokenizers.quantizers import FSQuantizer

PATCH = 4
"""Edge of a wavelet patch in frames, rows and columns."""
_FOLD = 2
"""Space-to-depth after the patcher: 4 x 2 = 8 pixels a code."""
BLOCK_CHANNELS = 3 * PATCH**3 * _FOLD**2
"""Wavelet coefficients of one 4x8x8 block of RGB."""


class FittedConfig(FrozenModel):
    """Shape of the autoencoder fitted to the clips.

    Attributes:
        levels: FSQ levels of each channel of a code, each >= 2.
        hidden_channels: Width of the residual networks.
        num_residual_blocks: Of encoder and decoder each; the refiner has half of them, at least 1.
    """

    levels: tuple[int, ...]
    hidden_channels: int
    num_residual_blocks: int


def haar(size: int = PATCH) -> Tensor:
    """Return the orthonormal Haar matrix, shape (size, size), rows = wavelets, low pass first.

    Args:
        size: Values of a patch along one axis, a power of 2.

    Raises:
        ConfigError: If it is none.
    """
    if size < 1 or size & (size - 1):
        raise ConfigError(f"the size of a Haar matrix must be a power of 2 (1, 2, 4), got {size}")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        low = torch.kron(matrix, torch.tensor([[1.0, 1.0]]))
        high = torch.kron(torch.eye(matrix.shape[0]), torch.tensor([[1.0, -1.0]]))
        matrix = torch.cat([low, high]) / 2**0.5
    return matrix


def patch_video(video: Tensor, wavelets: Tensor) -> Tensor:
    """Transform pixels to wavelet coefficients of 4x4x4 patches.

    Args:
        video: Pixels in [-1, 1], shape (B, 3, 1 + 4k, H, W); the first frame is repeated to fill
            its patch.
        wavelets: Haar matrix, shape (4, 4).

    Returns:
        Coefficients, shape (B, 192, 1 + k, H / 4, W / 4).
    """
    first = video[:, :, :1].expand(-1, -1, PATCH - 1, -1, -1)
    video = torch.cat([first, video], dim=2)
    blocks = video.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).unflatten(6, (-1, PATCH))
    # (B, 3, T, p, H, p, W, p): one small matrix product for each of the three patch axes
    coefficients = torch.einsum("bctihjwk,ai,dj,ek->bcadethw", blocks, *([wavelets] * 3))
    return coefficients.flatten(1, 4)


def unpatch_video(coefficients: Tensor, wavelets: Tensor) -> Tensor:
    """Invert `patch_video`.

    Args:
        coefficients: Shape (B, 192, 1 + k, H / 4, W / 4).
        wavelets: Haar matrix, shape (4, 4).

    Returns:
        Pixels, shape (B, 3, 1 + 4k, H, W).
    """
    blocks = coefficients.unflatten(1, (3, PATCH, PATCH, PATCH))
    pixels = torch.einsum("bcadethw,ai,dj,ek->bctihjwk", blocks, *([wavelets] * 3))
    video = pixels.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return video[:, :, PATCH - 1 :]


def _fold(x: Tensor) -> Tensor:
    """Space to depth: (B, C, T, H, W) to (B, 4C, T, H / 2, W / 2)."""
    x = x.unflatten(3, (-1, _FOLD)).unflatten(5, (-1, _FOLD))
    return x.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)


def _unfold(x: Tensor) -> Tensor:
    """Invert `_fold`: depth to space."""
    x = x.unflatten(1, (-1, _FOLD, _FOLD))
    return x.permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


class CausalConv(nn.Module):
    """A 1x3x3 convolution in space, then a 3x1x1 one in time that sees only the past."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make both convolutions.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
        """
        super().__init__()
        self.space = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="replicate")
        self.time = nn.Conv2d(3 * out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; the first frame is repeated into the past.

        Args:
            x: Shape (B, in_channels, T, H, W).

        Returns:
            Shape (B, out_channels, T, H, W).
        """
        batch, frames = x.shape[0], x.shape[2]
        x = self.space(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
        first = x[:, :1]
        before = torch.cat([first, x[:, :-1]], dim=1)
        long_before = torch.cat([first, before[:, :-1]], dim=1)
        # a 3x1x1 convolution in time is a 1x1 one over three neighbouring frames
        neighbours = torch.cat([long_before, before, x], dim=2).flatten(0, 1)
        mixed: Tensor = self.time(neighbours)
        return mixed.view(batch, frames, *mixed.shape[1:]).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, so that no position sees another."""

    def __init__(self, channels: int) -> None:
        """Make weight and bias of every channel.

        Args:
            channels: C.
        """
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the channels.

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            The same shape; before weight and bias each position has mean 0 and variance 1.
        """
        normed: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return normed


class ResidualBlock(nn.Module):
    """norm, SiLU, causal convolution, twice, added to the input."""

    def __init__(self, channels: int) -> None:
        """Make the layers.

        Args:
            channels: C of input and output.
        """
        super().__init__()
        self.body = nn.Sequential(
            ChannelNorm(channels),
            nn.SiLU(),
            CausalConv(channels, channels),
            ChannelNorm(channels),
            nn.SiLU(),
            CausalConv(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus its refinement.

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            The same shape.
        """
        refined: Tensor = self.body(x)
        return x + refined


def _network(in_channels: int, channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
    last = nn.Conv3d(channels, out_channels, 1)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv3d(in_channels, channels, 1),
        *(ResidualBlock(channels) for _ in range(num_blocks)),
        ChannelNorm(channels),
        nn.SiLU(),
        last,
    )


class FittedAutoencoder(nn.Module):
    """Encoder, FSQ and decoder between pixels and codes."""

    temporal_stride = PATCH
    spatial_stride = PATCH * _FOLD
    wavelets: Tensor

    def __init__(self, config: FittedConfig) -> None:
        """Build the networks; `set_linear` then gives the linear branch its PCA start.

        Args:
            config: Shape of the networks.

        Raises:
            ConfigError: If a level is smaller than 2.
        """
        super().__init__()
        self.config = config
        channels, blocks = config.hidden_channels, config.num_residual_blocks
        code_channels = len(config.levels)
        self.register_buffer("wavelets", haar(), persistent=False)
        self.quantizer = FSQuantizer(config.levels)
        self.linear_in = nn.Conv3d(BLOCK_CHANNELS, code_channels, 1)
        self.linear_out = nn.Conv3d(code_channels, BLOCK_CHANNELS, 1)
        self.encoder = _network(BLOCK_CHANNELS, channels, code_channels, blocks)
        self.decoder = _network(code_channels, channels, 4 * channels, blocks)
        self.refiner = _network(channels, channels, 3 * PATCH**3, max(1, blocks // 2))
        # the decoder feeds the refiner, whose own last layer starts at zero
        last = self.decoder[-1]
        assert isinstance(last, nn.Conv3d)
        nn.init.normal_(last.weight, std=0.05)

    def set_linear(self, analysis: Tensor, offset: Tensor, synthesis: Tensor, mean: Tensor) -> None:
        """Set the linear branch: z = analysis @ x + offset and x = synthesis @ code + mean.

        Args:
            analysis: Shape (channels of a code, values of a patch).
            offset: Shape (channels of a code,).
            synthesis: Shape (values of a patch, channels of a code).
            mean: Shape (values of a patch,).
        """
        with torch.no_grad():
            for layer, weight, bias in (
                (self.linear_in, analysis, offset),
                (self.linear_out, synthesis, mean),
            ):
                layer.weight.copy_(weight[..., None, None, None])
                assert layer.bias is not None
                layer.bias.copy_(bias)

    def blocks(self, video: Tensor) -> Tensor:
        """Return the wavelet coefficients of 4x8x8 blocks.

        Args:
            video: Pixels in [-1, 1], shape (B, 3, 1 + 4k, H, W), H and W divisible by 8.

        Returns:
            Coefficients, shape (B, 768, 1 + k, H / 8, W / 8).
        """
        return _fold(patch_video(video, self.wavelets))

    def latents(self, video: Tensor) -> Tensor:
        """Encode pixels to latents before quantization.

        Args:
            video: Pixels in [-1, 1], shape (B, 3, 1 + 4k, H, W), H and W divisible by 8, in the
                dtype of the weights.

        Returns:
            Latents, shape (B, 1 + k, H / 8, W / 8, C), C = channels of a code.
        """
        blocks = self.blocks(video)
        z: Tensor = self.linear_in(blocks) + self.encoder(blocks)
        return z.movedim(1, -1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes to pixels.

        Args:
            codes: Shape (B, 1 + k, h, w, C), in the dtype of the weights.

        Returns:
            Pixels in about [-1, 1], shape (B, 3, 1 + 4k, 8h, 8w).
        """
        codes = codes.movedim(-1, 1)
        hidden = _unfold(self.decoder(codes))
        coefficients = _unfold(self.linear_out(codes)) + self.refiner(hidden)
        return unpatch_video(coefficients, self.wavelets)

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct pixels through the quantizer; gradients pass straight through it.

        Args:
            video: Pixels in [-1, 1], shape (B, 3, 1 + 4k, H, W).

        Returns:
            Pixels in about [-1, 1], of the same shape.
        """
        return self.pixels(self.quantizer.quantize(self.latents(video)))
