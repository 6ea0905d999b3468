import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.diffusion.draws import draw
from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath
from ursa.diffusion.solver import draw_posterior, euler_step, exact_step, guide
from ursa.diffusion.timesteps import inference_times, shift_time, training_times

times = st.floats(0.0, 0.9921875, allow_subnormal=False, width=32)
rates = st.tuples(st.floats(0.3, 2.0), st.floats(0.5, 8.0))
few = settings(max_examples=40, deadline=None)


@st.composite
def cases(draw_):
    """A path over a random codebook and some current and clean tokens."""
    seed = draw_(st.integers(0, 2**31 - 1))
    size = draw_(st.integers(2, 40))
    width = draw_(st.integers(1, 6))
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(size, width, generator=generator)
    if draw_(st.booleans()):
        codebook[0] = 0  # the zero code has no direction
    alpha, c = draw_(rates)
    x_1, x_t = torch.randint(size, (2, 3, 5), generator=generator)
    return MetricPath(codebook, alpha=alpha, c=c), x_1, x_t, generator


def every_path(path):
    return path, MixturePath(path.codebook_size), MaskedPath(path.codebook_size)


@few
@given(cases(), times)
def test_probabilities_sum_to_one(case, t):
    path, x_1, _, _ = case
    for each in every_path(path):
        probs = each.probs(x_1, t)
        assert probs.shape == (3, 5, each.num_states)
        assert probs.min() >= 0
        torch.testing.assert_close(probs.sum(-1), torch.ones(3, 5), rtol=0, atol=1e-6)


@few
@given(cases())
def test_baselines_go_from_their_source_to_the_clean_token(case):
    path, x_1, _, _ = case
    size, end = path.codebook_size, 1 - 2.0**-20
    uniform = torch.full((size,), 1 / size)
    torch.testing.assert_close(MixturePath(size).probs(x_1, 0.0), uniform.expand(3, 5, size))
    assert (MaskedPath(size).probs(x_1, 0.0)[..., size] == 1).all()
    for each in every_path(path)[1:]:
        own = each.probs(x_1, end).gather(-1, x_1.unsqueeze(-1))
        assert (own > 1 - 2.0**-19).all()


@few
@given(cases(), times)
def test_velocity_is_not_negative_and_never_stays(case, t):
    path, x_1, _, generator = case
    for each in every_path(path):
        now = each.sample(x_1, t, generator=generator)
        velocity = each.velocity(now, x_1, t)
        assert torch.isfinite(velocity).all()
        assert velocity.min() >= 0
        assert (velocity.gather(-1, now.unsqueeze(-1)) == 0).all()


@few
@given(cases(), times)
def test_samples_have_the_law_of_the_path(case, t):
    path, x_1, _, _ = case
    # evenly spread numbers: a count is wrong by one for each end of its intervals, two at most
    count = 500
    uniform = (torch.arange(count) + 0.5) / count
    clean = x_1[0, 0].expand(count)
    for each in every_path(path):
        drawn = each.sample(clean, t, uniform=uniform)
        share = torch.bincount(drawn, minlength=each.num_states) / count
        expected = each.probs(clean[0], t)
        torch.testing.assert_close(share, expected, rtol=0, atol=2.1 / count)


@few
@given(cases())
def test_noise_is_uniform_and_data_a_point_mass(case):
    path, x_1, _, _ = case
    start = path.probs(x_1, torch.tensor(0.0))
    torch.testing.assert_close(
        start, torch.full_like(start, 1 / path.codebook_size), rtol=1e-5, atol=0
    )
    distance = path.distance(x_1)
    nearest = (distance < 1e-3).float()  # codes of one direction share the mass
    path = MetricPath(path.codebook.codes, alpha=1.0, c=8.0)
    end = path.probs(x_1, torch.tensor(1 - 2.0**-20))
    assert ((end * nearest).sum(-1) > 0.999).all()
    assert (nearest.gather(-1, x_1.unsqueeze(-1)) == 1).all()


@few
@given(cases(), times)
def test_velocity_moves_towards_the_clean_token_only(case, t):
    path, x_1, x_t, _ = case
    velocity = path.velocity(x_t, x_1, torch.tensor(t))
    assert torch.isfinite(velocity).all()
    assert velocity.min() >= 0
    assert (velocity.gather(-1, x_t.unsqueeze(-1)) == 0).all()
    distance = path.distance(x_1)
    farther = distance >= distance.gather(-1, x_t.unsqueeze(-1))
    assert (velocity[farther] == 0).all()
    assert (path.velocity(x_1, x_1, torch.tensor(t)) < 1e-3).all()


@few
@given(cases(), times)
def test_time_of_a_token_is_its_own(case, t):
    path, x_1, _, generator = case
    uniform = torch.rand(3, 5, generator=generator)
    each = torch.tensor([0.0, t, 0.9]).unsqueeze(-1)
    together = path.sample(x_1, each, uniform=uniform)
    for row in range(3):
        alone = path.sample(x_1[row], each[row], uniform=uniform[row])
        assert torch.equal(together[row], alone)


@few
@given(cases(), times, st.floats(0, 1, width=32))
def test_step_keeps_ids_in_range_and_moves_closer(case, t, fraction):
    path, x_1, x_t, generator = case
    t_next = t + fraction * (1 - 2**-20 - t)
    uniforms = torch.rand(2, 3, 5, generator=generator)
    moved = euler_step(
        path, x_t, x_1, t=torch.tensor(t), t_next=torch.tensor(t_next), uniforms=uniforms
    )
    assert moved.min() >= 0
    assert moved.max() < path.codebook_size
    before, after = (path.distance(x_1).gather(-1, x.unsqueeze(-1)) for x in (x_t, moved))
    assert (after <= before).all()
    again = euler_step(
        path, x_t, x_1, t=torch.tensor(t), t_next=torch.tensor(t_next), uniforms=uniforms
    )
    assert torch.equal(moved, again)


@few
@given(st.integers(2, 12), st.integers(0, 11), times, st.floats(0, 1, width=32))
def test_exact_steps_of_the_baselines_carry_their_law(size, place, t, fraction):
    x_1 = torch.tensor(place % size)
    t_next = min(t + fraction * (1 - t), 1 - 2.0**-20)
    # evenly spread numbers: a token jumps in a share that is wrong by one number at most
    count = 400
    spread = ((torch.arange(count) + 0.5) / count).double()
    for path in (MixturePath(size), MaskedPath(size)):
        every = torch.arange(path.num_states).repeat_interleave(count)
        numbers = spread.repeat(path.num_states).expand(3, -1)
        moved = exact_step(
            path,
            every,
            x_1.expand_as(every),
            t=t,
            t_next=t_next,
            numbers=numbers.clone,
        )
        share = torch.nn.functional.one_hot(moved, path.num_states).double()
        transition = share.view(path.num_states, count, -1).mean(1)
        carried = path.probs(x_1, t).double() @ transition
        expected = path.probs(x_1, t_next).double()
        torch.testing.assert_close(carried, expected, rtol=0, atol=1.1 / count)


@few
@given(cases(), times)
def test_the_last_step_ends_at_the_clean_tokens(case, t):
    path, x_1, _, generator = case
    for each in every_path(path):
        x_t = each.sample(x_1, t, generator=generator)
        kept = x_t.clone()
        assert torch.equal(each.last_step(x_t, x_1), x_1)
        assert torch.equal(x_t, kept)
    # of tokens that are drawn again, those that were seen stay
    masked = MaskedPath(path.codebook_size)
    x_t, drawn = masked.sample(x_1, t, generator=generator), x_1.flip(0)
    ended = masked.last_step(x_t, drawn)
    assert torch.equal(ended, torch.where(x_t == masked.mask_id, drawn, x_1))


@few
@given(cases(), times)
def test_a_token_without_time_does_not_move(case, t):
    path, x_1, _, generator = case
    held = torch.tensor([True, False, False])
    t_next = torch.where(held, t, 1.0)
    uniforms = torch.rand(2, 3, 5, generator=generator)
    for each in every_path(path):
        x_t = each.sample(x_1, t, generator=generator)
        start = torch.full((3,), t)
        moved = euler_step(each, x_t, x_1, t=start, t_next=t_next, uniforms=uniforms)
        assert torch.equal(moved[0], x_t[0])
        assert moved.max() < each.num_states


@few
@given(st.integers(0, 2**31 - 1), st.integers(1, 50))
def test_draws_never_hit_a_weight_of_zero(seed, size):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(200, size, generator=generator)
    weights *= torch.rand(200, size, generator=generator) < 0.5
    weights[:, size // 2] += 0.1
    uniform = torch.rand(200, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-24
    chosen = draw(weights, uniform)
    assert (weights.gather(-1, chosen.unsqueeze(-1)) > 0).all()


@few
@given(st.integers(1, 60), st.floats(0.5, 10))
def test_time_grid_rises_from_noise(num_steps, shift):
    grid = inference_times(num_steps, shift)
    assert grid.shape == (num_steps,)
    assert float(grid[0]) == 0.0
    assert (grid.diff() > 0).all()
    assert grid.max() < 1
    ends = shift_time(torch.tensor([0.0, 1.0]), shift)
    assert ends.tolist() == [1.0, 0.0]


@few
@given(st.integers(0, 2**31 - 1), st.floats(0.5, 10))
def test_training_times_are_never_one(seed, shift):
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(seed))
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-24
    t = training_times(uniform, shift)
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() < 1


def test_guidance_of_one_is_none():
    conditional, unconditional = torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(
        guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional
    )


def test_posterior_draws_follow_the_logits():
    logits = torch.tensor([2.0, 1.0, -1.0]).expand(20_000, 3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw_posterior(logits, uniform), minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits[0], -1), rtol=0, atol=0.01)
    cold = torch.bincount(draw_posterior(logits, uniform, temperature=0.5), minlength=3) / 20_000
    torch.testing.assert_close(cold, torch.softmax(2 * logits[0], -1), rtol=0, atol=0.01)
