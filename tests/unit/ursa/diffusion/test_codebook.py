"""The operations of a codebook against exact probabilities, with fixed seeds."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from ursa.diffusion import codebook as codebook_module
from ursa.diffusion import grid as grid_module
from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.solver import euler_step, exact_step, jump_threshold
from ursa.errors import ConfigError, DataError
from ursa.tokenizers.quantizers import FSQuantizer

COUNT = 40_000
LEAST_P = 1e-3
LEVELS = (8, 5, 5, 3)  # 600 codes, some on one ray, one zero
SMALL = (4, 4, 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


RANDOM = torch.randn(300, 4, generator=seeded())
KINDS = {
    "random": lambda dtype: DenseCodebook(RANDOM, dtype),
    "fsq": lambda dtype: DenseCodebook(FSQuantizer(LEVELS).codebook, dtype),
    "grid": lambda dtype: GridCodebook(LEVELS, dtype),
    "product": lambda dtype: ProductCodebook(LEVELS, dtype),
}
BOOKS = {kind: make(torch.float32) for kind, make in KINDS.items()}
every_codebook = pytest.mark.parametrize("kind", KINDS)
X_1, X_T = 17, 211


def law(kind, x_1, beta):
    """p_b(x | x_1) in float64, shape (V,), and the distances."""
    codes = RANDOM if kind == "random" else FSQuantizer(LEVELS).codebook
    rows = codes.double()
    if kind != "product":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    distance = (rows - rows[x_1]).square().sum(-1)
    return torch.softmax(-beta * distance, dim=-1), distance


def flows(kind, x_t, x_1, beta):
    """Rates of the jumps from x_t in float64, shape (V,)."""
    probs, distance = law(kind, x_1, beta)
    if kind != "product":
        return probs * (distance[x_t] - distance).clamp_min(0)
    digits = torch.stack(
        [
            axis.flatten()
            for axis in torch.meshgrid(
                *[torch.arange(level) for level in reversed(LEVELS)], indexing="ij"
            )
        ],
        dim=-1,
    ).flip(-1)
    rates = torch.zeros(len(digits), dtype=torch.float64)
    for axis, level in enumerate(LEVELS):
        values = (torch.arange(level, dtype=torch.float64) - level // 2) / (level // 2)
        own = (values - values[digits[x_1, axis]]).square()
        rate = torch.softmax(-beta * own, -1) * (own[digits[x_t, axis]] - own).clamp_min(0)
        alone = (digits == digits[x_t]).sum(-1) == len(LEVELS) - 1
        moves = alone & (digits[:, axis] != digits[x_t, axis])
        rates[moves] = rate[digits[moves, axis]]
    return rates


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
    return lambda: torch.rand(3, count, generator=generator, dtype=torch.float64)


def uniform(count, seed):
    return torch.rand(count, generator=seeded(seed), dtype=torch.float64)


@every_codebook
@pytest.mark.parametrize("beta", [0.0, 0.2, 2.0, 12.0])
def test_noise_has_the_law_of_the_path(kind, beta):
    drawn = BOOKS[kind].noise(torch.full((COUNT,), X_1), torch.tensor(beta), uniform(COUNT, 1))
    assert p_value(drawn, law(kind, X_1, beta)[0]) > LEAST_P


@every_codebook
def test_noise_of_many_betas_has_the_law_of_each(kind):
    betas = torch.tensor([0.5, 3.0, 9.0]).repeat(COUNT)
    drawn = BOOKS[kind].noise(torch.full(betas.shape, X_1), betas, uniform(len(betas), 11))
    for place, beta in enumerate(betas[:3].tolist()):
        assert p_value(drawn[place::3], law(kind, X_1, beta)[0]) > LEAST_P


@every_codebook
@pytest.mark.parametrize("beta", [0.2, 2.0, 12.0])
def test_jumps_have_the_law_of_the_velocity(kind, beta):
    x_1, x_t = torch.full((COUNT,), X_1), torch.full((COUNT,), X_T)
    flow = flows(kind, X_T, X_1, beta)
    rate = BOOKS[kind].rate(x_t[:3], x_1[:3], torch.tensor(beta))
    assert rate.tolist() == pytest.approx([float(flow.sum())] * 3, rel=1e-5)
    one = (x_t[:1], x_1[:1], torch.tensor(beta, dtype=torch.float64))
    exact = KINDS[kind](torch.float64)
    assert float(exact.rate(*one)) == pytest.approx(float(flow.sum()), rel=1e-9)
    torch.testing.assert_close(exact.flow(*one)[0], flow, rtol=1e-9, atol=1e-12)
    drawn = BOOKS[kind].jump(x_t, x_1, torch.tensor(beta), uniform(COUNT, 2))
    assert p_value(drawn, flow / flow.sum()) > LEAST_P


@every_codebook
def test_exact_steps_carry_the_law_however_long_they_are(kind):
    book, generator = BOOKS[kind], seeded(3)
    x_1 = torch.full((COUNT,), X_1)
    x = torch.randint(len(book), (COUNT,), generator=generator)
    for beta, beta_next in itertools.pairwise([0.0, 2.0, 6.0, 30.0]):
        x = book.exact_step(x, x_1, torch.tensor(beta), torch.tensor(beta_next), numbers(generator))
        assert p_value(x, law(kind, X_1, beta_next)[0]) > LEAST_P


@every_codebook
def test_the_flows_carry_the_law(kind):
    """Kolmogorov: d/db p_b(x) = sum_y p_b(y) u(x; y) - p_b(x) sum_z u(z; x)."""
    small = {
        "random": DenseCodebook(RANDOM[:20], torch.float64),
        "fsq": DenseCodebook(FSQuantizer(SMALL).codebook, torch.float64),
        "grid": GridCodebook(SMALL, torch.float64),
        "product": ProductCodebook(SMALL, torch.float64),
    }[kind]
    size, beta, step = len(small), 1.3, 1e-5
    x_1 = torch.tensor(5)

    def probs(b):
        return torch.softmax(-b * small.distance(x_1), dim=-1)

    now = torch.tensor(beta, dtype=torch.float64)
    rates = small.flow(torch.arange(size), x_1.expand(size), now)
    p = probs(beta)
    change = p @ rates - p * rates.sum(-1)
    slope = (probs(beta + step) - probs(beta - step)) / (2 * step)
    torch.testing.assert_close(change, slope, rtol=0, atol=1e-9)


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
    path = MetricPath(RANDOM, alpha=1.0, c=3.0)
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
def test_results_do_not_depend_on_how_tokens_are_taken_together(kind, monkeypatch):
    book, generator = BOOKS[kind], seeded(6)
    x_1, x_t = torch.randint(len(book), (2, 50, 2), generator=generator)
    for count in (3, 50):  # few betas and one a row
        beta = (20 * torch.rand(count, 1, generator=generator)).repeat(50, 1)[:50]
        uniforms = uniform(100, 7).view(50, 2)

        def results(part=slice(None), inputs=(x_1, x_t, beta, uniforms)):
            clean, here, b, u = (each[part] for each in inputs)
            return [
                book.noise(clean, b, u),
                book.jump(here, clean, b, u),
                book.rate(here, clean, b),
            ]

        whole = results()
        split = [
            torch.cat(pair) for pair in zip(results(slice(9)), results(slice(9, 50)), strict=True)
        ]
        cut = [split]
        for elements in (1, 5 * len(book)):
            monkeypatch.setattr(codebook_module, "_PART_ELEMENTS", elements)
            monkeypatch.setattr(grid_module, "_PART_TOKENS", elements)
            cut.append(results())
        monkeypatch.undo()
        for other in cut:
            assert torch.equal(whole[0], other[0])
            assert (whole[1] != other[1]).sum() <= 1  # rounding of a sum may decide
            torch.testing.assert_close(whole[2], other[2], rtol=1e-5, atol=1e-6)


@every_codebook
def test_a_jump_from_the_closest_code_goes_nowhere(kind):
    book = BOOKS[kind]
    x = torch.arange(len(book))
    assert torch.equal(book.jump(x, x, torch.tensor(3.0), torch.rand(len(x))), x)
    assert (book.rate(x, x, torch.tensor(3.0)) == 0).all()


@pytest.mark.parametrize("euclidean", [False, True])
@every_codebook
def test_moments_are_those_of_the_law(kind, euclidean):
    book = KINDS[kind](torch.float64)
    betas = torch.tensor([0.0, 1.0, 8.0], dtype=torch.float64)
    if kind == "product" and euclidean:
        with pytest.raises(ConfigError, match="squared distances alone"):
            book.moments(betas, euclidean=True)
        return
    share = torch.rand(len(book), generator=seeded(8))
    distances = torch.stack([law(kind, x_1, 1.0)[1] for x_1 in range(len(book))])
    distances = distances.masked_fill(distances < 1e-10, 0)
    lengths = distances.sqrt() if euclidean else distances
    for weights in (None, share):
        part = torch.ones(len(book)) if weights is None else weights
        part = part.double() / part.sum()
        found = book.moments(betas, weights, euclidean=euclidean)
        for place, beta in enumerate(betas.tolist()):
            probs = torch.softmax(-beta * distances, dim=-1)
            mean = (probs * lengths).sum(-1)
            fall = (probs * lengths * distances).sum(-1) - mean * (probs * distances).sum(-1)
            assert float(found.mean[place]) == pytest.approx(float(part @ mean), rel=1e-7)
            assert float(found.fall[place]) == pytest.approx(float(part @ fall), rel=1e-7)


def test_weights_that_are_none_are_named():
    book, beta = BOOKS["grid"], torch.ones(1)
    with pytest.raises(ConfigError, match=r"weights must have shape \(600,\), got \(3,\)"):
        book.moments(beta, torch.ones(3))
    with pytest.raises(ConfigError, match="not all zero"):
        book.moments(beta, torch.zeros(600))


@every_codebook
def test_exact_steps_of_a_token_do_not_depend_on_its_neighbours(kind):
    book = BOOKS[kind]
    x_1, x_t = torch.randint(len(book), (2, 2, 60), generator=seeded(9))
    beta, beta_next = torch.tensor(0.5), torch.tensor(9.0)

    def step(rows):
        """Every row has its own generator, as videos of a batch have."""
        own = [seeded(20 + row) for row in rows]

        def more():
            drawn = [torch.rand(3, 60, generator=each, dtype=torch.float64) for each in own]
            return torch.stack(drawn, dim=1)

        return book.exact_step(x_t[rows], x_1[rows], beta, beta_next, more)

    assert torch.equal(step([0, 1])[0], step([0])[0])


@every_codebook
def test_euler_steps_in_beta_have_their_law(kind):
    """A jump with probability 1 - exp(-rate Delta beta), to a code in proportion to the flow."""
    path = MetricPath(BOOKS[kind], alpha=0.8, c=2.0)
    t, t_next = 0.3, 0.5
    beta, beta_next = (float(path.beta(torch.tensor(x, dtype=torch.float64))) for x in (t, t_next))
    flow = flows(kind, X_T, X_1, beta)
    leaves = 1 - torch.exp(-flow.sum() * (beta_next - beta))
    expected = leaves * flow / flow.sum()
    expected[X_T] = 1 - leaves
    x_1, x_t = torch.full((COUNT,), X_1), torch.full((COUNT,), X_T)
    uniforms = torch.rand(2, COUNT, generator=seeded(10), dtype=torch.float64)
    moved = euler_step(path, x_t, x_1, t=t, t_next=t_next, uniforms=uniforms, in_beta=True)
    assert p_value(moved, expected) > LEAST_P
    # the official step counts beta'(t) dt, which is another time
    official = jump_threshold(path, x_t[:1], x_1[:1], t, t_next)
    assert abs(float(official) - float(leaves)) > 0.01


@every_codebook
def test_any_layout_of_ids_is_taken(kind):
    book, beta = BOOKS[kind], torch.tensor(2.0)
    x_1, x_t = torch.randint(len(book), (2, 4, 6), generator=seeded(12))
    numbers = uniform(24, 13).view(4, 6)
    for operation in (book.noise, lambda *given: book.jump(x_t.T.contiguous(), *given)):
        turned = operation(x_1.T, beta, numbers.T)
        assert torch.equal(turned, operation(x_1.T.contiguous(), beta, numbers.T.contiguous()))
    for shape in ((), (0,), (3, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        assert book.noise(ids, beta, torch.zeros(shape)).shape == shape
        assert book.rate(ids, ids, beta).shape == shape


@every_codebook
def test_late_in_the_path_a_token_is_its_code(kind):
    book = BOOKS[kind]
    x_1 = torch.arange(len(book))
    for beta in (1e4, 1e9, 1e30):
        drawn = book.noise(x_1, torch.tensor(beta), uniform(len(book), 14))
        distance = book.distance(x_1).gather(-1, drawn.unsqueeze(-1))
        assert float(distance.max()) < 1e-5


@every_codebook
def test_autocast_does_not_round_distances(kind):
    book, beta = BOOKS[kind], torch.tensor(6.0)
    x_1, x_t = torch.randint(len(book), (2, 40), generator=seeded(15))
    plain = book.rate(x_t, x_1, beta), book.noise(x_1, beta, uniform(40, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = book.rate(x_t, x_1, beta), book.noise(x_1, beta, uniform(40, 16))
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])
