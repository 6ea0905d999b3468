"""One Euler step of the jump process, and classifier-free guidance.

References:
    URSA, arXiv 2510.24717, section 3.1, algorithm 2.
"""

import torch
from torch import Tensor

from ursa.diffusion.path import MetricPath, draw


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return z_u + scale * (z_c - z_u); logits of shape (B, N, V), scale 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def euler_step(
    path: MetricPath, x_t: Tensor, x_1: Tensor, *, t: Tensor, t_next: Tensor, uniforms: Tensor
) -> Tensor:
    """Move every token once: jump with probability 1 - exp(-rate dt), else stay.

    Args:
        path: The probability path.
        x_t: Current token ids, shape (...), int64.
        x_1: Clean token ids drawn from the posterior, shape (...), int64.
        t: Start of the step, broadcastable to the shape of x_t, in [0, 1).
        t_next: End of the step, likewise; equal to t for a token that must not move.
        uniforms: Random numbers in [0, 1), shape (2, ...): whether to jump, and where to.

    Returns:
        Token ids at t_next, shape (...), int64.
    """
    velocity = path.velocity(x_t, x_1, t)
    rate = velocity.sum(-1)
    jumps = uniforms[0] < -torch.expm1(-rate * (t_next - t))
    # a row without rate never jumps; give it any weight so that the draw is defined
    target = draw(velocity + (rate == 0).unsqueeze(-1), uniforms[1])
    return torch.where(jumps, target, x_t)


def draw_posterior(logits: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Draw x_1 from softmax(logits / temperature).

    Args:
        logits: Posterior logits, shape (..., V).
        uniform: One random number in [0, 1) a token, shape (...), float32.
        temperature: > 0; 1 is the model's own law, towards 0 the likeliest code always wins.

    Returns:
        Clean token ids, shape (...), int64.
    """
    return draw(torch.softmax(logits.float() / temperature, dim=-1), uniform)
