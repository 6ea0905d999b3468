import numpy as np
import pytest
import torch

from ursa.diffusion import linearization
from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.linearization import DistanceCurve, fit_schedule, measure_linearity
from ursa.diffusion.path import MetricPath
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.schedule import PowerSchedule
from ursa.errors import ConfigError

LEVELS = (8, 5, 5, 5)
BOOKS = {
    "grid": GridCodebook(LEVELS),
    "product": ProductCodebook(LEVELS),
    "random": DenseCodebook(torch.randn(200, 16, generator=torch.Generator().manual_seed(0))),
}


@pytest.fixture(scope="module")
def fits():
    return {kind: fit_schedule(book) for kind, book in BOOKS.items()}


def test_the_curve_is_the_mean_distance_of_the_path():
    book = BOOKS["random"]
    path = MetricPath(book, alpha=0.8, c=2.0)
    ids, t = torch.arange(200), torch.tensor([0.0, 1e-5, 0.3, 0.8])
    expected = [float((path.probs(ids, x) * path.distance(ids)).sum(-1).mean()) for x in t]
    curve = DistanceCurve(book)
    assert curve.mean(path.beta(t).numpy()) == pytest.approx(expected, rel=1e-4)
    for share in (1 - 1e-6, 0.7, 0.02):
        beta = curve.beta_at(share)
        assert float(curve.mean(np.array(beta))) == pytest.approx(share * curve.start, rel=1e-6)


@pytest.mark.parametrize("kind", BOOKS)
def test_a_table_is_linear_for_any_codebook(fits, kind):
    fit = fits[kind]
    assert fit.table_linearity.max_deviation < 1e-4
    assert fit.table_linearity.pearson < -1 + 1e-8
    # between the times that the fit reports of
    again = measure_linearity(BOOKS[kind], fit.table, num_times=37)
    assert again.max_deviation < 1e-4


@pytest.mark.parametrize("kind", BOOKS)
def test_the_best_power_is_better_than_its_neighbours(fits, kind):
    fit = fits[kind]
    own = fit.power_linearity.max_deviation
    alpha, c = fit.power.alpha, fit.power.c
    for other in [(1.0, 5.0), (0.5, 6.0), (1.2 * alpha, c), (alpha, 1.3 * c), (alpha, c / 1.3)]:
        assert own < measure_linearity(BOOKS[kind], PowerSchedule(*other)).max_deviation


def test_grids_are_almost_linear_under_a_power_and_random_codes_are_not(fits):
    assert fits["grid"].power_linearity.max_deviation < 0.01
    assert fits["product"].power_linearity.max_deviation < 0.01
    assert fits["random"].power_linearity.max_deviation > 0.02


def test_the_euclidean_distance_and_frequencies_give_other_schedules(fits):
    weights = torch.zeros(1000)
    weights[:40] = torch.arange(40.0)  # the first codes lie in one corner
    weighted = fit_schedule(BOOKS["grid"], weights)
    for other in (weighted, fit_schedule(BOOKS["grid"], euclidean=True)):
        assert other.table_linearity.max_deviation < 1e-4
        assert abs(other.power.c - fits["grid"].power.c) > 1e-3
    measured = measure_linearity(BOOKS["grid"], weighted.table, weights)
    assert (
        measured.max_deviation
        < 1e-4
        < measure_linearity(BOOKS["grid"], weighted.table).max_deviation
    )


def test_only_codes_that_are_used_are_sampled(monkeypatch):
    monkeypatch.setattr(linearization, "_MAX_ENTRIES", 1000 * 20)
    book = DenseCodebook(torch.randn(1000, 8, generator=torch.Generator().manual_seed(2)))
    weights = torch.zeros(1000)
    weights[:15] = 1
    assert fit_schedule(book, weights).num_rows == 15
    weights[:30] = 1
    assert fit_schedule(book, weights).num_rows == 20


@pytest.mark.parametrize("codes", [torch.ones(1, 3), torch.ones(7, 3)])
def test_codes_that_are_all_the_same_have_no_schedule(codes):
    with pytest.raises(ConfigError, match="needs codes that differ"):
        fit_schedule(DenseCodebook(codes))


def test_a_sample_of_rows_is_judged_by_others(monkeypatch):
    monkeypatch.setattr(linearization, "_MAX_ENTRIES", 1000 * 150)
    book = DenseCodebook(torch.randn(1000, 16, generator=torch.Generator().manual_seed(1)))
    fit = fit_schedule(book)
    assert fit.num_rows == 150
    assert 1e-6 < fit.table_linearity.max_deviation < 0.02
    assert measure_linearity(book, fit.table).max_deviation < 0.02
