import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.diffusion.path import MetricPath, MixturePath
from ursa.diffusion.solver import euler_step, jump_threshold, official_step
from ursa.diffusion.timesteps import inference_times, training_times
from ursa.tokenizers.quantizers import FSQuantizer

DATA = Path(__file__).parent / "data"
STEPS = {
    "step_rand512x6": (0, 1, 5, 12, 20, 23, 24),
    "step_fsq64000": (1, 10, 25, 40, 48),
    "step_mixture": (0, 5, 20, 23, 24),
}
EVERY = [(name, index) for name, indices in STEPS.items() for index in indices]
NOT_LAST = [(name, index) for name, index in EVERY if index != 24]
WITH_LOGITS = [(name, index) for name, index in EVERY if name != "step_fsq64000"]


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def paths():
    random, paper = golden("path_rand512x6")["emb_raw"], FSQuantizer((8, 8, 8, 5, 5, 5)).codebook
    return {
        "step_rand512x6": MetricPath(random, alpha=1.0, c=5.0),
        "step_fsq64000": MetricPath(paper, alpha=1.0, c=5.0),
        "step_mixture": MixturePath(512),
    }


def span(name, index):
    """Start and end of a step; the last one has no end."""
    info = json.loads((DATA / f"{name}.json").read_text())
    times = [*inference_times(info["num_inference_steps"], info["shift"]).tolist(), 1.0]
    assert times[index] == pytest.approx(info["steps"][str(index)]["t"], abs=1e-12)
    return times[index], times[index + 1]


@pytest.mark.parametrize("shift", [1, 3, 5, 7])
def test_times(shift):
    stored = golden("timesteps")
    for steps in (25, 50):
        expected = stored[f"t_n{steps}_shift{shift}"]
        torch.testing.assert_close(inference_times(steps, shift), expected, rtol=0, atol=1e-12)
    for kind in ("", "_edge"):
        drawn = training_times(stored[f"uniforms{kind}"], shift)
        expected = stored[f"sampled_t{kind}_shift{shift}"]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "index"), NOT_LAST)
def test_jumps(paths, name, index):
    path, stored, (t, t_next) = paths[name], golden(name), span(name, index)
    x_t, x_1 = stored["x_t"], stored["x_1"]
    rate = stored[f"rate_i{index}"]
    velocity = path.velocity(x_t, x_1, t)
    difference = (velocity[..., stored["cols"]] - stored[f"weights_i{index}"]).abs().amax(-1)
    assert (difference <= 1e-5 * rate + 1e-9).all()
    torch.testing.assert_close(velocity.sum(-1), rate, rtol=1e-5, atol=1e-9)
    threshold = jump_threshold(path, x_t, x_1, t, t_next)
    expected = stored[f"jump_threshold_i{index}"]
    torch.testing.assert_close(threshold, expected, rtol=0, atol=3e-6)
    uniforms = torch.stack([stored[f"u_i{index}"], torch.full(rate.shape, 0.5)])
    moved = euler_step(path, x_t, x_1, t=t, t_next=t_next, uniforms=uniforms)
    assert torch.equal(moved != x_t, stored[f"jump_i{index}"])


@pytest.mark.parametrize(("name", "index"), EVERY)
def test_seeded_step_towards_given_tokens(paths, name, index):
    path, stored, (t, t_next) = paths[name], golden(name), span(name, index)
    moved = official_step(
        path,
        stored["x_t"],
        torch.empty(0),
        t,
        t_next,
        is_last=index == 24,
        generator=torch.Generator().manual_seed(900 + index),
        x_1=stored["x_1"],
    )
    assert torch.equal(moved, stored[f"step_given_x1_i{index}"])


@pytest.mark.parametrize(("name", "index"), WITH_LOGITS)
def test_seeded_step_that_draws_its_tokens(paths, name, index):
    path, stored, (t, t_next) = paths[name], golden(name), span(name, index)
    x_t, logits = stored["x_t"].clone(), stored["logits"].clone()
    generator = torch.Generator().manual_seed(700 + index)
    moved = official_step(path, x_t, logits, t, t_next, is_last=index == 24, generator=generator)
    assert torch.equal(moved, stored[f"step_full_i{index}"])
    # the official step overwrites its logits
    assert torch.equal(logits, stored["logits"])
    assert torch.equal(x_t, stored["x_t"])
