"""The metric path: how a clean token becomes noise, and how it comes back.

Dimensions: B = batch, N = tokens, V = codebook size, D = code dimension.

References:
    URSA, arXiv 2510.24717, section 3; metric-induced paths and kinetic-optimal velocities:
    arXiv 2412.03487, section 4.
"""

import torch
from torch import Tensor

from ursa.errors import ConfigError

NORM_FLOOR = 1e-5
"""Codes are divided by max(|e|, NORM_FLOOR), so that the zero code stays zero."""


class MetricPath:
    """Probability path p_t(x | x_1) proportional to exp(-beta_t * d(x, x_1)).

    d is the squared Euclidean distance between L2-normalised codebook rows and
    beta_t = c * (t / (1 - t)) ** alpha. t = 0 is uniform noise, t -> 1 a point mass on the codes at
    distance 0 of x_1. Every token moves on its own.

    This is the readable reference: it holds one (N, V) tensor of the tokens it is asked about.
    """

    def __init__(self, codebook: Tensor, *, alpha: float, c: float) -> None:
        """Keep the normalised codebook.

        Args:
            codebook: Code embeddings, shape (V, D), any float type.
            alpha: Exponent of the schedule, > 0.
            c: Scale of the schedule, > 0.

        Raises:
            ConfigError: If the shape, alpha or c are not as stated.
        """
        if codebook.ndim != 2:
            raise ConfigError(f"codebook must have shape (V, D), got {tuple(codebook.shape)}")
        if alpha <= 0 or c <= 0:
            raise ConfigError(f"alpha and c must be positive, got alpha={alpha}, c={c}")
        self.alpha = alpha
        self.c = c
        self.codebook = normalize_codebook(codebook)
        self._square = self.codebook.square().sum(-1)

    @property
    def codebook_size(self) -> int:
        """Number of codes V."""
        return self.codebook.shape[0]

    def to(self, device: torch.device) -> "MetricPath":
        """Return the same path with its codebook on a device."""
        return MetricPath(self.codebook.to(device), alpha=self.alpha, c=self.c)

    def beta(self, t: Tensor) -> Tensor:
        """Return beta_t = c * (t / (1 - t)) ** alpha, same shape as t, t in [0, 1)."""
        return self.c * (t / (1 - t)) ** self.alpha

    def beta_rate(self, t: Tensor) -> Tensor:
        """Return the time derivative of beta, taken as 0 at t = 0; same shape as t."""
        rate = self.c * self.alpha * t ** (self.alpha - 1) / (1 - t) ** (self.alpha + 1)
        return torch.where(t > 0, rate, torch.zeros_like(rate))

    def distance(self, x_1: Tensor) -> Tensor:
        """Return the squared distance of every code to each token.

        Args:
            x_1: Token ids in [0, V), shape (...), int64.

        Returns:
            Distances in [0, 4], shape (..., V), float32.
        """
        cross = self.codebook[x_1] @ self.codebook.T
        return (self._square[x_1].unsqueeze(-1) + self._square - 2 * cross).clamp_min_(0)

    def probs(self, x_1: Tensor, t: Tensor) -> Tensor:
        """Return p_t(x | x_1).

        Args:
            x_1: Clean token ids, shape (...), int64.
            t: Times in [0, 1), broadcastable to the shape of x_1, float32.

        Returns:
            Probabilities, shape (..., V), float32, summing to 1 over the last axis.
        """
        return torch.softmax(-self.beta(t).unsqueeze(-1) * self.distance(x_1), dim=-1)

    def sample(self, x_1: Tensor, t: Tensor, *, uniform: Tensor) -> Tensor:
        """Draw x_t from p_t(x | x_1) by inverting the distribution function.

        Args:
            x_1: Clean token ids, shape (...), int64.
            t: Times in [0, 1), broadcastable to the shape of x_1, float32.
            uniform: Random numbers in [0, 1), shape of x_1, float32: the only randomness, so the
                draw of a token depends on nothing but its own number.

        Returns:
            Noisy token ids, shape of x_1, int64.
        """
        return draw(self.probs(x_1, t), uniform)

    def velocity(self, x_t: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """Return the kinetic-optimal rate of jumping from x_t to every code.

        u_t(x; x_t, x_1) = p_t(x | x_1) * beta'(t) * relu(d(x_t, x_1) - d(x, x_1)), 0 on x_t.

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Predicted clean token ids, shape (...), int64.
            t: Times in [0, 1), broadcastable to the shape of x_1, float32.

        Returns:
            Rates per unit of time, shape (..., V), float32, not negative.
        """
        distance = self.distance(x_1)
        current = distance.gather(-1, x_t.unsqueeze(-1))
        posterior = torch.softmax(-self.beta(t).unsqueeze(-1) * distance, dim=-1)
        rate = self.beta_rate(t).unsqueeze(-1) * posterior * torch.relu(current - distance)
        return rate.scatter(-1, x_t.unsqueeze(-1), 0.0)


def normalize_codebook(codebook: Tensor) -> Tensor:
    """Divide every row by its length; the zero row stays zero. Shape (V, D), float32."""
    codebook = codebook.float()
    length: Tensor = torch.linalg.vector_norm(codebook, dim=-1, keepdim=True)
    return codebook / length.clamp_min(NORM_FLOOR)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index a row in proportion to weights.

    Args:
        weights: Not negative, not all zero, shape (..., V), float32.
        uniform: Random numbers in [0, 1), shape (...), float32.

    Returns:
        Indices in [0, V), shape (...), int64.
    """
    cumulative = weights.cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    index: Tensor = torch.searchsorted(cumulative, target, right=True)
    clamped: Tensor = index.squeeze(-1).clamp_max(weights.shape[-1] - 1)
    return clamped
