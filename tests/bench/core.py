"""Benchmark of the core: our operations against the plain arithmetic of the official code.

    python tests/bench/core.py                 # everything: ten minutes on one core
    python tests/bench/core.py --rows P1 P4    # some rows
    python tests/bench/core.py --scale 4       # a quarter of the tokens

Every row makes the same inputs in a fresh process with one thread, measures seconds of processor
time and the peak of memory over what is there before, once the plain way, once ours for any
codebook and once ours for an FSQ grid, and prints the ratios to the plain way. The plain way is the
formula as it stands (URSA, arXiv 2510.24717, section 3.1 and algorithm 2) on tensors of all tokens
times all codes, which is what the official code computes. K = 64,000 codes (FSQ levels
8, 8, 8, 5, 5, 5), hidden size 1024, float32. The tables of the grid (188 MB, made once and mapped
from the user's cache) count as there before.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.grid import GridCodebook, grid_codes, grid_tables
from ursa.diffusion.linearization import fit_schedule, measure_linearity
from ursa.diffusion.loss import linear_posterior_loss
from ursa.diffusion.path import Codebook, MetricPath
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.schedule import PowerSchedule
from ursa.diffusion.solver import draw_from_head, draw_posterior, euler_step, guide
from ursa.model.size import num_sequences
from ursa.tokenizers.quantizers import FSQuantizer

LEVELS = (8, 8, 8, 5, 5, 5)
HIDDEN = 1024
ALPHA, C, T, DT, SCALE = 0.9, 3.0, 0.4, 0.04, 7.0
Timed = Callable[[], Tensor]


class Inputs:
    """Tensors of one row, functions of the number of tokens alone."""

    def __init__(self, num_tokens: int, side: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.codes = FSQuantizer(LEVELS).codebook
        self.size = len(self.codes)
        book = GridCodebook(LEVELS) if side == "grid" else DenseCodebook(self.codes)
        if isinstance(book, GridCodebook):
            grid_tables(LEVELS, None).order.sum()  # reads the mapped file
        self.path = MetricPath(book, alpha=ALPHA, c=C)
        self.x_1 = torch.randint(self.size, (num_tokens,), generator=self.generator)
        self.uniforms = torch.rand(4, num_tokens, generator=self.generator, dtype=torch.float64)
        source = torch.randint(self.size, (num_tokens,), generator=self.generator)
        half = torch.rand(num_tokens, generator=self.generator) < 0.5
        # between noise and data, as on the way
        self.x_t = torch.where(half, source, self.x_1)

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


def jump(inputs: Inputs, side: str) -> Timed:
    """P1: jump, x_1 given."""
    return lambda: (plain_jump if side == "plain" else our_jump)(inputs, inputs.x_1)


def step(inputs: Inputs, side: str) -> Timed:
    """P2: step from logits."""
    logits = inputs.logits()
    if side == "plain":
        return lambda: plain_jump(inputs, plain_draw(inputs, logits))

    def ours() -> Tensor:
        parts = zip(logits.split(64), inputs.uniforms[2].float().split(64), strict=True)
        return our_jump(inputs, torch.cat([draw_posterior(*part) for part in parts]))

    return ours


def hidden_step(inputs: Inputs, side: str) -> Timed:
    """P3: hidden states of both branches to next tokens."""
    states, weight = inputs.hidden(2)
    if side == "plain":
        return lambda: plain_jump(inputs, plain_draw(inputs, guide(*(states @ weight.T), SCALE)))
    return lambda: our_jump(
        inputs, draw_from_head(guide(*states, SCALE), weight, inputs.uniforms[2].float())
    )


def head(inputs: Inputs, side: str) -> Timed:
    """P3, for comparison: one product with the head, in parts."""
    states, weight = inputs.hidden(1)
    rows = 131  # as draw_from_head takes them
    logits = torch.empty(rows, inputs.size)

    def run() -> Tensor:
        for part in states[0].split(rows):
            torch.mm(part, weight.T, out=logits[: len(part)])
        return logits

    return run


def noise(inputs: Inputs, side: str) -> Timed:
    """P4: noising, one t."""
    if side == "plain":
        beta = float(inputs.path.beta(torch.tensor(T)))
        return lambda: plain_draw(
            inputs, -beta * plain_distance(inputs.path.codebook.codes, inputs.x_1)
        )
    return lambda: inputs.path.sample(inputs.x_1, T, uniform=inputs.uniforms[0])


def noise_video(inputs: Inputs, side: str) -> Timed:
    """P4: noising a video, one t a frame."""
    t = torch.rand(13, generator=inputs.generator, dtype=torch.float64)
    x_1, uniform = (each.view(13, -1) for each in (inputs.x_1, inputs.uniforms[0]))
    return lambda: inputs.path.sample(x_1, t, uniform=uniform)


def loss(inputs: Inputs, side: str) -> Timed:
    """P5: cross-entropy and its gradients."""
    states, weight = (each.requires_grad_() for each in inputs.hidden(1))

    def run() -> Tensor:
        if side == "plain":
            logits = (states[0] @ weight.T).float()
            result = torch.nn.functional.cross_entropy(logits, inputs.x_1)
            (logits.argmax(-1) == inputs.x_1).float().mean()
        else:
            result = linear_posterior_loss(states, weight, inputs.x_1.unsqueeze(0)).loss
        result.backward()
        return result.detach()

    return run


class Row(NamedTuple):
    """A benchmark, its tokens and the sides that it has."""

    make: Callable[[Inputs, str], Timed]
    num_tokens: int
    sides: tuple[str, ...]


EVERY = ("plain", "any", "grid")
ROWS = {
    "P1": Row(jump, 8192, EVERY),
    "P2": Row(step, 8192, EVERY),
    "P3": Row(hidden_step, 8192, EVERY),
    "head": Row(head, 8192, ("any",)),
    "P4": Row(noise, 8192, EVERY),
    "P4-video": Row(noise_video, 33_280, ("grid",)),
    "P5": Row(loss, 4096, ("plain", "any")),
    "P8": Row(hidden_step, 33_280, ("grid",)),
}
GROWTH = {"P3": hidden_step, "P4": noise, "P5": loss}
"""What must not need memory in proportion to tokens times codes."""
GROWTH_TOKENS = (2048, 8192, 33_280)


def peak_bytes() -> int:
    """Return the most memory this process has held since `reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, num_tokens: int, side: str) -> dict[str, float]:
    """Run one side of a row in this process."""
    torch.set_num_threads(1)
    run = ROWS[name].make(Inputs(num_tokens, side), side)
    reset_peak()
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    run()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "extra_mb": (peak_bytes() - before) / 1e6,
    }


def in_fresh_process(name: str, num_tokens: int, side: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, str(num_tokens), side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cell(found: dict[str, float], plain: dict[str, float] | None) -> str:
    """Return seconds and memory, with how many times the plain way needs."""
    seconds, megabytes = found["cpu_s"], found["extra_mb"]
    text = f"{seconds:.3g} s, {megabytes:,.0f} MB"
    if plain is None:
        return text
    less = plain["extra_mb"] / max(megabytes, 1)
    return f"{text} (**{plain['cpu_s'] / seconds:.3g}x, {less:.3g}x**)"


def print_rows(names: Sequence[str], scale: int) -> None:
    print("| | tokens | plain | ours, any codebook | ours, FSQ grid |\n|---|---|---|---|---|")
    for name in names:
        row = ROWS[name]
        count = row.num_tokens // scale
        what = str(row.make.__doc__).partition(": ")[2].rstrip(".")
        cells, plain = [f"{name}: {what}", f"{count:,}"], None
        for side in EVERY:
            found = in_fresh_process(name, count, side) if side in row.sides else None
            cells.append("" if found is None else cell(found, plain))
            plain = found if side == "plain" else plain
        print("| " + " | ".join(cells) + " |", flush=True)
    for steps in (25, 50):
        run = num_sequences(steps, shift=1.0, guidance_trunc=0.9)
        print(f"| P6: sequences of {steps} guided steps | | {2 * steps} | {run} | {run} |")


def print_growth(scale: int) -> None:
    counts = [count // scale for count in GROWTH_TOKENS]
    print(
        "\nExtra memory against the number of tokens, MB (the plain way: 4 bytes x tokens x codes,"
    )
    print("twice or more; the loss holds 262 MB of gradients of the head)\n")
    print("| | " + " | ".join(f"{count:,} tokens" for count in counts) + " |")
    print("|---|" + "---|" * len(counts))
    for name, make in GROWTH.items():
        for side in ("any", "grid") if name != "P5" else ("any",):
            cells = [f"{in_fresh_process(name, count, side)['extra_mb']:.0f}" for count in counts]
            what = str(make.__doc__).partition(": ")[2].rstrip(".")
            print(f"| {what}, {side} | " + " | ".join(cells) + " |", flush=True)
    print(
        "| one tensor of tokens x codes | "
        + " | ".join(f"{4 * count * 64_000 / 1e6:,.0f}" for count in counts)
        + " |"
    )


def print_linearity() -> None:
    """P9: how far the mean distance is from a straight line in t."""
    print("\n| P9: largest deviation | (0.9, 3) | best (alpha, c) | table |\n|---|---|---|---|")
    random = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    large = torch.randn(16_384, 256, generator=torch.Generator().manual_seed(0))
    books: dict[str, Codebook] = {
        "FSQ 8, 8, 8, 5, 5, 5": GridCodebook(LEVELS),
        "the same, not normalised": ProductCodebook(LEVELS),
        "random, 1,024 x 256": DenseCodebook(random),
        "random, 16,384 x 256, fitted to 2,048 rows": DenseCodebook(large),
    }
    for name, book in books.items():
        fit = fit_schedule(book)
        weights = None
        if fit.num_rows < len(book):  # rows that the fit has not seen
            weights = torch.zeros(len(book))
            weights[-512:] = 1
        official = measure_linearity(book, PowerSchedule(0.9, 3.0), weights, num_times=25)
        print(
            f"| {name} | {official.max_deviation:.3f} | {fit.power_linearity.max_deviation:.4f} "
            f"({fit.power.alpha:.3f}, {fit.power.c:.3f}) | "
            f"{fit.table_linearity.max_deviation:.1e} |",
            flush=True,
        )


def print_exactness() -> None:
    """P10: largest relative error of the rates of 400 random pairs, against float64."""
    print("\n| P10: error of rates | beta 0.1 | 1 | 5 | 45 |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(1024, 256, generator=generator)
    books: dict[str, tuple[Codebook, Tensor]] = {
        "any codebook, FSQ 8, 8, 8, 5, 5, 5": (
            DenseCodebook(grid_codes(LEVELS)),
            grid_codes(LEVELS),
        ),
        "any codebook, random 1,024 x 256": (DenseCodebook(random), random),
        "FSQ grid": (GridCodebook(LEVELS), grid_codes(LEVELS)),
    }
    for name, (book, codes) in books.items():
        exact = DenseCodebook(codes, torch.float64)
        x_t, x_1 = torch.randint(len(book), (2, 400), generator=generator)
        errors = []
        for beta in (0.1, 1.0, 5.0, 45.0):
            rate = exact.rate(x_t, x_1, torch.tensor(beta, dtype=torch.float64))
            found = book.rate(x_t, x_1, torch.tensor(beta)).double()
            errors.append(f"{((found - rate).abs() / rate)[rate > 1e-9].max():.1e}")
        print(f"| {name} | " + " | ".join(errors) + " |", flush=True)


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="these rows, nothing else")
    parser.add_argument("--scale", type=int, default=1, help="take a part of the tokens")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, num_tokens, side = arguments.one
        print(json.dumps(measure(name, int(num_tokens), side)))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread\n")
    grid_tables(LEVELS, None)  # makes the tables if this is the first time
    print_rows(arguments.rows or list(ROWS), arguments.scale)
    if not arguments.rows:
        print_growth(arguments.scale)
        print_linearity()
        print_exactness()


if __name__ == "__main__":
    main()
