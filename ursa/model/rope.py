"""3-D rotary positions: time, row and column share the frequencies of a head.

Of the head_dim / 2 frequencies the first 3 * (head_dim // 8) take t, h, w in turn and the rest h, w
in turn. Layout: half rotation (the first half of a head pairs with the second half), as in Qwen3.

References:
    URSA, arXiv 2510.24717, section 3.4; conventions in docs/math.md.
"""

import torch
from torch import Tensor


def frequency_axes(head_dim: int) -> Tensor:
    """Return which axis (0 = t, 1 = h, 2 = w) each frequency reads.

    Args:
        head_dim: Width of an attention head, divisible by 16.

    Returns:
        Axes, shape (head_dim / 2,), int64.
    """
    num_mixed = head_dim // 8
    axes = [0, 1, 2] * num_mixed
    axes += [1, 2] * ((head_dim // 2 - len(axes)) // 2)
    return torch.tensor(axes)


def rotary_embedding(positions: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles.

    Args:
        positions: (t, h, w) of each token, shape (L, 3) or (B, L, 3), or one number for all three,
            shape (L,): the usual 1-D rotation.
        head_dim: Width of an attention head, divisible by 16.
        theta: Base of the frequencies.

    Returns:
        cos and sin, each of shape (1 or B, L, head_dim), float32; both halves are equal.
    """
    if positions.dim() == 1:
        positions = positions.unsqueeze(-1).expand(-1, 3)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = theta ** (-exponent / head_dim)
    axes = frequency_axes(head_dim).to(positions.device)
    angle = positions.float()[..., axes] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    if angle.dim() == 2:
        angle = angle.unsqueeze(0)
    return angle.cos(), angle.sin()
