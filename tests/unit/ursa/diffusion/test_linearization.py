import numpy as np
import pytest
import torch

from ursa.diffusion.linearization import fit_schedule, mean_distance
from ursa.diffusion.path import MetricPath
from ursa.tokenizers.quantizers import FSQuantizer


@pytest.fixture(scope="module")
def codebook():
    return FSQuantizer((5, 4, 3)).codebook


def test_mean_distance_is_that_of_the_path(codebook):
    path = MetricPath(codebook, alpha=0.8, c=2.0)
    t = torch.tensor([0.0, 0.3, 0.8])
    expected = [
        float((path.probs(ids, x) * path.distance(ids)).sum(-1).mean())
        for ids in [torch.arange(60)]
        for x in t
    ]
    measured = mean_distance(codebook, path.beta(t).numpy())
    assert measured == pytest.approx(expected, rel=1e-5)
    assert (np.diff(measured) < 0).all()


def test_fitted_schedule_is_closer_to_a_line_than_others(codebook):
    fit = fit_schedule(codebook)
    t = np.linspace(0.01, 0.99, 99)

    def deviation(alpha, c):
        curve = mean_distance(codebook, np.concatenate([[0.0], c * (t / (1 - t)) ** alpha]))
        return np.abs(curve[1:] / curve[0] - (1 - t)).max()

    own = deviation(fit.alpha, fit.c)
    assert own == pytest.approx(fit.max_deviation, abs=0.01)
    assert own < 0.1
    for alpha, c in [(1.0, 5.0), (0.5, 6.0), (fit.alpha * 1.2, fit.c), (fit.alpha, fit.c * 1.3)]:
        assert own < deviation(alpha, c)
