import pytest
import torch

from ursa.diffusion.clocks import checked_times, distance_by_time, equal_drops
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.linearization import fit_schedule
from ursa.diffusion.path import MetricPath
from ursa.errors import ConfigError


def test_a_curve_falls_by_equal_amounts_between_steps():
    times = torch.linspace(0, 0.99, 40).tolist()
    values = [(1 - t) ** 0.5 * 7 for t in times]
    found = equal_drops(8, times, values)
    assert float(found[0]) == 0
    expected = [7 * (1 - i / 8) for i in range(8)]
    assert [7 * (1 - t) ** 0.5 for t in found.tolist()] == pytest.approx(expected, abs=0.02)


def test_noise_of_a_measured_curve_does_no_harm():
    found = equal_drops(50, [0, 0.1, 0.3, 0.6, 0.9], [6.0, 6.1, 5.0, 5.2, 2.0])
    assert (found.diff() > 0).all()
    assert float(found[-1]) < 1


def test_a_linear_schedule_has_an_even_linear_clock():
    book = GridCodebook((8, 5, 5, 5))
    path = MetricPath(book, schedule=fit_schedule(book).table)
    torch.testing.assert_close(
        equal_drops(20, *distance_by_time(path)),
        torch.arange(20, dtype=torch.float64) / 20,
        rtol=0,
        atol=2e-3,
    )
    bent = equal_drops(20, *distance_by_time(MetricPath(book, alpha=1.0, c=5.0)))
    means = book.moments(5 * bent / (1 - bent)).mean
    torch.testing.assert_close(means.diff(), means.diff().mean().expand(19), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        ([0, 0.5], [1.0], "as many values as times"),
        ([0.1, 0.5], [2.0, 1.0], "rise from 0 to below 1"),
        ([0, 1.0], [2.0, 1.0], "rise from 0 to below 1"),
        ([0, float("nan"), 0.5], [3.0, 2.0, 1.0], "rise from 0 to below 1"),
        ([0, 0.5], [0.0, 0.0], "the first positive"),
        ([0, 0.5], [float("nan"), 0.0], "must be finite"),
    ],
)
def test_curves_that_do_not_fit_are_named(times, values, message):
    with pytest.raises(ConfigError, match=message):
        equal_drops(4, times, values)


@pytest.mark.parametrize("times", [[], [0.1, 0.2], [0, 0.5, 0.5], [0, 1.0], [0, float("nan")]])
def test_times_that_do_not_rise_are_named(times):
    with pytest.raises(ConfigError, match="times of steps must rise from 0 to below 1"):
        checked_times(times)
    with pytest.raises(ConfigError, match="num_steps must be at least 1"):
        equal_drops(0, [0, 0.5], [1, 0.5])
