"""Fit the path's schedule to a codebook, so that the mean distance falls linearly in t.

References:
    URSA, arXiv 2510.24717, section 3.1: linearised metric path. The paper searched alpha and c by
    eye; here they minimise the largest deviation from the straight line.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize
from torch import Tensor

from ursa.diffusion.codebook import normalize_codebook

_MAX_ROWS = 2048
"""Rows of the codebook over which the mean is taken: an even subset when there are more."""


class ScheduleFit(NamedTuple):
    """A fitted schedule; deviation is relative to the mean distance at t = 0."""

    alpha: float
    c: float
    max_deviation: float


def mean_distance(codebook: Tensor, betas: np.ndarray) -> np.ndarray:
    """Return E[d(x, x_1)] under p(x | x_1) ~ exp(-beta d), x_1 uniform over the codes.

    Args:
        codebook: Code embeddings, shape (V, D).
        betas: Inverse temperatures, shape (M,), not negative.

    Returns:
        Mean squared distances of normalised codes, shape (M,), float64.
    """
    codes = normalize_codebook(codebook)
    rows = codes[:: max(1, len(codes) // _MAX_ROWS)]
    square = codes.square().sum(-1)
    totals = np.zeros(len(betas))
    for chunk in rows.split(256):
        distance = chunk.square().sum(-1, keepdim=True) + square - 2 * chunk @ codes.T
        distance = distance.clamp_min(0)
        for index, beta in enumerate(betas):
            weight = torch.softmax(-float(beta) * distance, dim=-1)
            totals[index] += float((weight * distance).sum())
    return totals / len(rows)


def fit_schedule(codebook: Tensor) -> ScheduleFit:
    """Return the (alpha, c) whose mean distance is closest to a straight line in t.

    Args:
        codebook: Code embeddings, shape (V, D).

    Returns:
        alpha, c and the largest deviation from linear over t in (0, 1).
    """
    betas = np.concatenate([[0.0], np.logspace(-2, 3.5, 56)])
    curve = mean_distance(codebook, betas)
    relative = PchipInterpolator(np.log(betas[1:]), curve[1:] / curve[0])
    t = np.linspace(0, 1, 257)[1:-1]

    def deviation(log_parameters: np.ndarray) -> float:
        alpha, c = np.exp(log_parameters)
        log_beta = np.log(c) + alpha * np.log(t / (1 - t))
        falling = relative(np.clip(log_beta, np.log(betas[1]), np.log(betas[-1])))
        return float(np.abs(falling - (1 - t)).max())

    starts = [(alpha, c) for alpha in (0.5, 0.8, 1.1) for c in (0.5, 1.5, 4.0)]
    fits = [minimize(deviation, np.log(start), method="Nelder-Mead") for start in starts]
    best = min(fits, key=lambda fit: float(fit.fun))
    alpha, c = np.exp(best.x)
    return ScheduleFit(float(alpha), float(c), float(best.fun))
