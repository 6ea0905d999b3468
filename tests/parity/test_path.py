from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.diffusion.draws import draw_multinomial
from ursa.diffusion.path import MetricPath, MixturePath
from ursa.diffusion.timesteps import training_times
from ursa.tokenizers.quantizers import FSQuantizer

DATA = Path(__file__).parent / "data"
TIMES = ("0", "0.05", "0.25", "0.5", "0.9", "0.99")
SCHEDULES = {"a1_c5": (1.0, 5.0), "a0.5_c6": (0.5, 6.0), "a0.9_c3": (0.9, 3.0)}


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def paper_codebook():
    return FSQuantizer((8, 8, 8, 5, 5, 5)).codebook


def close(actual, expected, *, of_maximum):
    """Compare rows with a tolerance relative to the largest entry of the whole row."""
    difference = (actual - expected).abs().amax(-1)
    assert (difference <= of_maximum).all(), f"{difference.tolist()} > {of_maximum.tolist()}"


def check_path(path, stored, t, tag=""):
    x_1, x_t, cols = stored[f"{tag}x_1"], stored[f"{tag}x_t"], stored["cols"]
    tolerance = 2e-4 if t == "0.99" else 1e-5
    distance = path.distance(x_1)[:, cols]
    torch.testing.assert_close(distance, stored[f"{tag}dist"], rtol=0, atol=1e-6)
    probs = path.probs(x_1, float(t))
    top = stored[f"{tag}prob_max_t{t}"]
    close(probs[:, cols], stored[f"{tag}prob_t{t}"], of_maximum=tolerance * top)
    own = probs.gather(-1, x_1.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, stored[f"{tag}prob_at_x1_t{t}"], rtol=tolerance, atol=0)
    velocity = path.velocity(x_t, x_1, float(t))
    total = stored[f"{tag}velocity_sum_t{t}"]
    expected = stored[f"{tag}velocity_t{t}"].clone()
    expected[cols == x_t.unsqueeze(-1)] = 0  # rounding noise there; the official step drops it
    close(velocity[:, cols], expected, of_maximum=tolerance * total + 1e-6)
    torch.testing.assert_close(velocity.sum(-1), total, rtol=tolerance, atol=1e-2 * tolerance)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tag", SCHEDULES)
def test_random_codebook(tag, t):
    stored = golden("path_rand512x6")
    alpha, c = SCHEDULES[tag]
    check_path(MetricPath(stored["emb_raw"], alpha=alpha, c=c), stored, t, f"{tag}.")


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tag", ["a1_c5", "a0.9_c3"])
def test_64000_codes_of_the_paper(paper_codebook, tag, t):
    alpha, c = SCHEDULES[tag]
    stored = golden("path_fsq64000" if tag == "a1_c5" else f"path_fsq64000_{tag}")
    check_path(MetricPath(paper_codebook, alpha=alpha, c=c), stored, t)


@pytest.mark.parametrize("t", TIMES)
def test_float64(t):
    stored, codebook = golden("path_rand512x6_float64"), golden("path_rand512x6")["emb_raw"]
    path = MetricPath(codebook, alpha=0.9, c=3.0, dtype=torch.float64)
    x_1, x_t, cols = stored["x_1"], stored["x_t"], stored["cols"]
    probs, velocity = path.probs(x_1, float(t)), path.velocity(x_t, x_1, float(t))
    assert probs.dtype == velocity.dtype == torch.float64
    close(probs[:, cols], stored[f"prob_t{t}"], of_maximum=1e-13 * probs.amax(-1))
    expected = stored[f"velocity_t{t}"].clone()
    expected[cols == x_t.unsqueeze(-1)] = 0
    close(velocity[:, cols], expected, of_maximum=1e-13 * velocity.sum(-1) + 1e-13)


def test_one_time_a_sample():
    stored = golden("path_batch_times")
    path = MetricPath(golden("path_rand512x6")["emb_raw"], alpha=1.0, c=5.0)
    probs = path.probs(stored["x_1"], stored["t"])[..., stored["cols"]]
    close(probs, stored["prob"], of_maximum=1e-5 * probs.amax(-1))


@pytest.mark.parametrize("case", ["video_async", "video_sync"])
def test_noise_of_a_training_batch(paper_codebook, case):
    # times first, one a latent frame or one a sample, then one multinomial, from one seed
    stored = golden("train_noise")
    x_1, generator = stored[f"{case}.img_ids"], torch.Generator().manual_seed(700)
    uniform = torch.rand(stored[f"{case}.t"].numel(), generator=generator)
    assert torch.equal(uniform, stored[f"{case}.uniforms"])
    t = training_times(uniform, 3.0)
    torch.testing.assert_close(t, stored[f"{case}.t"], rtol=0, atol=1e-6)
    path = MetricPath(paper_codebook, alpha=1.0, c=5.0)
    probs = path.probs(x_1, t.view(x_1.shape[:2]) if case == "video_async" else t)
    assert torch.equal(draw_multinomial(probs, generator), stored[f"{case}.x_t"])


@pytest.mark.parametrize("t", TIMES)
def test_mixture_velocity(t):
    stored = golden("path_mixture")
    x_1, x_t, cols = stored["x_1"], stored["x_t"], stored["cols"]
    velocity = MixturePath(512).velocity(x_t, x_1, float(t))
    assert torch.equal(velocity[..., cols], stored[f"velocity_t{t}"])
    own = velocity.gather(-1, x_1.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(own, stored[f"velocity_at_x1_t{t}"])
    assert torch.equal(velocity.sum(-1), stored[f"velocity_sum_t{t}"])


def test_mixture_noise():
    stored, path = golden("path_mixture"), MixturePath(512)
    x_1, t, expected = stored["x_1"], stored["t_batch"], stored["x_t_sampled_seed37"]
    assert torch.equal(path.sample(x_1, t, uniform=stored["u"], x_0=stored["x_0"]), expected)
    seeded = path.sample(x_1, t, generator=torch.Generator().manual_seed(37))
    assert torch.equal(seeded, expected)
