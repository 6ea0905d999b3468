"""Peaks of memory, each in a fresh process: no tensor of tokens times codes, few bytes a clip."""

import subprocess
import sys

import pytest

from tests.bench import growth

MEASURE = """
import re, sys
from pathlib import Path
import torch
from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.loss import linear_posterior_loss
from ursa.diffusion.path import MetricPath
from ursa.diffusion.solver import draw_from_head, euler_step

torch.set_num_threads(1)
what, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
levels, width = (8, 8, 8, 8, 8), 16  # 32,768 codes
book = GridCodebook(levels, cache=Path(sys.argv[4])) if kind == "grid" else None
path = MetricPath(book or DenseCodebook(torch.randn(32_768, 6)), alpha=0.9, c=3.0)
x_1, x_t = torch.randint(32_768, (2, count))
uniforms = torch.rand(2, count, dtype=torch.float64)
hidden, head = torch.randn(1, count, width), torch.randn(32_768, width)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

def run(n):
    if what == "noise":
        path.sample(x_1[:n], 0.4, uniform=uniforms[0, :n])
    elif what == "step":
        euler_step(path, x_t[:n], x_1[:n], t=0.4, t_next=0.5, uniforms=uniforms[:, :n])
    elif what == "draw":
        draw_from_head(hidden[0, :n], head, uniforms[0, :n].float())
    else:
        states, weight = hidden[:, :n].requires_grad_(), head.requires_grad_()
        linear_posterior_loss(states, weight, x_1[None, :n]).loss.backward()

run(64)  # what is held once, whatever the number of tokens
Path("/proc/self/clear_refs").write_text("5")
before = peak()
run(count)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("noise", "any"),
        ("noise", "grid"),
        ("step", "any"),
        ("step", "grid"),
        ("draw", "any"),
        ("loss", "any"),
    ],
)
def test_memory_does_not_grow_with_tokens_times_codes(what, kind, tmp_path):
    count = 4096
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, kind, str(count), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tensor_mb = count * 32_768 * 4 / 1e6  # 537 MB in float32
    assert float(done.stdout) < 0.4 * tensor_mb


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_ten_times_the_clips_take_hardly_more_memory():
    """Of the process of a flow that commits and selects them; the goal is 1.2."""
    small, large = growth.in_fresh_process(1000), growth.in_fresh_process(10_000)
    assert large["select"] <= 1.2 * small["select"], (small, large)
