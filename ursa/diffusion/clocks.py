"""Clocks of the sampler: at which times its steps start.

The network gets no time, so the grid of the sampler is free: it need not be that of training. A
clock is a rising list of times, the first 0; the last step ends at 1. `inference_times` is the
official one; here are those that follow a measured curve.

docs/math.md, "The clock is free", says why equal drops of the loss are a good choice.

References:
    Entropy clock: arXiv 2504.13612; of discrete diffusion: arXiv 2602.06849. The linear clock is
    ours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ursa.diffusion.linearization import sampled_rows
from ursa.diffusion.path import MetricPath
from ursa.errors import ConfigError


def equal_drops(num_steps: int, times: Sequence[float], values: Sequence[float]) -> Tensor:
    """Return times at which a falling curve has fallen by equal amounts.

    Args:
        num_steps: Number of steps n, >= 1.
        times: Where the curve was measured, rising from 0 to below 1, at least two.
        values: What was measured, finite, as many as times, the first > 0, such as held-out loss
            in nats; below 0 counts as 0; it counts as 0 at t = 1; a rise, as noise makes, counts as
            even.

    Returns:
        Start times of the steps, shape (n,), float64, rising from 0.

    Raises:
        ConfigError: If num_steps, times or values are not as stated, or steps come too close
            together or to 1 (`checked_times`).
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
    t = np.asarray(times, dtype=np.float64)
    measured = np.asarray(values, dtype=np.float64)
    if (
        t.shape != measured.shape
        or len(t) < 2
        or t[0] != 0
        or not t[-1] < 1
        or not (np.diff(t) > 0).all()
    ):
        raise ConfigError(
            "a curve needs as many values as times, and times that rise from 0 to below 1, got "
            f"{len(times)} times ({_shown(times)}) and {len(values)} values"
        )
    if not (np.isfinite(measured).all() and measured[0] > 0):
        raise ConfigError(f"values must be finite and the first positive, got {_shown(values)}")
    falling = np.minimum.accumulate(np.append(measured, 0.0).clip(min=0))
    curve = PchipInterpolator(np.append(t, 1.0), falling)
    # dense in 1 - t as well as in t: curves fall most near the end
    fine = np.unique(np.concatenate([np.linspace(0, 1, 4097), 1 - np.geomspace(1, 2e-6, 4097)]))
    heights = np.minimum.accumulate(curve(fine))
    targets = falling[0] * (1 - np.arange(num_steps) / num_steps)
    # the first time at which the curve is as low as the target
    found = np.interp(-targets, -heights, fine)
    found[0] = 0.0
    return checked_times(found.tolist())


def distance_by_time(path: MetricPath) -> tuple[list[float], list[float]]:
    """Return times and the mean squared distance of x_t from x_1, which the linear clock follows.

    x_1 is uniform over the codes. Seconds for 64,000 codes, so whoever asks often keeps it.

    Returns:
        57 times, rising from 0 to 0.99995, and as many distances.
    """
    even = torch.linspace(0, 0.95, 39, dtype=torch.float64)
    t = torch.cat([even, 1 - 0.05 * torch.logspace(0, -3, 19, dtype=torch.float64)[1:]])
    weights, _, _ = sampled_rows(path.codebook)
    return t.tolist(), path.codebook.moments(path.beta(t), weights).mean.tolist()


def checked_times(times: Sequence[float]) -> Tensor:
    """Return start times as a tensor, shape (n,), float64.

    Raises:
        ConfigError: Unless they rise from 0 to at most 1 - 1e-6.
    """
    found = torch.tensor(list(times), dtype=torch.float64)
    rises = len(found) > 0 and bool((found.diff() > 0).all())
    if not (rises and found[0] == 0 and found[-1] <= 1 - 1e-6):
        raise ConfigError(
            "times of steps must rise from 0 to below 1 (at most 1 - 1e-6), got "
            f"{len(found)}: {_shown(times)}"
        )
    return found


def _shown(values: Sequence[float]) -> str:
    """Return the first and the last values, for an error of one line."""
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "...", *texts[-3:]])
