import pytest
import torch

from ursa.diffusion.path import MaskedPath, MetricPath, MixturePath
from ursa.errors import ConfigError, DataError
from ursa.tokenizers.quantizers import FSQuantizer

SHAPE = (2, 3, 2, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


CODEBOOK = torch.randn(40, 6, generator=seeded())
PATHS = {
    "metric": MetricPath(CODEBOOK, alpha=0.9, c=3.0),
    "mixture": MixturePath(40),
    "masked": MaskedPath(40),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def tokens(seed=1):
    return torch.randint(40, SHAPE, generator=seeded(seed))


@pytest.mark.parametrize(
    ("codebook", "alpha", "c", "message"),
    [
        (torch.zeros(5), 1.0, 1.0, r"shape \(V, D\), got \(5,\)"),
        (torch.zeros(0, 2), 1.0, 1.0, "at least 1, got 0"),
        (torch.zeros(5, 2), 0.0, 1.0, "alpha=0.0"),
        (torch.zeros(5, 2), 1.0, -1.0, "c=-1.0"),
        (torch.zeros(5, 2), float("nan"), 1.0, "alpha=nan"),
        (torch.full((5, 2), torch.inf), 1.0, 1.0, "must be finite"),
    ],
)
def test_metric_path_refuses_what_makes_no_sense(codebook, alpha, c, message):
    with pytest.raises(ConfigError, match=message):
        MetricPath(codebook, alpha=alpha, c=c)


def test_paths_refuse_sizes_and_types_that_make_no_sense():
    for kind in (MixturePath, MaskedPath):
        with pytest.raises(ConfigError, match="at least 1, got 0"):
            kind(0)
        with pytest.raises(ConfigError, match=r"got torch\.float16"):
            kind(4, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"torch\.float32 or torch\.float64, got torch\.float16"):
        MetricPath(CODEBOOK, alpha=1.0, c=5.0, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_codebook_is_computed_in_float32(dtype):
    # the official code computes in the type of the codebook: beta' is 50,000 at t = 0.99, and its
    # velocity is infinite or not a number in float16
    half = CODEBOOK.to(dtype)
    path = MetricPath(half, alpha=1.0, c=5.0)
    x_1, x_t = tokens(1), tokens(2)
    velocity = path.velocity(x_t, x_1, 0.99)
    assert velocity.dtype == torch.float32
    assert torch.isfinite(velocity).all()
    assert velocity.max() > 65504  # the largest float16
    exact = MetricPath(half.double(), alpha=1.0, c=5.0, dtype=torch.float64)
    expected = exact.velocity(x_t, x_1, 0.99)
    top = expected.amax(-1, keepdim=True)
    assert ((velocity - expected).abs() <= 1e-3 * top).all()


def test_64000_probabilities_sum_to_one():
    path = MetricPath(FSQuantizer((8, 8, 8, 5, 5, 5)).codebook, alpha=1.0, c=5.0)
    probs = path.probs(torch.tensor([0, 12_345, 32_036]), torch.tensor([0.25, 0.5, 0.9]))
    torch.testing.assert_close(probs.sum(-1), torch.ones(3), rtol=0, atol=1e-6)


@every_path
def test_axes_of_t_are_the_leading_axes_of_the_tokens(path):
    x_1, uniform = tokens(), torch.rand(SHAPE, generator=seeded(3))
    every = torch.rand(SHAPE, generator=seeded(4)) * 0.99
    for t, full in [
        (0.4, torch.full(SHAPE, 0.4)),
        (torch.tensor(0.4), torch.full(SHAPE, 0.4)),
        (every[:, 0, 0, 0], every[:, :1, :1, :1]),
        (every[:, :, 0, 0], every[:, :, :1, :1]),
        (every[:1, :, 0, 0], every[:1, :, :1, :1]),
        (every[:, :, :1, :1], every[:, :, :1, :1]),
        (every, every),
    ]:
        expected = full.expand(SHAPE)
        x_t = path.sample(x_1, expected, uniform=uniform)
        assert torch.equal(path.sample(x_1, t, uniform=uniform), x_t)
        assert path.probs(x_1, t).shape == (*SHAPE, path.num_states)
        torch.testing.assert_close(path.probs(x_1, t), path.probs(x_1, expected))
        torch.testing.assert_close(path.velocity(x_t, x_1, t), path.velocity(x_t, x_1, expected))


@every_path
@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 1), (2, 3, 2, 2, 1), (0,)])
def test_times_that_do_not_fit_are_refused(path, shape):
    if shape == (2, 3, 1):
        path.probs(tokens(), torch.zeros(shape))  # an axis of 1 fits
        return
    with pytest.raises(ConfigError, match="t must lie on the leading axes"):
        path.probs(tokens(), torch.zeros(shape))


@every_path
@pytest.mark.parametrize("t", [-0.01, 1.0, 1.5, float("nan")])
def test_times_out_of_range_are_refused(path, t):
    for bad in (t, torch.tensor([0.5, t])):
        with pytest.raises(ConfigError, match=r"t must be in \[0, 1\)"):
            path.sample(tokens(), bad, generator=seeded())
        with pytest.raises(ConfigError, match=r"t must be in \[0, 1\)"):
            path.velocity(tokens(), tokens(), bad)
    with pytest.raises(ConfigError, match="float tensor"):
        path.probs(tokens(), torch.tensor(0))


@every_path
def test_ids_out_of_range_are_refused(path):
    good = tokens()
    for bad in (-1, 40):
        wrong = good.clone()
        wrong[1, 2, 0, 1] = bad
        for call in (
            lambda x: path.probs(x, 0.5),
            lambda x: path.sample(x, 0.5, generator=seeded()),
            lambda x: path.velocity(good, x, 0.5),
        ):
            with pytest.raises(DataError, match=r"x_1 must be ids in \[0, 40\)"):
                call(wrong)
    wrong[1, 2, 0, 1] = path.num_states
    with pytest.raises(DataError, match="x_t must be ids in"):
        path.velocity(wrong, good, 0.5)
    with pytest.raises(ConfigError, match="shape of x_1"):
        path.velocity(good[:1], good, 0.5)
    with pytest.raises(ConfigError, match="integer token ids"):
        path.probs(good.float(), 0.5)


@every_path
def test_one_source_of_randomness(path):
    x_1, uniform = tokens(), torch.rand(SHAPE, generator=seeded(3))
    with pytest.raises(ConfigError, match="exactly one of generator= and uniform=, got neither"):
        path.sample(x_1, 0.5)
    with pytest.raises(ConfigError, match="got both"):
        path.sample(x_1, 0.5, generator=seeded(), uniform=uniform)
    with pytest.raises(ConfigError, match=r"one number a token, shape \(2, 3, 2, 2\), got \(2,"):
        path.sample(x_1, 0.5, uniform=uniform[:, 0, 0, 0])


@every_path
def test_a_generator_does_not_leak_into_later_calls(path):
    # the official path keeps it, and a later call without one moves the earlier caller's on
    x_1, uniform, mine = tokens(), torch.rand(SHAPE, generator=seeded(3)), seeded(5)
    before = mine.get_state()
    first = path.sample(x_1, 0.5, generator=mine)
    after = mine.get_state()
    assert not torch.equal(before, after)
    torch_state = torch.get_rng_state()
    path.sample(x_1, 0.5, uniform=uniform)
    path.sample(x_1, 0.5, generator=seeded(6))
    path.source(SHAPE, uniform=uniform)
    with pytest.raises(ConfigError):
        path.sample(x_1, 0.5)
    assert torch.equal(mine.get_state(), after)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(path.sample(x_1, 0.5, generator=seeded(5)), first)


def test_metric_noise_of_a_generator_is_that_of_its_numbers():
    uniform = torch.rand(SHAPE, generator=seeded(5), dtype=torch.float64)
    path = PATHS["metric"]
    drawn = path.sample(tokens(), 0.5, generator=seeded(5))
    assert torch.equal(drawn, path.sample(tokens(), 0.5, uniform=uniform))


@every_path
def test_a_video_is_noised_at_a_plain_number(path):
    # video to video: t = 1 - cond_noise_scale, a float, at which the official mixture path raises
    x_1, uniform = tokens(), torch.rand(SHAPE, generator=seeded(3))
    for t in (1 - 0.1, 1 - 0.5):
        x_t = path.sample(x_1, t, uniform=uniform)
        assert torch.equal(x_t, path.sample(x_1, torch.tensor([t, t]), uniform=uniform))
    assert 0.2 < (x_t == x_1).float().mean() < 1.0


def test_sources():
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    for name in ("metric", "mixture"):
        path = PATHS[name]
        assert path.source((3,), uniform=uniform).tolist() == [0, 20, 39]
        drawn = path.source((4000,), generator=seeded())
        assert torch.bincount(drawn, minlength=40).min() > 50
        assert len(torch.bincount(drawn)) == 40
        assert torch.equal(drawn, path.source((4000,), generator=seeded()))
        with pytest.raises(ConfigError, match="got neither"):
            path.source((3,))
        with pytest.raises(ConfigError, match="got both"):
            path.source((3,), generator=seeded(), uniform=uniform)
    path, generator = PATHS["masked"], seeded()
    state = generator.get_state()
    for masks in (path.source((3,)), path.source((3,), generator=generator)):
        assert masks.tolist() == [path.mask_id] * 3 == [40] * 3
    assert torch.equal(generator.get_state(), state)


def test_mixture_noise_comes_from_the_source_that_is_given():
    path, x_1 = PATHS["mixture"], tokens(1)
    x_0, uniform = tokens(2), torch.rand(SHAPE, generator=seeded(3))
    x_t = path.sample(x_1, 0.3, uniform=uniform, x_0=x_0)
    assert torch.equal(x_t, torch.where(uniform < 0.7, x_0, x_1))
    with pytest.raises(DataError, match="x_0 must be ids"):
        path.sample(x_1, 0.3, uniform=uniform, x_0=x_0 + 40)


def test_baselines_move_to_the_clean_token_at_the_rate_of_the_paper():
    x_1 = torch.tensor([0, 3, 3])
    mixture = MixturePath(4).velocity(torch.tensor([1, 3, 0]), x_1, 0.75)
    assert mixture.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4]]
    masked = MaskedPath(4).velocity(torch.tensor([4, 4, 0]), x_1, 0.75)
    assert masked.tolist() == [[4, 0, 0, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 0]]


def test_a_moved_path_is_the_same_to_the_bit():
    path = MetricPath(torch.randn(2000, 6, generator=seeded()), alpha=0.9, c=3.0)
    again = path.to("cpu")
    # a second normalisation would change last bits
    assert torch.equal(again.codebook.codes, path.codebook.codes)
    assert (again.schedule, again.dtype) == (path.schedule, torch.float32)
    assert path.to("meta").codebook.codes.device.type == "meta"
    assert path.codebook.codes.device.type == "cpu"
