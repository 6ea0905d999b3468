"""Times: the grid of the sampler and the draws of training, with the resolution shift.

t = 0 is noise and t = 1 is data. The shift s maps sigma = 1 - t to s sigma / (1 + (s - 1) sigma):
s = 1 changes nothing, s > 1 spends more time in noise (higher resolution).

References:
    URSA, arXiv 2510.24717, section 3.2 (timestep shift) and 3.3 (asynchronous scheduling).
"""

import torch
from torch import Tensor

TRAINING_SPAN = 0.999
"""Training draws sigma = 1 - 0.999 u, so t never reaches 1 where beta is infinite."""


def shift_time(sigma: Tensor, shift: float) -> Tensor:
    """Return t = 1 - s sigma / (1 + (s - 1) sigma); same shape as sigma, which is in [0, 1]."""
    # in this form t is 0 to the bit at sigma = 1: below it beta is not a number
    return (1 - sigma) / (1 + (shift - 1) * sigma)


def inference_times(num_steps: int, shift: float) -> Tensor:
    """Return the start times of the sampler's steps.

    Args:
        num_steps: Number of steps n, > 0.
        shift: Timestep shift s, > 0.

    Returns:
        Times t_i of sigma_i = 1 - i / n for i = 0..n-1, shape (n,), float64, rising from 0.
    """
    sigma = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    return shift_time(sigma, shift)


def training_times(uniform: Tensor, shift: float) -> Tensor:
    """Return training times for uniform numbers in [0, 1): same shape, float32, in [0, 1)."""
    return shift_time(1 - TRAINING_SPAN * uniform, shift)
