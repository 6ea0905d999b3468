"""Layers of the Cosmos autoencoder: Haar patches and causal blocks.

Attribute names are those of the official weights.

Dimensions: B = batch, T = frames or latent frames, H, W = rows and columns, C = channels.

References:
    Cosmos tokenizer: arXiv 2501.03575, section 4.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6


def haar_split(x: Tensor) -> Tensor:
    """Halve all axes by one level of the Haar transform.

    Args:
        x: Shape (B, C, T, H, W), T, H, W even.

    Returns:
        Sums and differences of 2x2x2 neighbours / 8, shape (B, 8C, T/2, H/2, W/2); the band
        (t, h, w), 0 = sum and 1 = difference, of channel c is channel (4t + 2h + w) C + c.
    """
    for axis in (4, 3, 2):
        even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
        x = torch.cat([even + odd, even - odd], 1)
    return x / 8


def haar_join(x: Tensor) -> Tensor:
    """Invert `haar_split`: (B, 8C, T, H, W) to (B, C, 2T, 2H, 2W).

    Args:
        x: Bands as `haar_split` makes them, shape (B, 8C, T, H, W).

    Returns:
        Shape (B, C, 2T, 2H, 2W).
    """
    for axis in (2, 3, 4):
        total, difference = x.chunk(2, 1)
        pair = [total + difference, total - difference]
        x = torch.stack(pair, axis + 1).flatten(axis, axis + 1)
    return x


def patch_video(video: Tensor, patch_size: int) -> Tensor:
    """Transform pixels to wavelet coefficients of p x p x p patches, p = `patch_size`.

    The first frame is repeated to fill its patch. Every band is split again, not the sums alone.

    Args:
        video: Pixels in [-1, 1], shape (B, 3, 1 + pk, H, W), H and W divisible by p.
        patch_size: Edge of a patch in frames, rows and columns, a power of 2.

    Returns:
        Coefficients, shape (B, 3p^3, 1 + k, H/p, W/p).
    """
    first = video[:, :, :1].expand(-1, -1, patch_size - 1, -1, -1)
    x = torch.cat([first, video], 2)
    for _ in range(int(math.log2(patch_size))):
        x = haar_split(x)
    return x


def unpatch_video(coefficients: Tensor, patch_size: int) -> Tensor:
    """Invert `patch_video`.

    Args:
        coefficients: Shape (B, 3p^3, 1 + k, h, w), p = `patch_size`.
        patch_size: That of `patch_video`.

    Returns:
        Pixels, shape (B, 3, 1 + pk, ph, pw).
    """
    for _ in range(int(math.log2(patch_size))):
        coefficients = haar_join(coefficients)
    return coefficients[:, :, patch_size - 1 :]


class CausalConv(nn.Conv3d):
    """A convolution that sees the past alone: the first frame is repeated before the video."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: int = 0,
    ) -> None:
        """Take channels, kernel and stride over (T, H, W), as torch does.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
            kernel: Size in frames, rows and columns.
            stride: Step in frames, rows and columns; in time at most the kernel.
            padding: Zeros at each side of rows and columns.
        """
        super().__init__(in_channels, out_channels, kernel, stride, (0, padding, padding))
        self._num_before = kernel[0] - stride[0]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T, H, W).

        Args:
            x: Shape (B, in_channels, T, H, W).

        Returns:
            Shape (B, out_channels, T // stride in time, H', W'), H' and W' as torch counts them.
        """
        if self._num_before:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self._num_before, -1, -1), x], 2)
        return super().forward(x)


def factorised_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1x3x3 convolution in space, then a causal 3x1x1 one in time; sizes are kept.

    Args:
        in_channels: C of the input.
        out_channels: C between the two and of the output.
    """
    return nn.Sequential(
        CausalConv(in_channels, out_channels, (1, 3, 3), padding=1),
        CausalConv(out_channels, out_channels, (3, 1, 1)),
    )


class FrameNorm(nn.GroupNorm):
    """Normalise all channels and pixels of each frame on its own."""

    def __init__(self, channels: int) -> None:
        """Make weight and bias of every channel.

        Args:
            channels: C.
        """
        super().__init__(1, channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, T, H, W).

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            The same shape; before weight and bias each frame has mean 0 and variance 1.
        """
        frames: Tensor = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.view(x.shape[0], x.shape[2], *frames.shape[1:]).transpose(1, 2)


class Attention(nn.Module):
    """Single-head attention, added to its input, among the pixels of a frame or along time."""

    def __init__(self, channels: int, *, axis: Literal["space", "time"], causal: bool) -> None:
        """Make the projections.

        Args:
            channels: C.
            axis: Whether the pixels of a frame attend to each other, or the frames of a pixel.
            causal: Along time, whether a frame sees the past alone; without effect in space.
        """
        super().__init__()
        self._axis, self._causal = axis, causal and axis == "time"
        self.group_norm = FrameNorm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Attend in (B, C, T, H, W).

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            The input plus what it attends to, of the same shape.
        """
        batch, _, frames, height, width = x.shape
        normed: Tensor = self.group_norm(x)
        # (B, T, H, W, C) or (B, H, W, T, C), then rows of tokens
        along_time = self._axis == "time"
        order = (0, 3, 4, 2, 1) if along_time else (0, 2, 3, 4, 1)
        tokens = normed.permute(order)
        # one head as an axis of its own: the fused kernels take four axes only
        tokens = tokens.reshape(-1, 1, frames if along_time else height * width, x.shape[1])
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self._causal)
        out: Tensor = self.to_out[0](mixed)
        if along_time:
            return x + out.view(batch, height, width, frames, -1).permute(0, 4, 3, 1, 2)
        return x + out.view(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


class ResBlock(nn.Module):
    """norm, SiLU, factorised convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make the layers; a 1x1x1 convolution takes the input over where the channels differ.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
        """
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = factorised_conv(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = factorised_conv(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else CausalConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, T, H, W).

        Args:
            x: Shape (B, in_channels, T, H, W).

        Returns:
            Shape (B, out_channels, T, H, W).
        """
        refined = self.conv1(functional.silu(self.norm1(x)))
        refined = self.conv2(functional.silu(self.norm2(refined)))
        out: Tensor = self.conv_shortcut(x) + refined
        return out


class Downsample(nn.Module):
    """Halve space and, if asked, time: strided convolution plus average, then a 1x1x1 one."""

    def __init__(self, channels: int, *, time: bool) -> None:
        """Make the convolutions.

        Args:
            channels: C.
            time: Whether frames are halved too.
        """
        super().__init__()
        self._time = time
        self.conv1 = CausalConv(channels, channels, (1, 3, 3), stride=(1, 2, 2))
        if time:
            self.conv2 = CausalConv(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve (B, C, T, H, W).

        Args:
            x: Shape (B, C, T, H, W), H and W even; T = 1 + 2k if frames are halved.

        Returns:
            Shape (B, C, T, H / 2, W / 2), or (B, C, 1 + k, H / 2, W / 2) if frames are halved.
        """
        x = self.conv1(functional.pad(x, (0, 1, 0, 1))) + functional.avg_pool3d(x, (1, 2, 2))
        if self._time:
            x = torch.cat([x[:, :, :1], x], 2)
            x = self.conv2(x) + functional.avg_pool3d(x, (2, 1, 1))
        out: Tensor = self.conv3(x)
        return out


class Upsample(nn.Module):
    """Double space and, if asked, time: repetition plus its convolution, then a 1x1x1 one."""

    def __init__(self, channels: int, *, time: bool) -> None:
        """Make the convolutions.

        Args:
            channels: C.
            time: Whether frames are doubled too.
        """
        super().__init__()
        self._time = time
        if time:
            self.conv1 = CausalConv(channels, channels, (3, 1, 1))
        self.conv2 = CausalConv(channels, channels, (1, 3, 3), padding=1)
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Double (B, C, T, H, W).

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            Shape (B, C, T, 2H, 2W), or (B, C, 2T - 1, 2H, 2W) if frames are doubled.
        """
        if self._time:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = self.conv1(x) + x
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        out: Tensor = self.conv3(self.conv2(x) + x)
        return out


class Block(nn.Module):
    """Residual blocks, then a change of size."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        """Make the residual blocks; the change of size is appended by the caller.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
            depth: Number of residual blocks.
        """
        super().__init__()
        widths = [in_channels, *[out_channels] * depth]
        self.resnets = nn.ModuleList(ResBlock(*pair) for pair in pairwise(widths))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, T, H, W) and change its size.

        Args:
            x: Shape (B, in_channels, T, H, W).

        Returns:
            Shape (B, out_channels, T', H', W'), of the size that the last layer gives it.
        """
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention in space and in time, residual block."""

    def __init__(self, channels: int, *, causal: bool) -> None:
        """Make the blocks.

        Args:
            channels: C.
            causal: Whether a frame attends to the past alone.
        """
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels) for _ in range(2))
        pair = (Attention(channels, axis=axis, causal=causal) for axis in ("space", "time"))
        self.attentions = nn.ModuleList([nn.Sequential(*pair)])

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, C, T, H, W).

        Args:
            x: Shape (B, C, T, H, W).

        Returns:
            The same shape.
        """
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out
