"""Benchmark of the core: our operations against the plain arithmetic of the official code.

    python tests/bench/core.py                 # all rows, one thread, a fresh process each
    python tests/bench/core.py --rows P1 P4    # some of them
    python tests/bench/core.py --scale 4       # a quarter of the tokens

Every row makes the same inputs, measures seconds of processor time and the peak of memory over
what is there before, once the plain way and once ours, and prints their ratio. The plain way is
the formula as it stands (URSA, arXiv 2510.24717, section 3.1 and algorithm 2) on tensors of all
tokens times all codes, which is what the official code computes. K = 64,000 codes (FSQ levels
8, 8, 8, 5, 5, 5), hidden size 1024, float32.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ursa.diffusion.loss import linear_posterior_loss
from ursa.diffusion.path import MetricPath
from ursa.diffusion.solver import draw_from_head, draw_posterior, euler_step, guide
from ursa.model.size import num_sequences
from ursa.tokenizers.quantizers import FSQuantizer

LEVELS = (8, 8, 8, 5, 5, 5)
HIDDEN = 1024
ALPHA, C, T, DT, SCALE = 0.9, 3.0, 0.4, 0.04, 7.0
Timed = Callable[[], Tensor]


class Inputs:
    """Tensors of one row, functions of the number of tokens alone."""

    def __init__(self, num_tokens: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.codes = FSQuantizer(LEVELS).codebook
        self.size = len(self.codes)
        self.path = MetricPath(self.codes, alpha=ALPHA, c=C)
        self.x_1 = torch.randint(self.size, (num_tokens,), generator=self.generator)
        self.uniforms = torch.rand(4, num_tokens, generator=self.generator)
        self.x_t = self.path.sample(self.x_1, T, uniform=self.uniforms[3])

    def logits(self) -> Tensor:
        return torch.randn(len(self.x_1), self.size, generator=self.generator)

    def hidden(self, rows: int) -> tuple[Tensor, Tensor]:
        states = torch.randn(rows, len(self.x_1), HIDDEN, generator=self.generator)
        weight = torch.randn(self.size, HIDDEN, generator=self.generator) / HIDDEN**0.5
        return states, weight


def plain_distance(codes: Tensor, ids: Tensor) -> Tensor:
    rows = codes[ids]
    return rows.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * rows @ codes.T


def plain_jump(inputs: Inputs, x_1: Tensor) -> Tensor:
    path, x_t = inputs.path, inputs.x_t.clone()
    codes = path.codebook.codes
    distance = plain_distance(codes, x_1)
    current = (codes[x_t] - codes[x_1]).square().sum(-1, keepdim=True)
    beta, rate = (float(each(torch.tensor(T))) for each in (path.beta, path.beta_rate))
    velocity = torch.softmax(-beta * distance, -1) * (rate * torch.relu(current - distance))
    velocity.scatter_(-1, x_t.unsqueeze(-1), 0)
    jumps = inputs.uniforms[0] < 1 - torch.exp(-velocity.sum(-1) * DT)
    x_t[jumps] = torch.multinomial(velocity[jumps], 1, generator=inputs.generator).squeeze(-1)
    return x_t


def plain_draw(inputs: Inputs, logits: Tensor) -> Tensor:
    probs = torch.softmax(logits, -1)
    return torch.multinomial(probs, 1, generator=inputs.generator).squeeze(-1)


def our_jump(inputs: Inputs, x_1: Tensor) -> Tensor:
    return euler_step(
        inputs.path, inputs.x_t, x_1, t=T, t_next=T + DT, uniforms=inputs.uniforms[:2]
    )


def jump(inputs: Inputs, *, plain: bool) -> Timed:
    """P1: one step with x_1 given."""
    return lambda: (plain_jump if plain else our_jump)(inputs, inputs.x_1)


def step(inputs: Inputs, *, plain: bool) -> Timed:
    """P2: one step from logits."""
    logits = inputs.logits()
    if plain:
        return lambda: plain_jump(inputs, plain_draw(inputs, logits))

    def ours() -> Tensor:
        parts = zip(logits.split(64), inputs.uniforms[2].split(64), strict=True)
        return our_jump(inputs, torch.cat([draw_posterior(*part) for part in parts]))

    return ours


def hidden_step(inputs: Inputs, *, plain: bool) -> Timed:
    """P3: guidance, head, draw and step from the hidden states of both branches."""
    states, weight = inputs.hidden(2)
    if plain:
        return lambda: plain_jump(inputs, plain_draw(inputs, guide(*(states @ weight.T), SCALE)))
    return lambda: our_jump(
        inputs, draw_from_head(guide(*states, SCALE), weight, inputs.uniforms[2])
    )


def head(inputs: Inputs, *, plain: bool) -> Timed:
    """P3, for comparison: one product with the head and nothing else, in parts of 64 tokens."""
    states, weight = inputs.hidden(1)

    def product() -> Tensor:
        return torch.stack([(part @ weight.T).sum() for part in states[0].split(64)])

    return product


def noise(inputs: Inputs, *, plain: bool) -> Timed:
    """P4: x_t of clean tokens."""
    if plain:
        beta = float(inputs.path.beta(torch.tensor(T)))
        return lambda: plain_draw(
            inputs, -beta * plain_distance(inputs.path.codebook.codes, inputs.x_1)
        )
    return lambda: inputs.path.sample(inputs.x_1, T, uniform=inputs.uniforms[0])


def loss(inputs: Inputs, *, plain: bool) -> Timed:
    """P5: cross-entropy and its gradients, from hidden states."""
    states, weight = (each.requires_grad_() for each in inputs.hidden(1))

    def run() -> Tensor:
        if plain:
            logits = (states[0] @ weight.T).float()
            result = torch.nn.functional.cross_entropy(logits, inputs.x_1)
            (logits.argmax(-1) == inputs.x_1).float().mean()
        else:
            result = linear_posterior_loss(states, weight, inputs.x_1.unsqueeze(0)).loss
        result.backward()
        return result.detach()

    return run


ROWS: dict[str, tuple[Callable[..., Timed], int]] = {
    "P1": (jump, 8192),
    "P2": (step, 8192),
    "P3": (hidden_step, 8192),
    "head": (head, 8192),
    "P4": (noise, 8192),
    "P5": (loss, 4096),
}


def peak_bytes() -> int:
    """Return the most memory this process has held since `reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, num_tokens: int, *, plain: bool) -> dict[str, float]:
    """Run one side of a row in this process."""
    torch.set_num_threads(1)
    make, _ = ROWS[name]
    run = make(Inputs(num_tokens), plain=plain)
    reset_peak()
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    run()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "extra_mb": (peak_bytes() - before) / 1e6,
    }


def in_fresh_process(name: str, num_tokens: int, *, plain: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, str(num_tokens), str(int(plain))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--scale", type=int, default=1, help="take a part of the tokens")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, num_tokens, plain = arguments.one
        print(json.dumps(measure(name, int(num_tokens), plain=plain == "1")))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread\n")
    print("| row | tokens | plain | ours | faster | less memory |\n|---|---|---|---|---|---|")
    for name in arguments.rows:
        make, full = ROWS[name]
        count = full // arguments.scale
        ours = in_fresh_process(name, count, plain=False)
        what = str(make.__doc__).partition(": ")[2].rstrip(".")
        cells = [f"{name}: {what}", str(count)]
        shown = f"{ours['cpu_s']:.2f} s, {ours['extra_mb']:.0f} MB"
        if name == "head":
            print("| " + " | ".join([*cells, "", shown, "", ""]) + " |", flush=True)
            continue
        plain = in_fresh_process(name, count, plain=True)
        cells += [f"{plain['cpu_s']:.2f} s, {plain['extra_mb']:.0f} MB", shown]
        cells += [
            f"{plain['cpu_s'] / ours['cpu_s']:.1f}x",
            f"{plain['extra_mb'] / max(ours['extra_mb'], 0.1):.0f}x",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    for steps in (25, 50):
        run = num_sequences(steps, shift=1.0, guidance_trunc=0.9)
        print(f"| P6: sequences of {steps} guided steps | | {2 * steps} | {run} | | |")


if __name__ == "__main__":
    main()
