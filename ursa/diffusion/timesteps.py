"""Times: the grid of the sampler and the draws of training, with the resolution shift.

t = 0 is noise and t = 1 is data. The shift s maps sigma = 1 - t to s sigma / (1 + (s - 1) sigma):
s = 1 changes nothing, s > 1 spends more time in noise (higher resolution), s < 1 less.

Dimensions: B = batch, T = latent frames, H, W = rows and columns of a latent frame.

References:
    URSA, arXiv 2510.24717, section 3.2 (timestep shift) and 3.3 (asynchronous scheduling).
"""

import torch
from torch import Tensor

from ursa.errors import ConfigError

TRAINING_SPAN = 0.999
"""Training draws sigma = 1 - 0.999 u, so t never reaches 1 where beta is infinite."""


def shift_time(sigma: Tensor, shift: float) -> Tensor:
    """Return t = 1 - s sigma / (1 + (s - 1) sigma); same shape as sigma, which is in [0, 1].

    Raises:
        ConfigError: If the shift s is not positive and finite.
    """
    if not 0 < shift < float("inf"):
        raise ConfigError(f"shift must be a positive number (1 is none), got {shift}")
    # in this form t is 0 to the bit at sigma = 1: below it beta is not a number
    return (1 - sigma) / (1 + (shift - 1) * sigma)


def inference_times(num_steps: int, shift: float) -> Tensor:
    """Return the start times of the sampler's steps.

    The same grid holds for all tokens. A sampler that moves frames apart gives `euler_step` one t
    and one t_next a sample (B,), a latent frame (B, T) or a token.

    Args:
        num_steps: Number of steps n, >= 1.
        shift: Timestep shift s, > 0.

    Returns:
        Times t_i of sigma_i = 1 - i / n for i = 0..n-1, shape (n,), float64, rising from 0.

    Raises:
        ConfigError: If num_steps or shift are not as stated.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
    sigma = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    return shift_time(sigma, shift)


def training_times(uniform: Tensor, shift: float) -> Tensor:
    """Return training times for uniform numbers: sigma = 1 - 0.999 u, then the shift.

    The shape says what shares a time. Synchronous training draws one number a sample, (B,), and
    asynchronous training one a latent frame, (B, T); `expand_time` lays both over (B, T, H, W).

    Args:
        uniform: Random numbers in [0, 1), any shape.
        shift: Timestep shift s, > 0.

    Returns:
        Times in [0, 1), shape and type of uniform.

    Raises:
        ConfigError: If the shift is not positive and finite.
    """
    return shift_time(1 - TRAINING_SPAN * uniform, shift)


def align_time(name: str, t: float | Tensor, x_1: Tensor) -> Tensor:
    """Append ones to the shape of t, so that its axes lie on the LEADING axes of x_1.

    Args:
        name: What an error calls it.
        t: A number (taken as float64) or a float tensor, every axis of the size of that of x_1
            or 1.
        x_1: Token ids; their shape and device are used.

    Returns:
        t with as many axes as x_1, on its device, in the type of t.

    Raises:
        ConfigError: If t is no float or its shape does not fit.
    """
    if not isinstance(t, Tensor):
        t = torch.tensor(float(t), dtype=torch.float64)
    if not t.is_floating_point():
        raise ConfigError(f"{name} must be a number or a float tensor, got {t.dtype}")
    sizes = x_1.shape[: t.ndim]
    if t.ndim > x_1.ndim or any(a not in {1, b} for a, b in zip(t.shape, sizes, strict=True)):
        raise ConfigError(
            f"{name} must lie on the leading axes of the tokens: one a sample (B,), one a latent "
            f"frame (B, T), ...; got shape {tuple(t.shape)} for tokens of {tuple(x_1.shape)}"
        )
    return t.reshape(t.shape + (1,) * (x_1.ndim - t.ndim)).to(x_1.device)


def expand_time(t: float | Tensor, x_1: Tensor) -> Tensor:
    """Return t aligned with the tokens: the meaning of every `t` in this package.

    For x_1 of shape (B, T, H, W): a number or a scalar is one t for all, (B,) one a sample, (B, T)
    one a latent frame, (B, T, H, W) one a token. An axis of 1 counts for the whole axis, so
    (B, T, 1, 1) and (1, T) are taken too. Fewer axes never mean the last ones.

    Args:
        t: Times in [0, 1), a number (taken as float64) or a float tensor.
        x_1: Token ids; their shape and device are used.

    Returns:
        Times with as many axes as x_1, on its device, in the type of t.

    Raises:
        ConfigError: If t is not in [0, 1), no float, or its shape does not fit.
    """
    aligned = align_time("t", t, x_1)
    if not bool(((aligned >= 0) & (aligned < 1)).all()):
        raise ConfigError(
            "t must be in [0, 1) (0 is noise, 1 is data), got "
            f"{float(aligned.min())} to {float(aligned.max())}"
        )
    return aligned
