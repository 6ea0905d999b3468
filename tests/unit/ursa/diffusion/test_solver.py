import pytest
import torch

from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath
from ursa.diffusion.solver import (
    draw_from_head,
    draw_posterior,
    euler_step,
    guide,
    jump_threshold,
    official_step,
)
from ursa.diffusion.timesteps import inference_times
from ursa.errors import ConfigError

SHAPE = (2, 3, 2, 2)
SIZE = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PATHS = {
    "metric": MetricPath(torch.randn(SIZE, 3, generator=seeded()), alpha=1.0, c=3.0),
    "mixture": MixturePath(SIZE),
    "masked": MaskedPath(SIZE),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def tokens(seed, shape=SHAPE):
    return torch.randint(SIZE, shape, generator=seeded(seed))


@every_path
def test_steps_lead_to_the_law_of_the_path(path):
    count, generator = 20_000, seeded(1)
    x_1 = torch.arange(SIZE).repeat_interleave(count // SIZE)
    x_t = path.source((count,), generator=generator)
    times = (0.9 * inference_times(150, 1.0)).tolist()
    for t, t_next in zip(times, [*times[1:], 0.9], strict=True):
        uniforms = torch.rand(2, count, generator=generator)
        x_t = euler_step(path, x_t, x_1, t=t, t_next=t_next, uniforms=uniforms)
    for ids in range(SIZE):
        share = torch.bincount(x_t[x_1 == ids], minlength=path.num_states) / (count // SIZE)
        expected = path.probs(torch.tensor(ids), 0.9)
        torch.testing.assert_close(share, expected, rtol=0, atol=0.04)


@every_path
def test_threshold_is_that_of_the_step(path):
    x_1, generator = tokens(1), seeded(2)
    x_t = path.sample(x_1, 0.3, generator=generator)
    uniforms = torch.rand(2, *SHAPE, generator=generator)
    threshold = jump_threshold(path, x_t, x_1, 0.3, 0.5)
    rate = path.velocity(x_t, x_1, 0.3).sum(-1)
    torch.testing.assert_close(threshold, 1 - torch.exp(-rate * 0.2))
    moved = euler_step(path, x_t, x_1, t=0.3, t_next=0.5, uniforms=uniforms)
    assert torch.equal(moved != x_t, uniforms[0] < threshold)
    assert 0 < (moved != x_t).sum() < moved.numel()


def test_the_first_step_of_the_metric_path_is_idle():
    path, x_t, x_1 = PATHS["metric"], tokens(1), tokens(2)
    uniforms = torch.zeros(2, *SHAPE)
    moved = euler_step(path, x_t, x_1, t=0.0, t_next=0.1, uniforms=uniforms)
    assert torch.equal(moved, x_t)


@every_path
def test_frames_move_in_their_own_time(path):
    x_1, x_t = tokens(1), path.source(SHAPE, generator=seeded(2))
    uniforms = torch.rand(2, *SHAPE, generator=seeded(3))
    t = torch.tensor([[0.1, 0.5, 0.8], [0.2, 0.2, 0.9]])
    t_next = torch.tensor([[0.1, 0.7, 0.9], [0.3, 0.2, 1.0]])
    together = euler_step(path, x_t, x_1, t=t, t_next=t_next, uniforms=uniforms)
    for row in range(2):
        for frame in range(3):
            place = (row, frame)
            alone = euler_step(
                path,
                x_t[place],
                x_1[place],
                t=float(t[place]),
                t_next=float(t_next[place]),
                uniforms=uniforms[:, row, frame],
            )
            assert torch.equal(together[place], alone)
    assert torch.equal(together[0, 0], x_t[0, 0])
    assert torch.equal(together[1, 1], x_t[1, 1])


@every_path
def test_steps_leave_the_tensors_of_the_caller_alone(path):
    # the official step writes distances into its logits and new tokens into its latents
    x_1, x_t = tokens(1), path.source(SHAPE, generator=seeded(2))
    logits = torch.randn(*SHAPE, SIZE, generator=seeded(3))
    uniform, uniforms = torch.rand(SHAPE, generator=seeded(4)), torch.rand(2, *SHAPE)
    given = (x_1, x_t, logits, uniform, uniforms)
    copies = [tensor.clone() for tensor in given]
    euler_step(path, x_t, x_1, t=0.5, t_next=0.9, uniforms=uniforms)
    draw_posterior(logits, uniform)
    draw_posterior(logits, uniform, temperature=0.5, top_k=3, top_p=0.6)
    for is_last in (False, True):
        official_step(path, x_t, logits, 0.5, 0.9, is_last=is_last, generator=seeded())
    official_step(path, x_t, logits, 0.5, 0.9, is_last=True, generator=seeded(), x_1=x_1)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_official_order_of_draws():
    path, x_t, generator = PATHS["metric"], tokens(1), seeded(7)
    logits = torch.randn(*SHAPE, SIZE, generator=seeded(3))
    moved = official_step(path, x_t, logits, 0.6, 0.7, is_last=False, generator=seeded(7))
    rows = torch.softmax(logits, -1).flatten(0, -2)
    x_1 = torch.multinomial(rows, 1, generator=generator).view(SHAPE)
    jumps = torch.rand(SHAPE, generator=generator) < jump_threshold(path, x_t, x_1, 0.6, 0.7)
    target = torch.multinomial(path.velocity(x_t, x_1, 0.6)[jumps], 1, generator=generator)
    expected = x_t.clone()
    expected[jumps] = target.squeeze(-1)
    assert 0 < jumps.sum() < jumps.numel()
    assert torch.equal(moved, expected)
    last = official_step(path, x_t, logits, 0.9, 1.0, is_last=True, generator=seeded(7))
    assert torch.equal(last, x_1)


def test_a_generator_is_the_only_randomness_of_the_official_step():
    path, x_t, logits = PATHS["metric"], tokens(1), torch.randn(*SHAPE, SIZE)
    mine, state = seeded(7), torch.get_rng_state()
    official_step(path, x_t, logits, 0.6, 0.7, is_last=False, generator=mine)
    after = mine.get_state()
    official_step(path, x_t, logits, 0.6, 0.7, is_last=False, generator=seeded(8))
    assert torch.equal(mine.get_state(), after)
    assert torch.equal(torch.get_rng_state(), state)


def test_times_of_a_step_are_checked():
    path, x_t = PATHS["metric"], tokens(1)
    uniforms = torch.zeros(2, *SHAPE)
    for t, t_next, message in [
        (0.5, 0.4, r"t_next must be in \[t, 1\]"),
        (0.5, 1.1, r"t_next must be in \[t, 1\]"),
        (0.5, torch.full((3,), 0.6), "t_next must lie on the leading axes"),
        (1.0, 1.0, r"t must be in \[0, 1\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            euler_step(path, x_t, x_t, t=t, t_next=t_next, uniforms=uniforms)
        with pytest.raises(ConfigError, match=message):
            jump_threshold(path, x_t, x_t, t, t_next)
    with pytest.raises(ConfigError, match=r"two numbers a token, shape \(2, 2, 3, 2, 2\)"):
        euler_step(path, x_t, x_t, t=0.5, t_next=0.6, uniforms=uniforms[0])


LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def shares(**options):
    """Shares of the codes over evenly spread numbers: their law within 1 / 1000."""
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = draw_posterior(LOGITS.expand(1000, 5), uniform, **options)
    return torch.bincount(drawn, minlength=5) / 1000


@pytest.mark.parametrize(
    ("options", "logits"),
    [
        ({}, LOGITS),
        ({"temperature": 0.5}, 2 * LOGITS),
        ({"temperature": 3.0}, LOGITS / 3),
        ({"top_k": 2}, LOGITS.masked_fill(LOGITS < 1.5, -torch.inf)),
        ({"top_k": 99, "top_p": 1.0}, LOGITS),
        # masses 0.48, 0.29, 0.18: two reach 0.7, the third is needed for 0.8
        ({"top_p": 0.7}, LOGITS.masked_fill(LOGITS < 1.5, -torch.inf)),
        ({"top_p": 0.8}, LOGITS.masked_fill(LOGITS < 1.0, -torch.inf)),
        ({"top_p": 0.01}, LOGITS.masked_fill(LOGITS < 2.0, -torch.inf)),
        # at half the temperature the first two have 0.85, of the first two alone 0.73 is the first
        ({"temperature": 0.5, "top_p": 0.85}, (2 * LOGITS).masked_fill(LOGITS < 1.5, -torch.inf)),
        ({"top_k": 2, "top_p": 0.6}, LOGITS.masked_fill(LOGITS < 2.0, -torch.inf)),
    ],
)
def test_options_of_the_posterior_draw(options, logits):
    torch.testing.assert_close(shares(**options), torch.softmax(logits, -1), rtol=0, atol=2.1e-3)


def test_no_option_is_the_law_of_the_model_to_the_bit():
    logits = torch.randn(64, 50, generator=seeded(1))
    uniform = torch.rand(64, generator=seeded(2))
    plain = draw_posterior(logits, uniform)
    neutral = draw_posterior(logits, uniform, temperature=1.0, top_k=50, top_p=1.0)
    assert torch.equal(plain, neutral)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_without_temperature_the_most_likely_code_is_taken(temperature):
    logits = torch.randn(64, 50, generator=seeded(1))
    uniform = torch.rand(64, generator=seeded(2))
    drawn = draw_posterior(logits, uniform, temperature=temperature)
    assert torch.equal(drawn, logits.argmax(-1))


def test_top_k_keeps_k_of_equal_codes():
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = draw_posterior(torch.zeros(1000, 5), uniform, top_k=2)
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        shares(**options)
    with pytest.raises(ConfigError, match="one number a token"):
        draw_posterior(LOGITS.expand(4, 5), torch.rand(3))


@pytest.mark.parametrize("part_rows", [1, 3, None])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"temperature": 0}, {"top_k": 3, "top_p": 0.8}]
)
def test_draws_from_the_head_are_those_from_its_logits(options, part_rows):
    generator = seeded(9)
    hidden = torch.randn(2, 2, 20, 8, generator=generator)
    weight, uniform = (
        torch.randn(700, 8, generator=generator),
        torch.rand(2, 20, generator=generator),
    )
    logits = guide(*(hidden @ weight.T), 3.0)
    expected = draw_posterior(logits, uniform, **options)
    drawn = draw_from_head(guide(*hidden, 3.0), weight, uniform, part_rows=part_rows, **options)
    assert torch.equal(drawn, expected)


def test_hidden_states_that_do_not_fit_are_refused():
    hidden, weight, uniform = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=r"hidden must have shape \(..., D\) and weight"):
        draw_from_head(hidden, weight[:, :3], uniform)
    with pytest.raises(ConfigError, match=r"shape \(2, 3\), got \(3,\)"):
        draw_from_head(hidden, weight, uniform[0])
    with pytest.raises(ConfigError, match="part_rows must be at least 1"):
        draw_from_head(hidden, weight, uniform, part_rows=0)
