"""Schedules: the path's own time beta as a function of t.

beta is 0 at t = 0 (noise) and rises without bound as t -> 1 (data).

References:
    URSA, arXiv 2510.24717, section 3.1, for the power; the table is ours.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ursa.errors import ConfigError


class PowerSchedule:
    """beta_t = c (t / (1 - t)) ** alpha: the schedule of the paper."""

    def __init__(self, alpha: float, c: float) -> None:
        """Keep the parameters.

        Args:
            alpha: Exponent, > 0.
            c: Scale, > 0.

        Raises:
            ConfigError: If one of them is not positive and finite.
        """
        if not (0 < alpha < math.inf and 0 < c < math.inf):
            raise ConfigError(f"alpha and c must be positive, got alpha={alpha}, c={c}")
        self.alpha = alpha
        self.c = c

    def beta(self, t: Tensor) -> Tensor:
        """Return beta, shape of t, which is in [0, 1)."""
        return self.c * (t / (1 - t)) ** self.alpha

    def rate(self, t: Tensor) -> Tensor:
        """Return d beta / dt, taken as 0 at t = 0 as in the official code; shape of t."""
        rate = self.c * self.alpha * t ** (self.alpha - 1) / (1 - t) ** (self.alpha + 1)
        return torch.where(t > 0, rate, torch.zeros_like(rate))


class TabulatedSchedule:
    """Any rising beta_t: log beta tabulated over the logit of t, with monotone cubics between.

    In these coordinates `PowerSchedule` is a straight line, log c + alpha logit(t), and beyond the
    table the curve goes on as one.
    """

    def __init__(self, log_beta: Sequence[float], *, max_logit: float) -> None:
        """Keep the table and the slopes at its knots.

        Args:
            log_beta: Values at evenly spaced logits of t from -max_logit to max_logit, rising, at
                least 4 of them.
            max_logit: End of the table, > 0; logit(t) = log(t / (1 - t)).

        Raises:
            ConfigError: If the table is not as stated.
        """
        values = np.asarray(log_beta, dtype=np.float64)
        if values.ndim != 1 or len(values) < 4 or not np.isfinite(values).all():
            raise ConfigError(
                f"log_beta must be at least 4 finite numbers, got {len(np.atleast_1d(values))}"
            )
        if not (np.diff(values) > 0).all():
            place = int((np.diff(values) <= 0).argmax())
            raise ConfigError(
                f"log_beta must rise, got {values[place]:g} and {values[place + 1]:g} at "
                f"places {place} and {place + 1}"
            )
        if not 0 < max_logit < math.inf:
            raise ConfigError(f"max_logit must be positive, got {max_logit}")
        self.log_beta = tuple(values.tolist())
        self.max_logit = float(max_logit)
        knots = np.linspace(-max_logit, max_logit, len(values))
        curve = PchipInterpolator(knots, values)
        slopes = curve.derivative()(knots)
        # a last interval of no slope would end the rise
        floor = (values[-1] - values[0]) / (2 * max_logit) * 1e-6
        # (4, K - 1): falling powers of the distance from the left knot
        self._cubics = torch.from_numpy(np.ascontiguousarray(curve.c))
        self._ends = torch.tensor([values[0], values[-1]], dtype=torch.float64)
        self._tails = torch.tensor(np.maximum(slopes[[0, -1]], floor), dtype=torch.float64)

    def beta(self, t: Tensor) -> Tensor:
        """Return beta, shape and type of t, which is in [0, 1)."""
        curve, _ = self._curve(t)
        return torch.where(t > 0, curve.exp().to(t.dtype), torch.zeros_like(t))

    def rate(self, t: Tensor) -> Tensor:
        """Return d beta / dt, shape and type of t; for t < 1e-12 its value at t = 1e-12."""
        inner = t.double().clamp_min(1e-12)
        curve, slope = self._curve(inner)
        return (curve.exp() * slope / (inner * (1 - inner))).to(t.dtype)

    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return log beta and its derivative by logit(t), shape of t, float64."""
        logit = torch.logit(t.double())
        cubics, ends, tails = (
            each.to(t.device) for each in (self._cubics, self._ends, self._tails)
        )
        step = 2 * self.max_logit / cubics.shape[1]
        inside = logit.clamp(-self.max_logit, self.max_logit)
        place = ((inside + self.max_logit) / step).long().clamp_max(cubics.shape[1] - 1)
        x = inside + self.max_logit - place.double() * step
        a, b, c, d = cubics[:, place]
        value = ((a * x + b) * x + c) * x + d
        slope = (3 * a * x + 2 * b) * x + c
        for beyond, end, tail in zip(
            (logit < -self.max_logit, logit > self.max_logit), ends, tails, strict=True
        ):
            value = torch.where(beyond, end + tail * (logit - inside), value)
            slope = torch.where(beyond, tail, slope)
        return value, slope


Schedule = PowerSchedule | TabulatedSchedule
"""What a metric path takes: `beta(t)` and its time derivative `rate(t)`."""
