"""Toy study of sampling steps: kernels and clocks with an exact denoiser.

    python tests/bench/toy.py                                 # the table
    python tests/bench/toy.py --plot toy-steps.png            # and the plot
    python tests/bench/toy.py --samples 128 --seeds 2         # a quick look
    python tests/bench/toy.py --steps 25 --samples 12288      # less noise where the goal is decided

The data are a Markov chain of tokens over the directions of a small FSQ grid, whose posterior
p(x_1^n | x_t) is computed by the forward-backward algorithm. So there is no error of a network:
what separates samples from data is that tokens are drawn one by one from their posteriors, and
what the kernel adds. Kernels, clocks and path are those of the sampler.

Dimensions: B = samples, N = tokens, V = codes, S = codes that the chain takes.

References:
    Forward-backward algorithm: Rabiner, Proc. IEEE 77 (1989), section III; energy distance:
    Szekely and Rizzo, J. Stat. Plan. Inference 143 (2013).
"""

import argparse
import functools
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ursa.diffusion.clocks import distance_by_time, equal_drops
from ursa.diffusion.draws import draw
from ursa.diffusion.grid import GridCodebook
from ursa.diffusion.path import MetricPath
from ursa.diffusion.solver import euler_step, exact_step
from ursa.diffusion.timesteps import inference_times

LEVELS = (6, 6, 6)
NUM_TOKENS = 12
MODES = ((0.7, 0.0, 0.6), (-0.5, 0.5, -0.6), (0.0, -0.75, 0.2))
"""Directions near which a sequence starts, equally often."""
TURN, WIDTH = 0.5, 0.13
"""Radians a token, and the spread of starts and moves."""
STRAY = 1e-6
"""Share of moves that go anywhere: none is impossible, however badly tokens fit together."""
ALPHA, C = 0.9, 3.0
REFERENCE_SAMPLES, CURVE_SAMPLES = 8192, 256
FLOOR_SETS = 16
"""Fresh sets of data: what every measure gives where nothing is wrong."""
PART_SAMPLES = 256
STEPS = (8, 12, 16, 25, 32)
MOST_STEPS = 64
"""Of the baseline: Euler steps of the official clock."""
GOAL_STEPS = 25
Clock = Callable[[int], Tensor]


class Chain:
    """Data of a Markov chain: a token's direction is that of the last, turned, with some noise.

    Of the codes on one ray, which no x_t tells apart, the chain takes the first.
    """

    def __init__(self, levels: tuple[int, int, int], num_tokens: int) -> None:
        self.path = MetricPath(GridCodebook(levels), alpha=ALPHA, c=C)
        self.num_tokens = num_tokens
        every = torch.arange(self.path.codebook_size)
        same = self.path.distance(every) < 1e-5
        self.codes = every[same.long().argmax(-1) == every]
        # where a code is in `codes`; of one that the chain does not take, past the end
        self._place = torch.full_like(every, len(every))
        self._place[self.codes] = torch.arange(len(self.codes))
        points = self.points(self.codes)
        cos, sin = math.cos(TURN), math.sin(TURN)
        turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, -1.0]])
        self.moves = _stray(_near(points @ turn.T, points))
        modes = torch.nn.functional.normalize(torch.tensor(MODES))
        self.start = _stray(_near(modes, points).mean(0))
        laws = [self.start]
        for _ in range(num_tokens - 1):
            laws.append(laws[-1] @ self.moves)
        self.laws = torch.stack(laws)
        """Law of every token, shape (N, S)."""

    def points(self, x: Tensor) -> Tensor:
        """Return the normalised codes of tokens, shape (..., 3)."""
        return self.path.codebook.codes[x]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw data, shape (B, N)."""
        uniforms = torch.rand(self.num_tokens, count, generator=generator)
        places = [draw(self.start.expand(count, -1), uniforms[0])]
        for uniform in uniforms[1:]:
            places.append(draw(self.moves[places[-1]], uniform))
        return self.codes[torch.stack(places, -1)]

    def nll(self, x: Tensor) -> Tensor:
        """Return -log p(x) in nats of tokens (B, N), shape (B,)."""
        places = self._place[x]
        moves = self.moves[places[:, :-1], places[:, 1:]]
        return -self.start[places[:, 0]].log() - moves.log().sum(-1)

    def entropy(self) -> float:
        """Return the entropy of all tokens in nats: that of the first and of every move."""
        moves = self.laws[:-1] @ torch.special.entr(self.moves).sum(-1)
        return float(torch.special.entr(self.start).sum() + moves.sum())

    def posterior(self, x_t: Tensor, t: float) -> Tensor:
        """Return p(x_1^n | x_t) of tokens (B, N) by forward-backward, shape (B, N, S)."""
        evidence = self.path.probs(self.codes, t).T[x_t.T]
        evidence /= evidence.amax(-1, keepdim=True)
        before = [self.start * evidence[0]]
        for seen in evidence[1:]:
            before.append(_normalise(before[-1]) @ self.moves * seen)
        after = torch.ones_like(before[0])
        result = torch.empty_like(evidence)
        for place in reversed(range(self.num_tokens)):
            result[place] = _normalise(before[place] * after)
            after = _normalise((evidence[place] * after) @ self.moves.T)
        return result.transpose(0, 1)

    def denoise(self, x_t: Tensor, t: float, generator: torch.Generator) -> Tensor:
        """Draw every token of x_1 from its posterior, shape (B, N)."""
        uniform = torch.rand(x_t.shape, generator=generator)
        parts = zip(x_t.split(PART_SAMPLES), uniform.split(PART_SAMPLES), strict=True)
        return self.codes[torch.cat([draw(self.posterior(x, t), u) for x, u in parts])]


def _near(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(x, y).square() / (2 * WIDTH**2), -1)


def _stray(law: Tensor) -> Tensor:
    return (1 - STRAY) * law + STRAY / law.shape[-1]


def _normalise(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def step(
    path: MetricPath,
    kernel: str,
    x_t: Tensor,
    x_1: Tensor,
    span: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Carry tokens from the start to the end of a span, shape of x_t."""
    t, t_next = span

    def numbers(count: int = 3) -> Tensor:
        return torch.rand(count, *x_t.shape, generator=generator, dtype=torch.float64)

    if kernel == "exact":
        return exact_step(path, x_t, x_1, t=t, t_next=t_next, numbers=numbers)
    in_beta = kernel == "Euler in beta"
    return euler_step(path, x_t, x_1, t=t, t_next=t_next, uniforms=numbers(2), in_beta=in_beta)


def generate(
    chain: Chain, kernel: str, times: Iterable[float], count: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Run the sampler: return tokens (B, N) and how often it asked the denoiser."""
    path, num_forwards = chain.path, 0
    x = path.source((count, chain.num_tokens), generator=generator)
    for t, t_next in itertools.pairwise([*times, 1.0]):
        if kernel == "Euler" and t == 0 and path.rests_at_start:
            continue  # the sampler does not run it either: nothing moves
        x_1 = chain.denoise(x, t, generator)
        num_forwards += 1
        if t_next == 1:
            return x_1, num_forwards
        x = step(path, kernel, x, x_1, (t, t_next), generator)
    return x, num_forwards


def measured_clocks(chain: Chain, count: int) -> dict[str, Clock]:
    """Return clocks of equal drops of curves of time.

    The entropy is that of the posterior, a token's mean: the loss of this denoiser. The sum with
    the mean distance of x_t from x_1, each as a share of its value at the start, takes steps from
    both: entropy falls late, distance early.
    """
    generator = torch.Generator().manual_seed(0)
    x_1 = chain.sample(count, generator)
    times = torch.cat([torch.linspace(0, 0.95, 39), 1 - torch.logspace(-1.5, -3, 7)]).double()
    entropy = torch.empty(len(times))
    for place, t in enumerate(times.tolist()):
        x_t = chain.path.sample(x_1, t, generator=generator)
        entropy[place] = torch.special.entr(chain.posterior(x_t, t)).sum(-1).mean()
    distance = chain.path.codebook.moments(chain.path.beta(times)).mean
    curves = {
        "entropy": entropy,
        "entropy + distance": entropy / entropy[0] + distance / distance[0],
    }
    return {
        name: functools.partial(equal_drops, times=times.tolist(), values=curve.tolist())
        for name, curve in curves.items()
    }


class Measures(NamedTuple):
    """How far samples are from the data.

    Attributes:
        gap: Mean of -log p less the entropy, in nats of all tokens.
        energy: Energy distance of all tokens' directions.
        near: Total variation of the coarse pairs (octant of a token, octant of the next).
        far: The same six tokens apart.
    """

    gap: float
    energy: float
    near: float
    far: float


class Judge:
    """Measures samples against the chain's own law, and by distances against a draw of it."""

    def __init__(self, chain: Chain, count: int) -> None:
        self._chain = chain
        self._entropy = chain.entropy()
        self._data = self._flat(chain.sample(count, torch.Generator().manual_seed(1)))
        self._between_data = _mean_distance(self._data)
        self._laws = {gap: self._pair_law(gap) for gap in (1, 6)}

    def __call__(self, x: Tensor) -> Measures:
        flat = self._flat(x)
        between = 2 * float(torch.cdist(flat, self._data).mean())
        return Measures(
            float(self._chain.nll(x).mean()) - self._entropy,
            between - _mean_distance(flat) - self._between_data,
            *(self._variation(x, gap) for gap in (1, 6)),
        )

    def _flat(self, x: Tensor) -> Tensor:
        return self._chain.points(x).flatten(1)

    def _octant(self, x: Tensor) -> Tensor:
        return (self._chain.points(x) >= 0).long() @ torch.tensor([4, 2, 1])

    def _pair_law(self, gap: int) -> Tensor:
        chain = self._chain
        octant = torch.nn.functional.one_hot(self._octant(chain.codes), 8).float()
        first = chain.laws[:-gap].mean(0)
        moves = torch.linalg.matrix_power(chain.moves, gap)
        return octant.T @ (first[:, None] * moves) @ octant

    def _variation(self, x: Tensor, gap: int) -> float:
        octant = self._octant(x)
        pairs = (octant[:, :-gap] * 8 + octant[:, gap:]).flatten()
        found = torch.bincount(pairs, minlength=64).view(8, 8) / len(pairs)
        return float((found - self._laws[gap]).abs().sum()) / 2


def _mean_distance(x: Tensor) -> float:
    """Return the mean distance of two different rows."""
    return float(torch.pdist(x).mean())


class Row(NamedTuple):
    """Measures of one setting, all seeds."""

    kernel: str
    clock: str
    num_steps: int
    num_forwards: int
    seeds: list[Measures]

    def mean(self, name: str) -> float:
        return float(self._values(name).mean())

    def spread(self, name: str) -> float:
        return float(self._values(name).std()) if len(self.seeds) > 1 else 0.0

    def show(self) -> str:
        cells = [self.kernel, self.clock, *(str(n or "") for n in self[2:4])]
        for name, scale, digits in (
            ("gap", 1, 2),
            ("energy", 1000, 1),
            ("near", 1, 3),
            ("far", 1, 3),
        ):
            mean, spread = self.mean(name) * scale, self.spread(name) * scale
            cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
        return "| " + " | ".join(cells) + " |"

    def _values(self, name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in self.seeds], dtype=torch.float64)


def settings(steps: Iterable[int]) -> Iterable[tuple[str, str, int]]:
    """Yield kernel, clock and number of steps of every row."""
    steps = tuple(steps)
    for num_steps in (*steps, MOST_STEPS):
        yield "Euler", "official", num_steps
    pairs = [*itertools.product(("Euler in beta", "exact"), ("official", "entropy"))]
    for kernel, clock in (*pairs, ("exact", "entropy + distance")):
        for num_steps in steps:
            yield kernel, clock, num_steps
    if 16 in steps:
        yield "exact", "linear", 16


def study(chain: Chain, count: int, num_seeds: int, steps: Iterable[int]) -> list[Row]:
    """Print the table as it grows; the first row is data, the noise of every measure."""
    judge = Judge(chain, REFERENCE_SAMPLES)
    clocks: dict[str, Clock] = {
        "official": lambda num_steps: inference_times(num_steps, shift=1.0),
        "linear": lambda num_steps: equal_drops(num_steps, *distance_by_time(chain.path)),
        **measured_clocks(chain, CURVE_SAMPLES),
    }
    generators = [torch.Generator().manual_seed(2 + seed) for seed in range(num_seeds)]
    floor = torch.Generator().manual_seed(num_seeds + 2)
    rows = [Row("data", "", 0, 0, [judge(chain.sample(count, floor)) for _ in range(FLOOR_SETS)])]
    print(
        "| kernel | clock | steps | forwards | NLL gap | energy distance x 1000 | TV, 1 apart "
        "| TV, 6 apart |\n|---|---|---|---|---|---|---|---|"
    )
    print(rows[0].show(), flush=True)
    for kernel, clock, num_steps in settings(steps):
        times = clocks[clock](num_steps).tolist()
        done = [generate(chain, kernel, times, count, each) for each in generators]
        seeds = [judge(x) for x, _ in done]
        rows.append(Row(kernel, clock, num_steps, done[0][1], seeds))
        print(rows[-1].show(), flush=True)
    return rows


def goal(rows: list[Row]) -> list[str]:
    """Say how many exact steps of each clock do as well as 64 Euler steps.

    The energy distance is no worse if it is larger by no more than two standard errors of the
    difference of two rows, as fresh data have them.

    Args:
        rows: Of the table, the first of data.
    """
    baseline = next(row for row in rows if row.num_steps == MOST_STEPS)
    most_gap = baseline.mean("gap")
    noise = 2 * rows[0].spread("energy") * math.sqrt(2 / len(baseline.seeds))
    most_energy = baseline.mean("energy") + noise
    lines = [
        f"Euler, {MOST_STEPS} steps: gap {most_gap:.2f}; energy distance x 1000 "
        f"{baseline.mean('energy') * 1000:.1f}, no worse is up to {most_energy * 1000:.1f}"
    ]
    verdicts = []
    exact = [row for row in rows if row.kernel == "exact"]
    for clock, group in itertools.groupby(exact, key=lambda row: row.clock):
        near = [row for row in group if row.mean("gap") <= most_gap]
        both = [row.num_steps for row in near if row.mean("energy") <= most_energy]
        steps = [str(min(each, default="none")) for each in ([r.num_steps for r in near], both)]
        lines.append(
            f"exact, {clock} clock: fewest steps for the gap {steps[0]}, for both {steps[1]}"
        )
        verdict = "holds" if both and min(both) <= GOAL_STEPS else "does not hold"
        verdicts.append(f"{verdict} with the {clock} clock")
    return [*lines, f"P7, both with at most {GOAL_STEPS} steps: {', '.join(verdicts)}"]


def plot(rows: list[Row], file: Path) -> None:
    """Draw the gap against the number of forwards, a line a kernel and clock."""
    mpl.use("agg")
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    styles = {
        "official": ("-", "o"),
        "entropy": ("--", "s"),
        "entropy + distance": (":", "^"),
        "linear": ("", "D"),
    }
    colours = {"Euler": "#d55e00", "Euler in beta": "#e6a000", "exact": "#0072b2"}
    for (kernel, clock), group in itertools.groupby(rows[1:], key=lambda row: row[:2]):
        line = list(group)
        style, marker = styles[clock]
        axes.errorbar(
            [row.num_forwards for row in line],
            [row.mean("gap") for row in line],
            [row.spread("gap") for row in line],
            label=f"{kernel}, {clock} clock",
            color=colours[kernel],
            linestyle=style,
            marker=marker,
            capsize=3,
        )
    target = next(row for row in rows if row.num_steps == MOST_STEPS).mean("gap")
    axes.axhline(target, color="#777777", linewidth=0.8)
    axes.annotate(
        f"Euler, {MOST_STEPS} steps",
        (MOST_STEPS, target),
        (0, -14),
        textcoords="offset points",
        horizontalalignment="right",
    )
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set(xscale="log", xlabel="forwards of the denoiser")
    axes.set_ylabel(f"NLL gap, nats of {NUM_TOKENS} tokens")
    ticks = (*STEPS, MOST_STEPS)
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print the table and whether the goal holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=3072, help="sequences a row and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--plot", type=Path, help="where to write a PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # products of tiny probabilities
    torch.set_flush_denormal(True)
    began = time.process_time()
    chain = Chain(LEVELS, NUM_TOKENS)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread\n"
        f"{len(chain.codes)} of {chain.path.codebook_size} codes, {NUM_TOKENS} tokens, "
        f"{chain.entropy() / NUM_TOKENS:.2f} nats a token, "
        f"{arguments.seeds} seeds of {arguments.samples} samples\n"
    )
    rows = study(chain, arguments.samples, arguments.seeds, arguments.steps)
    print()
    print("\n".join(goal(rows)))
    print(f"{time.process_time() - began:.0f} s of processor time")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
