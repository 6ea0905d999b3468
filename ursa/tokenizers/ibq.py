"""The image autoencoder of URSA: a 2-D convolutional one with a vector quantizer (IBQ).

H x W pixels become H/16 x W/16 codes with five blocks: every block but the last halves the sides.
Frames of a video are coded one by one. Parameter names, shapes and the fields of config.json are
those of the official class `AutoencoderVQ`, so that weights pass both ways.

Dimensions: B = batch, T = frames, H, W = rows and columns, C = channels.

References:
    Index back-propagation quantization: arXiv 2412.02692; URSA: arXiv 2510.24717, section 4.1.
"""

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ursa.config import FrozenModel
from ursa.tokenizers.quantizers import LFQuantizer, VQuantizer

_GROUPS = 32
_EPS = 1e-6


class ImageConfig(FrozenModel):
    """The fields of the official config.json, with the defaults of the official class.

    `down_block_types`, `up_block_types`, `act_fn`, `norm_num_groups`, `sample_size` and
    `force_upcast` are kept for the file alone: neither the official code nor this reads them. The
    stride in space follows from the number of blocks, whatever `spatial_stride` says. The official
    code cannot read `_quantizer_name` either and always builds a `VQuantizer`; here it counts.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    class_name: Literal["AutoencoderVQ"] = Field(default="AutoencoderVQ", alias="_class_name")
    diffusers_version: str = Field(default="0.35.2", alias="_diffusers_version")
    quantizer_name: Literal["VQuantizer", "LFQuantizer"] = Field(
        default="VQuantizer", alias="_quantizer_name"
    )
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = Field(default=(128, 256, 512, 512), min_length=1)
    layers_per_block: int = Field(default=2, ge=1)
    act_fn: str = "silu"
    latent_channels: int = Field(default=16, ge=1)
    norm_num_groups: int = 32
    sample_size: int = 1024
    num_vq_embeddings: int = Field(default=16384, ge=1, description="codebook size")
    vq_embed_dim: int = Field(default=8, ge=1, description="channels of a code")
    attn_down_block: bool = Field(default=False, description="attention in the last encoder block")
    attn_up_block: bool = Field(default=False, description="attention in the first decoder block")
    force_upcast: bool = False
    temporal_stride: Literal[1] = 1
    spatial_stride: int = 16
    decoder_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = Field(
        default=None, description="dtype of the decoder whatever the others have"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(width < 1 or width % _GROUPS for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must be divisible by {_GROUPS} each, got "
                f"{self.block_out_channels}"
            )
        return self


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=_EPS)


class _Attention(nn.Module):
    """Single-head attention among all pixels, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = _norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Attend in (B, C, H, W)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out[0](mixed)
        return x + out.squeeze(1).transpose(1, 2).reshape(x.shape)


class _ResBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, H, W)."""
        refined = self.conv1(functional.silu(self.norm1(x)))
        refined = self.conv2(functional.silu(self.norm2(refined)))
        out: Tensor = self.conv_shortcut(x) + refined
        return out


class _Downsample(nn.Module):
    """Halve both sides by a strided convolution, padded at the bottom and the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / 2, W / 2)."""
        out: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    """Double both sides by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, 2H, 2W)."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0))
        return out


class _Block(nn.Module):
    """Residual blocks, each followed by attention if there is any, then a change of size."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, *, attention: bool = False
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * depth]
        self.resnets = nn.ModuleList(_ResBlock(*pair) for pair in pairwise(widths))
        self.attentions = nn.ModuleList(
            _Attention(out_channels) for _ in range(depth if attention else 0)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, H, W) and change its size."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if len(self.attentions):
                x = self.attentions[index](x)
        for layer in (*self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class _MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_ResBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, H, W)."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class _Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            block = _Block(
                widths[max(index - 1, 0)],
                width,
                config.layers_per_block,
                attention=last and config.attn_down_block,
            )
            if not last:
                block.downsamplers.append(_Downsample(width))
            self.down_blocks.append(block)
        self.mid_block = _MidBlock(widths[-1])
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to (B, latent_channels, h, w)."""
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class _Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            block = _Block(
                widths[max(index - 1, 0)],
                width,
                config.layers_per_block + 1,
                attention=index == 0 and config.attn_up_block,
            )
            if index < len(widths) - 1:
                block.upsamplers.append(_Upsample(width))
            self.up_blocks.append(block)
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, latent_channels, h, w) to (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class ImageAutoencoder(nn.Module):
    """Encoder, VQ or LFQ and decoder between pixels and codes, frame by frame."""

    temporal_stride = 1

    def __init__(self, config: ImageConfig) -> None:
        """Build the networks with random weights.

        Args:
            config: Shape of the networks and kind of quantizer.

        Raises:
            ConfigError: If an LFQ of `num_vq_embeddings` codes has other than their log2 channels.
        """
        super().__init__()
        self.config = config
        self.spatial_stride = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.vq_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.vq_embed_dim, config.latent_channels, 1)
        quantizer = LFQuantizer if config.quantizer_name == "LFQuantizer" else VQuantizer
        self.quantizer = quantizer(config.num_vq_embeddings, config.vq_embed_dim)

    def latents(self, video: Tensor) -> Tensor:
        """Encode pixels to latents before quantization.

        Args:
            video: Pixels in [-1, 1], shape (B, 3, T, H, W), H and W divisible by the stride, in
                the dtype of the weights.

        Returns:
            Latents, shape (B, T, h, w, vq_embed_dim).
        """
        frames = [self.quant_conv(self.encoder(frame)) for frame in video.unbind(2)]
        return torch.stack(frames, 1).movedim(2, -1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode codes to pixels.

        Args:
            codes: Shape (B, T, h, w, vq_embed_dim), in the dtype of the weights.

        Returns:
            Pixels in about [-1, 1], shape (B, 3, T, H, W), in the dtype of the decoder.
        """
        dtype = self.decoder.conv_in.weight.dtype
        frames = [
            self.decoder(self.post_quant_conv(frame.movedim(-1, 1)).to(dtype))
            for frame in codes.unbind(1)
        ]
        return torch.stack(frames, 2)
