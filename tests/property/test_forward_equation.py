"""The velocity of every path carries its law: Kolmogorov's forward equation, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath

times = st.floats(0.02, 0.95)
few = settings(max_examples=40, deadline=None)


@st.composite
def cases(draw, min_alpha=0.3):
    """A small path of each kind and a clean token."""
    kind, size = draw(st.sampled_from(["metric", "mixture", "masked"])), draw(st.integers(2, 7))
    x_1 = draw(st.integers(0, size - 1))
    if kind == "mixture":
        return MixturePath(size, dtype=torch.float64), x_1
    if kind == "masked":
        return MaskedPath(size, dtype=torch.float64), x_1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    codebook = torch.randn(size, draw(st.integers(1, 5)), generator=generator)
    codebook[0] *= draw(st.sampled_from([0.0, 1.0]))  # the zero code has no direction
    alpha, c = draw(st.floats(min_alpha, 2.0)), draw(st.floats(0.5, 8.0))
    return MetricPath(codebook, alpha=alpha, c=c, dtype=torch.float64), x_1


def law(path, x_1, t):
    return path.probs(torch.tensor(x_1), float(t))


def generators(path, x_1, t):
    """Return Q with Q[y, x] the rate from y to x, rows summing to 0, one for each t."""
    shape = (len(t), path.num_states)
    x_t = torch.arange(path.num_states).expand(shape)
    rates = path.velocity(x_t, torch.full(shape, x_1), t)
    return rates - torch.diag_embed(rates.sum(-1))


@few
@given(cases(), times)
def test_a_step_of_the_velocity_is_a_step_of_the_law(case, t):
    path, x_1 = case
    (rates,) = generators(path, x_1, torch.tensor([t], dtype=torch.float64))
    start = law(path, x_1, t)
    flow = start @ rates
    assert abs(float(flow.sum())) <= 1e-12 * float(rates.abs().max())
    # the error of one step falls with the square of its length, in units of the fastest change
    scale = float(rates.abs().max()) + 3 / t + 3 / (1 - t)
    for relative in (1e-2, 1e-3, 1e-4, 1e-5):
        dt = relative / scale
        error = law(path, x_1, t + dt) - start - dt * flow
        assert float(error.abs().max()) <= 4 * relative**2 + 1e-14


@settings(max_examples=12, deadline=None)
@given(cases(min_alpha=0.6))
def test_the_velocity_leads_from_the_source_to_the_law(case):
    path, x_1 = case
    # short steps at first, where the rate of alpha < 1 has its pole
    grid = 0.95 * torch.linspace(0, 1, 401, dtype=torch.float64) ** 2
    middle, length = (grid[1:] + grid[:-1]) / 2, grid.diff()
    steps = torch.matrix_exp(generators(path, x_1, middle) * length[:, None, None])
    now = law(path, x_1, 0.0)
    for index, step in enumerate(steps):
        now = now @ step
        if index % 100 == 99:
            expected = law(path, x_1, grid[index + 1])
            torch.testing.assert_close(now, expected, rtol=0, atol=2e-3)
