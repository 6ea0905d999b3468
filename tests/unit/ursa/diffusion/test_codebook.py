"""The operations of a codebook against exact probabilities, with fixed seeds."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from ursa.diffusion import codebook as codebook_module
from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath
from ursa.diffusion.solver import exact_step
from ursa.errors import ConfigError, DataError
from ursa.tokenizers.quantizers import FSQuantizer

COUNT = 40_000
LEAST_P = 1e-3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


CODES = {
    "random": torch.randn(300, 4, generator=seeded()),
    "fsq": FSQuantizer((8, 5, 5, 3)).codebook,  # 600 codes, some on one ray, one zero
}
every_codebook = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)


def law(codes, x_1, beta):
    """p_b(x | x_1) in float64, shape (V,), and the distances."""
    rows = torch.nn.functional.normalize(codes.double(), dim=-1)
    distance = (rows - rows[x_1]).square().sum(-1)
    return torch.softmax(-beta * distance, dim=-1), distance


def p_value(ids, probs):
    """Chi-square of counts against probabilities; codes of less than five draws are one class."""
    counts = torch.bincount(ids, minlength=len(probs)).double()
    expected = probs * len(ids)
    rare = expected < 5
    classes = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    seen = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    if classes[-1] < 5:
        assert seen[-1] <= 25
        classes, seen = classes[:-1], seen[:-1]
    return chisquare(seen, classes * seen.sum() / classes.sum()).pvalue


def numbers(generator, count=COUNT):
    return lambda: torch.rand(3, count, generator=generator)


@every_codebook
@pytest.mark.parametrize("beta", [0.2, 2.0, 12.0])
def test_noise_has_the_law_of_the_path(codes, beta):
    x_1 = torch.full((COUNT,), 17)
    drawn = DenseCodebook(codes).noise(
        x_1, torch.tensor(beta), torch.rand(COUNT, generator=seeded(1))
    )
    assert p_value(drawn, law(codes, 17, beta)[0]) > LEAST_P


@every_codebook
@pytest.mark.parametrize("beta", [0.2, 2.0, 12.0])
def test_jumps_have_the_law_of_the_velocity(codes, beta):
    x_1, x_t = torch.full((COUNT,), 17), torch.full((COUNT,), 211)
    book = DenseCodebook(codes)
    probs, distance = law(codes, 17, beta)
    flow = probs * (distance[211] - distance).clamp_min(0)
    rate = book.rate(x_t[:3], x_1[:3], torch.tensor(beta))
    assert rate.tolist() == pytest.approx([float(flow.sum())] * 3, rel=1e-5)
    exact = DenseCodebook(codes, torch.float64).rate(
        x_t[:1], x_1[:1], torch.tensor(beta, dtype=torch.float64)
    )
    assert float(exact) == pytest.approx(float(flow.sum()), rel=1e-10)
    drawn = book.jump(x_t, x_1, torch.tensor(beta), torch.rand(COUNT, generator=seeded(2)))
    assert p_value(drawn, flow / flow.sum()) > LEAST_P


@every_codebook
def test_exact_steps_carry_the_law_however_long_they_are(codes):
    book, generator = DenseCodebook(codes), seeded(3)
    x_1 = torch.full((COUNT,), 17)
    x = torch.randint(len(codes), (COUNT,), generator=generator)
    for beta, beta_next in itertools.pairwise([0.0, 2.0, 6.0, 30.0]):
        x = book.exact_step(x, x_1, torch.tensor(beta), torch.tensor(beta_next), numbers(generator))
        assert p_value(x, law(codes, 17, beta_next)[0]) > LEAST_P


def test_exact_steps_of_every_path_carry_its_law():
    codes = torch.randn(40, 3, generator=seeded())
    paths = [MetricPath(codes, alpha=0.8, c=2.0), MixturePath(40), MaskedPath(40)]
    for path in paths:
        generator = seeded(4)
        x_1 = torch.full((COUNT,), 7)
        x = path.sample(x_1, 0.2, generator=generator)
        for t, t_next in ((0.2, 0.5), (0.5, 0.9)):
            x = exact_step(path, x, x_1, t=t, t_next=t_next, numbers=numbers(generator))
        assert p_value(x, path.probs(torch.tensor(7), 0.9).double()) > LEAST_P


def test_a_token_without_time_stays_and_the_callers_tensors_too():
    path = MetricPath(CODES["random"], alpha=1.0, c=3.0)
    generator = seeded(5)
    x_1, x_t = torch.randint(300, (2, 4, 2, 3, 3), generator=generator)
    kept = x_t.clone()
    t, t_next = torch.tensor([0.3, 0.1]), torch.tensor([0.3, 0.9])
    moved = exact_step(
        path,
        x_t,
        x_1,
        t=t.expand(4, 2),
        t_next=t_next.expand(4, 2),
        numbers=lambda: torch.rand(3, *x_1.shape, generator=generator),
    )
    assert torch.equal(x_t, kept)
    assert torch.equal(moved[:, 0], x_t[:, 0])
    assert (moved[:, 1] != x_t[:, 1]).float().mean() > 0.5
    with pytest.raises(ConfigError, match=r"t_next must be in \[t, 1\)"):
        exact_step(path, x_t, x_1, t=0.5, t_next=0.4, numbers=lambda: x_t)
    with pytest.raises(DataError, match=r"x_t must be ids in \[0, 300\)"):
        exact_step(path, x_t + 300, x_1, t=0.4, t_next=0.5, numbers=lambda: x_t)


@every_codebook
def test_results_do_not_depend_on_the_size_of_the_parts(codes, monkeypatch):
    book, generator = DenseCodebook(codes), seeded(6)
    x_1, x_t = torch.randint(len(codes), (2, 50, 7), generator=generator)
    beta, uniform = (
        20 * torch.rand(50, 1, generator=generator),
        torch.rand(50, 7, generator=seeded(7)),
    )

    def results():
        return [
            book.noise(x_1, beta, uniform),
            book.jump(x_t, x_1, beta, uniform),
            book.rate(x_t, x_1, beta),
        ]

    whole = results()
    for elements in (1, 5 * len(codes)):
        monkeypatch.setattr(codebook_module, "_PART_ELEMENTS", elements)
        for one, other in zip(whole, results(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_jump_from_the_closest_code_goes_nowhere():
    book = DenseCodebook(CODES["random"])
    x = torch.arange(300)
    assert torch.equal(book.jump(x, x, torch.tensor(3.0), torch.rand(300)), x)
    assert (book.rate(x, x, torch.tensor(3.0)) == 0).all()


def test_moments_are_those_of_the_law():
    codes, betas = CODES["fsq"], torch.tensor([0.0, 1.0, 8.0])
    share = torch.rand(len(codes), generator=seeded(8))
    for weights in (None, share):
        part = torch.full((len(codes),), 1.0) if weights is None else weights
        part = part.double() / part.sum()
        mean, variance = DenseCodebook(codes, torch.float64).moments(betas, weights)
        for place, beta in enumerate(betas.tolist()):
            first = second = 0.0
            for x_1 in range(len(codes)):
                probs, distance = law(codes, x_1, beta)
                here = float(probs @ distance)
                first += float(part[x_1]) * here
                second += float(part[x_1]) * float(probs @ (distance - here).square())
            assert float(mean[place]) == pytest.approx(first, rel=1e-8)
            assert float(variance[place]) == pytest.approx(second, rel=1e-8)
