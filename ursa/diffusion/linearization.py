"""Fit the path's schedule to a codebook, so that the mean distance falls linearly in t.

With m(b) = E_{x_1} E_{p_b} f(d), which falls strictly, the exact schedule is beta(t) =
m^-1(m(0) (1 - t)). It is tabulated; the best power c (t / (1 - t)) ** alpha is found beside it.

References:
    URSA, arXiv 2510.24717, section 3.1: linearised metric path. The paper searched alpha and c by
    eye and shows the Euclidean distance; the rest is ours.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import brentq, minimize
from torch import Tensor

from ursa.diffusion.codebook import weighted_share
from ursa.diffusion.path import Codebook
from ursa.diffusion.schedule import PowerSchedule, Schedule, TabulatedSchedule
from ursa.errors import ConfigError

MAX_LOGIT = 9.2
"""End of the table: t from 1e-4 to 1 - 1e-4."""
NUM_KNOTS = 129
"""Knots of the table, at even logits of t from -MAX_LOGIT to MAX_LOGIT."""
_LEAST_BETA = 1e-3
"""Below it the mean is a straight line in beta."""
_COARSE, _FINE = 0.4, 0.015
"""Steps of log beta at first, and the most the relative mean may fall between two."""
_MAX_ENTRIES = 2**25
"""Distances looked at for one beta: with more codes, some rows stand for all."""


class DistanceCurve:
    """The mean distance as a function of beta: exact at some betas, with exact slopes.

    Attributes:
        start: Mean distance at beta = 0.
        betas: Where it was measured, rising, shape (K,), float64.
        means: Mean distance there, shape (K,), float64.
    """

    def __init__(
        self, codebook: Codebook, weights: Tensor | None = None, *, euclidean: bool = False
    ) -> None:
        """Measure the curve.

        Args:
            codebook: The codes.
            weights: How often each code is x_1, not negative, finite, shape (V,); None is
                uniformly.
            euclidean: Of the Euclidean distance instead of the squared one.

        Raises:
            ConfigError: If the weights are not as `Codebook.moments` wants them, all codes are the
                same, or the codebook has no such distance.
        """
        self._codebook, self._weights, self._euclidean = codebook, weights, euclidean
        self.start, self._first_fall = self._at(-np.inf)
        if self.start < 1e-6:
            raise ConfigError(
                "a schedule needs codes that differ: their mean distance is "
                f"{self.start:.1g}, of {len(codebook)} codes"
            )
        self.betas, self.means, falls = self._measure()
        self._log_mean = CubicHermiteSpline(
            np.log(self.betas), np.log(self.means), -self.betas * falls / self.means
        )

    def mean(self, betas: np.ndarray) -> np.ndarray:
        """Return the mean distance at betas >= 0, their shape, float64; constant past the last."""
        inside = np.clip(betas, self.betas[0], self.betas[-1])
        curve = np.exp(self._log_mean(np.log(inside)))
        return np.where(betas < self.betas[0], self.start - self._first_fall * betas, curve)

    def beta_at(self, share: float) -> float:
        """Return the beta at which the mean is a share, in (0, 1), of that at beta = 0.

        For a share below that of the last measured beta it is this beta.
        """
        target = share * self.start
        if target >= self.means[0]:
            return (self.start - target) / self._first_fall
        target = max(target, self.means[-1])
        low, high = np.log(self.betas[0]), np.log(self.betas[-1])
        return float(np.exp(brentq(lambda x: self._log_mean(x) - np.log(target), low, high)))

    def _measure(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return betas, rising, and mean and fall there: close together where the mean falls."""
        least = self.start / (2 * np.exp(MAX_LOGIT))
        points: dict[float, tuple[float, float]] = {}
        x = np.log(_LEAST_BETA)
        points[x] = self._at(x)
        while points[x][0] >= least:
            x += _COARSE
            points[x] = self._at(x)
        while True:
            known = sorted(points)
            wide = [
                (low + high) / 2
                for low, high in itertools.pairwise(known)
                if points[low][0] - points[high][0] > _FINE * self.start
            ]
            if not wide:
                break
            points |= {middle: self._at(middle) for middle in wide}
        means, falls = np.array([points[x] for x in known]).T
        return np.exp(known), means, falls

    def _at(self, log_beta: float) -> tuple[float, float]:
        beta = torch.tensor([np.exp(log_beta)], dtype=torch.float64)
        mean, fall = self._codebook.moments(beta, self._weights, euclidean=self._euclidean)
        # the curve is kept as its logarithm
        return max(float(mean), 1e-12), float(fall)


class Linearity(NamedTuple):
    """How straight the mean distance falls in t, over even times in [0, 1).

    Attributes:
        max_deviation: Largest |m(t) / m(0) - (1 - t)|.
        pearson: Correlation of the mean distance with t; -1 is a straight line.
    """

    max_deviation: float
    pearson: float


class ScheduleFit(NamedTuple):
    """What was found for a codebook.

    Attributes:
        power: The best (alpha, c).
        table: The exact schedule, tabulated.
        power_linearity: Of `power`, on rows that the fit has not seen if not all were taken.
        table_linearity: Of `table`, likewise.
        num_rows: Codes over which the mean was taken.
        curve: (beta, mean distance relative to that at beta = 0) where it was measured.
    """

    power: PowerSchedule
    table: TabulatedSchedule
    power_linearity: Linearity
    table_linearity: Linearity
    num_rows: int
    curve: tuple[tuple[float, float], ...]


def fit_schedule(
    codebook: Codebook, weights: Tensor | None = None, *, euclidean: bool = False
) -> ScheduleFit:
    """Return the schedules whose mean distance is closest to a straight line in t.

    Args:
        codebook: The codes. The mean is over all of them where the codebook knows how (FSQ grids)
            or is small; else over 2**25 / V rows drawn with a fixed seed, and what is reported is
            measured on as many others, or those that are left.
        weights: How often each code is x_1, not negative, finite, shape (V,); None is uniformly.
        euclidean: Make the Euclidean distance fall linearly, instead of the squared one.

    Returns:
        The fits and how straight they are.

    Raises:
        ConfigError: If the weights are not as stated, all codes are the same, or the codebook has
            no such distance.
    """
    chosen, others, num_rows = sampled_rows(codebook, weights)
    curve = DistanceCurve(codebook, chosen, euclidean=euclidean)
    power, table = _fit_power(curve), _fit_table(curve)
    power_linearity, table_linearity = (
        measure_linearity(codebook, schedule, others, euclidean=euclidean)
        for schedule in (power, table)
    )
    points = tuple(zip(curve.betas.tolist(), (curve.means / curve.start).tolist(), strict=True))
    return ScheduleFit(power, table, power_linearity, table_linearity, num_rows, points)


def measure_linearity(
    codebook: Codebook,
    schedule: Schedule,
    weights: Tensor | None = None,
    *,
    euclidean: bool = False,
    num_times: int = 50,
) -> Linearity:
    """Measure how straight the mean distance falls under a schedule, from its exact moments.

    Args:
        codebook: The codes.
        schedule: beta as a function of t.
        weights: How often each code is x_1, not negative, finite, shape (V,); None is uniformly.
        euclidean: Of the Euclidean distance instead of the squared one.
        num_times: Times looked at, >= 2, even in [0, 1).

    Returns:
        Deviation and correlation.

    Raises:
        ConfigError: If the weights are not as `Codebook.moments` wants them, or the codebook has no
            such distance.
    """
    t = torch.arange(num_times, dtype=torch.float64) / num_times
    mean = codebook.moments(schedule.beta(t), weights, euclidean=euclidean).mean
    deviation = float((mean / mean[0] - (1 - t)).abs().max())
    return Linearity(deviation, float(torch.corrcoef(torch.stack([t, mean]))[0, 1]))


def sampled_rows(
    codebook: Codebook, weights: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Return weights of rows that stand for all, of others to check with, and their number.

    All rows where the codebook's moments cost little or there are few; else 2**25 / V of those
    that are used, drawn with a fixed seed.

    Args:
        codebook: The codes.
        weights: As in `fit_schedule`.

    Returns:
        Two tensors of weights, shape (V,), None where all count alike, and a number of rows.

    Raises:
        ConfigError: If the weights are not as `weighted_share` wants them.
    """
    size = len(codebook)
    share = weighted_share(weights, size)
    used = share.nonzero().squeeze(-1)
    count = max(1, _MAX_ENTRIES // size)
    if codebook.has_fast_moments or len(used) <= count:
        return weights, weights, len(used)
    order = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(0))]
    parts = []
    for rows in (order[:count], order[count : 2 * count]):
        part = torch.zeros(size, dtype=torch.float64)
        part[rows] = share[rows]
        parts.append(part)
    return parts[0], parts[1], count


def _fit_power(curve: DistanceCurve) -> PowerSchedule:
    t = np.linspace(0, 1, 257)[1:-1]

    def deviation(log_parameters: np.ndarray) -> float:
        alpha, c = np.exp(log_parameters)
        betas = np.exp(np.clip(np.log(c) + alpha * np.log(t / (1 - t)), -700, 700))
        return float(np.abs(curve.mean(betas) / curve.start - (1 - t)).max())

    starts = [(alpha, c) for alpha in (0.3, 0.8, 1.2) for c in (0.5, 1.5, 4.0)]
    fits = [
        minimize(deviation, np.log(start), method="Nelder-Mead", options={"fatol": 1e-6})
        for start in starts
    ]
    best = min(fits, key=lambda fit: float(fit.fun))
    alpha, c = np.exp(best.x)
    return PowerSchedule(float(alpha), float(c))


def _fit_table(curve: DistanceCurve) -> TabulatedSchedule:
    logits = np.linspace(-MAX_LOGIT, MAX_LOGIT, NUM_KNOTS)
    betas = [curve.beta_at(1 / (1 + np.exp(x))) for x in logits]
    return TabulatedSchedule(np.log(betas).tolist(), max_logit=MAX_LOGIT)
