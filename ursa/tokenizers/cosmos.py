"""The Cosmos video autoencoder DV 4x8x8 with FSQ, as URSA uses it for video.

1 + 4k frames of H x W pixels become 1 + k latent frames of H/8 x W/8 codes (default strides).
Parameter names, shapes and the fields of config.json are those of the official class
`AutoencoderVQCosmos3D`, so that weights pass both ways.

The convolutions see the past alone, the temporal attention of the published weights does not:
there a picture alone has other codes than the first latent frame of its video.
`causal_attention` gives the causal mask of NVIDIA's tokenizer.

Dimensions: B = batch, T = frames or latent frames, H, W = rows and columns, C = channels.

References:
    Cosmos tokenizer: arXiv 2501.03575, section 4; URSA: arXiv 2510.24717, section 4.1.
"""

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ursa.config import FrozenModel
from ursa.tokenizers.cosmos_layers import (
    Block,
    CausalConv,
    Downsample,
    FrameNorm,
    MidBlock,
    Upsample,
    factorised_conv,
    patch_video,
    unpatch_video,
)
from ursa.tokenizers.quantizers import FSQuantizer

LEVELS = (8, 8, 8, 5, 5, 5)
"""FSQ levels of the official class, which has no field for them: 64,000 codes of 6 channels."""


class CosmosConfig(FrozenModel):
    """The fields of the official config.json, with the defaults of the official class.

    `down_block_types`, `up_block_types`, `act_fn`, `norm_num_groups`, `sample_size` and
    `force_upcast` are kept for the file alone: neither the official code nor this reads them.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    class_name: Literal["AutoencoderVQCosmos3D"] = Field(
        default="AutoencoderVQCosmos3D", alias="_class_name"
    )
    diffusers_version: str = Field(default="0.35.2", alias="_diffusers_version")
    quantizer_name: Literal["FSQuantizer"] = Field(default="FSQuantizer", alias="_quantizer_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock3D",) * 3
    up_block_types: tuple[str, ...] = ("UpDecoderBlock3D",) * 3
    block_out_channels: tuple[int, ...] = Field(default=(128, 256, 512, 512), min_length=2)
    layers_per_block: int = Field(default=2, ge=1)
    act_fn: str = "silu"
    latent_channels: int = Field(default=16, ge=1)
    norm_num_groups: int = 1
    sample_size: int = 1024
    sample_frames: int = Field(default=17, description="frames of a tile in time")
    num_vq_embeddings: Literal[64000] = 64000
    vq_embed_dim: Literal[6] = 6
    force_upcast: bool = False
    patch_size: int = Field(default=4, ge=2, description="edge of a wavelet patch, a power of 2")
    temporal_stride: int = Field(default=4, description="frames a latent frame")
    spatial_stride: int = Field(default=8, description="pixels a latent row and column")
    causal_attention: bool = Field(default=False, description="not official; False as trained")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("patch_size", "temporal_stride", "spatial_stride"):
            value = getattr(self, name)
            if value.bit_count() != 1 or value < self.patch_size:
                raise ValueError(
                    f"{name} must be a power of 2 from patch_size {self.patch_size} on, got {value}"
                )
        wanted = (self.spatial_stride, self.temporal_stride)
        for steps in (self.downsamples, self.upsamples):
            space, time = (self.patch_size * 2 ** sum(step[i] for step in steps) for i in (0, 1))
            if (space, time) != wanted:
                raise ValueError(
                    f"{len(self.block_out_channels)} block_out_channels and patch_size "
                    f"{self.patch_size} cannot give (spatial_stride, temporal_stride) = {wanted}, "
                    f"only {(space, time)}; add blocks or change the strides"
                )
        if self.sample_frames <= self.temporal_stride:
            raise ValueError(
                f"sample_frames must be at least 1 + temporal_stride = {1 + self.temporal_stride}"
                f", got {self.sample_frames}"
            )
        return self

    @property
    def downsamples(self) -> list[tuple[bool, bool]]:
        """Whether each encoder block but the last halves (space, time)."""
        space, time = self._halvings
        return [(i < space, i < time) for i in range(len(self.block_out_channels) - 2)]

    @property
    def upsamples(self) -> list[tuple[bool, bool]]:
        """Whether each decoder block but the last doubles (space, time)."""
        space, time = self._halvings
        steps = []
        for i in range(len(self.block_out_channels) - 2):
            in_time = 0 < i <= time
            steps.append((in_time or (i < space and space > time), in_time))
        return steps

    @property
    def _halvings(self) -> tuple[int, int]:
        ratios = (s // self.patch_size for s in (self.spatial_stride, self.temporal_stride))
        space, time = (ratio.bit_length() - 1 for ratio in ratios)
        return space, time


def tile_slices(length: int, size: int) -> list[slice]:
    """Cover frames by tiles, each beginning with the last frame of the one before.

    Args:
        length: Frames to cover, at least 1.
        size: Frames of a tile, at least 2; the last tile may be shorter.

    Returns:
        Slices of the frame axis, in order.
    """
    starts = range(0, max(length - 1, 1), size - 1)
    return [slice(start, min(start + size, length)) for start in starts]


class _Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self._patch_size = config.patch_size
        self.conv_in = factorised_conv(config.in_channels * config.patch_size**3, widths[0])
        self.down_blocks = nn.ModuleList()
        for index, pair in enumerate(pairwise(widths)):
            block = Block(*pair, config.layers_per_block)
            if index < len(config.downsamples) and config.downsamples[index][0]:
                block.downsamplers.append(Downsample(pair[1], time=config.downsamples[index][1]))
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1], causal=config.causal_attention)
        self.conv_norm_out = FrameNorm(widths[-1])
        self.conv_out = factorised_conv(widths[-1], config.latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) to (B, latent_channels, T', h, w)."""
        x = self.conv_in(patch_video(video, self._patch_size))
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class _Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self._patch_size = config.patch_size
        self.conv_in = factorised_conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], causal=config.causal_attention)
        self.up_blocks = nn.ModuleList()
        # the first two blocks have the first width, the last width is not used
        for index, pair in enumerate(zip((widths[0], *widths[:-2]), widths[:-1], strict=True)):
            block = Block(*pair, config.layers_per_block + 1)
            if index < len(config.upsamples) and config.upsamples[index][0]:
                block.upsamplers.append(Upsample(pair[1], time=config.upsamples[index][1]))
            self.up_blocks.append(block)
        self.conv_norm_out = FrameNorm(widths[-2])
        self.conv_out = factorised_conv(widths[-2], config.out_channels * config.patch_size**3)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, latent_channels, T', h, w) to (B, 3, T, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return unpatch_video(x, self._patch_size)


class CosmosAutoencoder(nn.Module):
    """Encoder, FSQ and decoder between pixels and codes.

    Long videos are coded in tiles of `sample_frames` frames. A later tile begins with the last
    frame (decoder: last latent frame) of the one before, and what it makes of that frame is
    dropped, so 1 + 4k frames are always 1 + k latent frames. A video of one tile has the official
    result. This is the one way of tiling here: the official one keeps those frames and drops
    what does not fill a tile, so that with `sample_frames` = 17 it makes 15 latent frames of 49
    frames and 33 frames of 13 latent frames.
    """

    def __init__(self, config: CosmosConfig) -> None:
        """Build the networks with random weights.

        Args:
            config: Shape of the networks.
        """
        super().__init__()
        self.config = config
        self.temporal_stride = config.temporal_stride
        self.spatial_stride = config.spatial_stride
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = CausalConv(config.latent_channels, len(LEVELS))
        self.post_quant_conv = CausalConv(len(LEVELS), config.latent_channels)
        self.quantizer = FSQuantizer(LEVELS)

    @property
    def _tile_latents(self) -> int:
        return 1 + (self.config.sample_frames - 1) // self.temporal_stride

    def latents(self, video: Tensor) -> Tensor:
        """Encode pixels to latents before quantization.

        With t = `temporal_stride` and s = `spatial_stride`, by default 4 and 8:

        Args:
            video: Pixels in [-1, 1], shape (B, 3, 1 + t k, H, W), H and W divisible by s, in the
                dtype of the weights.

        Returns:
            Latents, shape (B, 1 + k, H / s, W / s, 6).
        """
        size = 1 + (self._tile_latents - 1) * self.temporal_stride
        tiles = [
            self.encoder(video[:, :, part])[:, :, 1 if part.start else 0 :]
            for part in tile_slices(video.shape[2], size)
        ]
        z: Tensor = self.quant_conv(torch.cat(tiles, 2))
        return z.movedim(1, -1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes to pixels.

        With t = `temporal_stride` and s = `spatial_stride`, by default 4 and 8:

        Args:
            codes: Shape (B, 1 + k, h, w, 6), in the dtype of the weights.

        Returns:
            Pixels in about [-1, 1], shape (B, 3, 1 + t k, s h, s w).
        """
        z = self.post_quant_conv(codes.movedim(-1, 1))
        tiles = [
            self.decoder(z[:, :, part])[:, :, 1 if part.start else 0 :]
            for part in tile_slices(z.shape[2], self._tile_latents)
        ]
        return torch.cat(tiles, 2)
