"""Random draws: inversion in two levels and the numbers that a number gives."""

import pytest
import torch
from scipy.stats import kstest

from ursa.diffusion.draws import draw, hashed_numbers


@pytest.mark.parametrize("size", [7, 256, 1000])
def test_a_weight_of_zero_is_never_drawn(size):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, size, generator=generator)
    weights[torch.rand(200, size, generator=generator) < 0.7] = 0
    weights[:, 1] += 0.1
    sums = weights.double().cumsum(-1)
    # numbers on the borders between weights, where rounding decides
    borders = sums / sums[:, -1:]
    for number in borders.T[:: max(1, size // 50)].clamp(max=1 - 2**-24):
        drawn = draw(weights, number.float())
        assert (weights.gather(-1, drawn.unsqueeze(-1)) > 0).all()


def test_numbers_of_a_seed_are_uniform_and_its_own():
    seeds = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sequence = hashed_numbers(seeds)
    first = [next(sequence) for _ in range(4)]
    for numbers in first:
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    together = torch.corrcoef(torch.stack([seeds, *first]))
    assert (together - torch.eye(5, dtype=torch.float64)).abs().max() < 0.07
    alone = hashed_numbers(seeds[17:18])
    assert [float(next(alone)) for _ in range(4)] == [float(each[17]) for each in first]
