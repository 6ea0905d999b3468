import itertools

import pytest
import torch
from scipy import stats

from tests.bench import toy

LEVELS = (2, 2, 2)


@pytest.fixture(scope="module")
def chain() -> toy.Chain:
    """Three tokens of eight codes: 512 sequences."""
    return toy.Chain(LEVELS, 3)


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(8), repeat=3)))


def test_probabilities_and_entropy_are_those_of_all_sequences(chain, sequences):
    nll = chain.nll(sequences).double()
    assert float(nll.neg().exp().sum()) == pytest.approx(1, abs=1e-5)
    assert chain.entropy() == pytest.approx(float((nll.neg().exp() * nll).sum()), abs=1e-4)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5])
def test_posterior_is_that_of_all_sequences(chain, sequences, t):
    x_t = torch.tensor([[0, 3, 5], [7, 7, 1], [2, 6, 4]])
    likelihood = chain.path.probs(torch.arange(8), t).double()
    weights = chain.nll(sequences).double().neg().exp() * torch.stack(
        [likelihood[sequences, tokens].prod(-1) for tokens in x_t]
    )
    expected = torch.stack(
        [
            torch.stack([row[sequences[:, n] == code].sum() for n in range(3) for code in range(8)])
            for row in weights / weights.sum(-1, keepdim=True)
        ]
    ).view(3, 3, 8)
    torch.testing.assert_close(chain.posterior(x_t, t).double(), expected, rtol=1e-4, atol=1e-6)


def p_value(kernel: str) -> float:
    """Chi-square of two steps of a chain of one token against its law."""
    chain = toy.Chain(LEVELS, 1)
    generator = torch.Generator().manual_seed(0)
    x, num_forwards = toy.generate(chain, kernel, [0.0, 0.4], 20_000, generator)
    assert num_forwards == (1 if kernel == "Euler" else 2)
    counts = torch.bincount(x[:, 0], minlength=8).double()
    law = chain.start.double() / chain.start.double().sum()
    kept = law * len(x) > 5
    expected = torch.cat([law[kept], law[~kept].sum().view(1)]) * len(x)
    found = torch.cat([counts[kept], counts[~kept].sum().view(1)])
    return float(stats.chisquare(found, expected).pvalue)


def test_exact_steps_of_one_token_draw_from_its_law_and_euler_steps_do_not():
    assert p_value("exact") > 1e-3
    assert p_value("Euler") < 1e-6


def test_data_are_at_the_noise_of_every_measure_and_other_tokens_are_not():
    chain = toy.Chain((4, 4, 4), toy.NUM_TOKENS)
    judge = toy.Judge(chain, 1000)
    generator = torch.Generator().manual_seed(0)
    data = chain.sample(1000, generator)
    found = judge(data)
    assert abs(found.gap) < 0.5
    assert abs(found.energy) < 0.05
    assert max(found.near, found.far) < 0.05
    # every token from its own law, but without its neighbours
    alone = torch.stack(
        [column[torch.randperm(1000, generator=generator)] for column in data.T], -1
    )
    assert judge(alone).gap > 10
    assert judge(alone).near > 0.2


def test_the_goal_wants_the_gap_and_the_energy():
    def row(kernel: str, num_steps: int, gap: float, energy: float) -> toy.Row:
        return toy.Row(kernel, "official", num_steps, num_steps, [toy.Measures(gap, energy, 0, 0)])

    data = toy.Row("data", "", 0, 0, [toy.Measures(0, energy, 0, 0) for energy in (0, 0.01)])
    baseline = row("Euler", 64, 3.0, 0.0)
    for others, verdict in (
        ([row("exact", 12, 2.9, 0.0)], "holds"),
        ([row("exact", 12, 2.9, 0.1), row("exact", 25, 3.1, 0.0)], "does not hold"),
        ([row("exact", 32, 1.0, 0.0), row("Euler", 25, 1.0, 0.0)], "does not hold"),
    ):
        lines = toy.goal([data, baseline, *others])
        assert lines[-1].endswith(f"steps: {verdict} with the official clock")


def test_measured_clocks_follow_entropy_and_distance():
    clocks = toy.measured_clocks(toy.Chain((4, 4, 4), toy.NUM_TOKENS), 64)
    entropy, both = (clock(16) for clock in clocks.values())
    # the distance falls earlier
    assert (both[1:] < entropy[1:]).sum() > 10
