import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.diffusion.path import MetricPath, normalize_codebook
from ursa.diffusion.solver import euler_step
from ursa.diffusion.timesteps import inference_times, training_times
from ursa.model.rope import frequency_axes, rotary_embedding
from ursa.model.sequence import positions
from ursa.tokenizers.quantizers import FSQuantizer

DATA = Path(__file__).parent / "data"
LEVELS = (8, 8, 8, 5, 5, 5)
TIMES = ("0", "0.05", "0.25", "0.5", "0.9", "0.99")
SCHEDULES = {"a1_c5": (1.0, 5.0), "a0.5_c6": (0.5, 6.0), "a0.9_c3": (0.9, 3.0)}


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


def close(actual, expected, *, of_maximum):
    """Compare rows with a tolerance relative to the largest entry of the whole row."""
    difference = (actual - expected).abs().amax(-1)
    assert (difference <= of_maximum).all(), f"{difference.tolist()} > {of_maximum.tolist()}"


def check_path(path, stored, cols, t, tag=""):
    x_1, x_t = stored[f"{tag}x_1"], stored[f"{tag}x_t"]
    tolerance = 2e-4 if t == "0.99" else 1e-5
    probs = path.probs(x_1, torch.tensor(float(t)))
    top = stored[f"{tag}prob_max_t{t}"]
    close(probs[:, cols], stored[f"{tag}prob_t{t}"], of_maximum=tolerance * top)
    own = probs.gather(-1, x_1.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, stored[f"{tag}prob_at_x1_t{t}"], rtol=tolerance, atol=0)
    velocity = path.velocity(x_t, x_1, torch.tensor(float(t)))
    total = stored[f"{tag}velocity_sum_t{t}"]
    expected = stored[f"{tag}velocity_t{t}"].clone()
    expected[cols == x_t.unsqueeze(-1)] = 0  # rounding noise there; the official step drops it
    close(velocity[:, cols], expected, of_maximum=tolerance * total + 1e-6)
    torch.testing.assert_close(velocity.sum(-1), total, rtol=tolerance, atol=1e-2 * tolerance)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tag", SCHEDULES)
def test_path_on_a_random_codebook(tag, t):
    stored = golden("path_rand512x6")
    alpha, c = SCHEDULES[tag]
    path = MetricPath(stored["emb_raw"], alpha=alpha, c=c)
    distance = path.distance(stored[f"{tag}.x_1"])[:, stored["cols"]]
    torch.testing.assert_close(distance, stored[f"{tag}.dist"], rtol=0, atol=1e-6)
    check_path(path, stored, stored["cols"], t, f"{tag}.")


@pytest.fixture(scope="module")
def paper_path():
    return MetricPath(FSQuantizer(LEVELS).codebook, alpha=1.0, c=5.0)


@pytest.mark.parametrize("t", TIMES)
def test_path_on_the_64000_codes_of_the_paper(paper_path, t):
    stored = golden("path_fsq64000")
    distance = paper_path.distance(stored["x_1"])[:, stored["cols"]]
    torch.testing.assert_close(distance, stored["dist"], rtol=0, atol=1e-6)
    check_path(paper_path, stored, stored["cols"], t)


def test_codebook_of_the_paper():
    stored = golden("fsq_codebook")
    codebook = FSQuantizer(LEVELS).codebook
    assert torch.equal(codebook[stored["rows"]], stored["emb_raw_rows"])
    normalized = normalize_codebook(codebook)[stored["rows"]]
    torch.testing.assert_close(normalized, stored["emb_normalized_rows"], rtol=0, atol=1e-6)


def test_quantizer():
    stored = golden("fsq")
    quantizer = FSQuantizer(LEVELS)
    z = stored["z4"].movedim(1, -1)
    torch.testing.assert_close(quantizer.bound(z).movedim(-1, 1), stored["bound_z4"])
    ids = quantizer.encode(z)
    assert torch.equal(ids, stored["ids4"].long())
    assert torch.equal(quantizer.decode(ids).movedim(-1, 1), stored["deq_ids4"])


def test_quantizer_at_the_edges():
    stored = golden("fsq")
    quantizer = FSQuantizer(LEVELS)
    values, finite = stored["edge_values"], torch.isfinite(stored["edge_values"])
    ids = quantizer.encode(values[finite].unsqueeze(-1).expand(-1, 6))
    assert torch.equal(ids, stored["edge_ids"][finite].long())
    for channel in range(6):
        z = torch.zeros(int(finite.sum()), 6)
        z[:, channel] = values[finite]
        expected = stored["edge_single_channel_ids"][channel][finite].long()
        assert torch.equal(quantizer.encode(z), expected)


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_times(shift):
    stored = golden("timesteps")
    for steps in (25, 50):
        expected = stored[f"t_n{steps}_shift{shift}"]
        torch.testing.assert_close(inference_times(steps, shift), expected, rtol=0, atol=1e-12)
    for kind in ("", "_edge"):
        drawn = training_times(stored[f"uniforms{kind}"], shift)
        expected = stored[f"sampled_t{kind}_shift{shift}"]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", ["0", "1", "12", "23"])
def test_step_of_the_solver(step):
    stored, info = golden("step_rand512x6"), json.loads((DATA / "step_rand512x6.json").read_text())
    path = MetricPath(golden("path_rand512x6")["emb_raw"], alpha=1.0, c=5.0)
    times = inference_times(info["num_steps"], info["shift"])
    t, t_next = times[int(step)].float(), times[int(step) + 1].float()
    velocity = path.velocity(stored["x_t"], stored["x_1"], t)
    rate = stored[f"rate_i{step}"]
    tolerance = 1e-5 * rate[:, :2] + 1e-9
    close(velocity[:, :2, ::16], stored[f"weights_i{step}"], of_maximum=tolerance)
    threshold = 1 - torch.exp(-velocity.sum(-1) * (t_next - t))
    torch.testing.assert_close(threshold, stored[f"jump_threshold_i{step}"], rtol=0, atol=3e-6)
    uniforms = torch.stack([stored[f"u_i{step}"], torch.full(rate.shape, 0.5)])
    moved = euler_step(path, stored["x_t"], stored["x_1"], t=t, t_next=t_next, uniforms=uniforms)
    assert torch.equal(moved != stored["x_t"], stored[f"jump_i{step}"])


@pytest.mark.parametrize(("name", "shape"), [("image", (1, 4, 6)), ("video", (3, 4, 6))])
def test_positions(name, shape):
    assert torch.equal(positions(8, shape)[8:], golden("rope")[f"pos_{name}"])


@pytest.mark.parametrize("dim", [128, 64, 16])
def test_rotation(dim):
    stored = golden("rope")
    assert torch.equal(frequency_axes(dim), stored[f"dim{dim}_axis"])
    cos, sin = rotary_embedding(stored[f"dim{dim}_pos"], head_dim=dim, theta=1e6)
    half = dim // 2
    torch.testing.assert_close(cos[0, :, :half], stored[f"dim{dim}_cos"], rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0, :, :half], stored[f"dim{dim}_sin"], rtol=0, atol=1e-5)
    q = stored[f"dim{dim}_q"]
    swapped = torch.cat([-q[..., half:], q[..., :half]], -1)
    rotated = q * cos[0, :, None] + swapped * sin[0, :, None]
    official = stored[f"dim{dim}_q_rot"]
    official = torch.cat([official[..., 0::2], official[..., 1::2]], -1)
    torch.testing.assert_close(rotated, official, rtol=0, atol=1e-5)
    scores, expected = (torch.einsum("ihd,jhd->hij", x, x) for x in (rotated, official))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
