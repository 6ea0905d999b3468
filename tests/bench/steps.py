"""Quality against the number of forwards on a trained model: solvers and clocks of the sampler.

    python tests/bench/steps.py .ursa/data              # after `make run`, some minutes

For every solver, clock and number of steps it draws clips for captions of the training windows
(guidance off, temperature 1: the model's own law) and compares them with those windows:

- energy distance (Szekely and Rizzo, 2013) of codes, normalised, averaged over 4 x 4 places and
  flattened, x 1000: whole clips;
- total variation of pairs of neighbouring codes (below, right, next frame), each code reduced to
  the signs of its channels: local coherence;
- nats a token that the model gives the clips, noised to t = 0.5.

A seed chooses windows at random; clips are drawn for their captions and compared with the other
windows, and so are the chosen windows themselves ("real"): about what a perfect sampler would get,
or a little more, as windows of one clip resemble each other. The model was trained on all of them.
Three seeds, mean and deviation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ursa import storage
from ursa.artifacts import ExportedModel, TokenDatasets
from ursa.config import FrozenModel
from ursa.data.dataset import TokenBatch, TokenSamples
from ursa.diffusion.loss import linear_posterior_loss
from ursa.generation import UrsaPipeline

SAMPLERS = (
    ("euler", "official"),
    ("euler_beta", "official"),
    ("exact", "official"),
    ("exact", "linear"),
    ("exact", "entropy"),
    ("euler_beta", "entropy"),
)
POOL = 4
Trial = tuple[int, TokenBatch, Tensor, Tensor]
"""Seed, chosen windows, and features and pairs of the others."""
Record = TypeVar("Record", bound=FrozenModel)


def newest(root: Path, pattern: str, kind: type[Record]) -> Record:
    """Return the newest committed record below the data of a checkout."""
    found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime)
    record = storage.load_record(str(found[-1]), kind) if found else None
    if record is None:
        sys.exit(f"no {pattern} at {root}; `make run` makes it")
    return record


def features(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return one row a clip, shape (B, F)."""
    rows = torch.nn.functional.normalize(codebook, dim=-1)[codes]  # (B, T, h, w, C)
    pooled = torch.nn.functional.avg_pool2d(rows.flatten(0, 1).movedim(-1, 1), POOL)
    return pooled.reshape(len(codes), -1)


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, X' and Y' other samples than X and Y."""

    def within(rows: Tensor) -> Tensor:
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * torch.cdist(one, other).mean() - within(one) - within(other))


def pair_shares(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return how often each pair of coarse codes stands side by side, summing to 1."""
    coarse = ((codebook > 0).long() * 2 ** torch.arange(codebook.shape[1])).sum(-1)[codes]
    size = 2 ** codebook.shape[1]
    counts = torch.zeros(3, size * size)
    for axis in (1, 2, 3):
        length = coarse.shape[axis] - 1
        pairs = coarse.narrow(axis, 0, length) * size + coarse.narrow(axis, 1, length)
        counts[axis - 1] = torch.bincount(pairs.flatten(), minlength=size * size)
    return counts / counts.sum(-1, keepdim=True) / 3


@torch.no_grad()
def nats(pipeline: UrsaPipeline, codes: Tensor, captions: Sequence[str], seed: int) -> float:
    """Return the model's cross-entropy of clips noised to t = 0.5."""
    generator = torch.Generator().manual_seed(seed)
    x_t = pipeline.path.sample(codes, 0.5, generator=generator)
    text = pipeline.text_tokenizer.encode(
        list(captions), max_length=pipeline.defaults.max_prompt_length
    )
    hidden = pipeline.transformer.hidden_states(text, x_t)
    weight = pipeline.transformer.lm_head.weight
    return float(linear_posterior_loss(hidden, weight, codes.flatten(1)).loss)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the data of a run, such as .ursa/data")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    model = newest(arguments.data, "models/*/manifest.json", ExportedModel)
    datasets = newest(arguments.data, "tokens/*/manifest.json", TokenDatasets)
    with storage.local_directory(model.directory_uri) as folder:
        pipeline = UrsaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    samples = TokenSamples(datasets.video_train)
    codebook = pipeline.codebook
    trials = []
    for seed in range(arguments.seeds):
        order = np.random.default_rng(seed).permutation(len(samples)).tolist()
        chosen, others = samples.batch(order[: arguments.clips]), order[arguments.clips :]
        rest = samples.batch(others).visual_ids
        trials.append((seed, chosen, features(rest, codebook), pair_shares(rest, codebook)))

    def measure(codes: Tensor, trial: Trial) -> list[float]:
        seed, chosen, rest, shares = trial
        variation = 0.5 * (pair_shares(codes, codebook) - shares).abs().sum()
        return [
            1000 * energy_distance(features(codes, codebook), rest),
            float(variation),
            nats(pipeline, codes, chosen.captions, seed),
        ]

    def show(cells: Sequence[str], rows: Sequence[list[float]]) -> None:
        columns = np.array(rows).T
        numbers = [f"{column.mean():.3g} ± {column.std():.1g}" for column in columns]
        print("| " + " | ".join([*cells, *numbers]) + " |", flush=True)

    print(f"{arguments.clips} clips of {len(samples)} windows, {arguments.seeds} seeds\n")
    print("| solver | clock | forwards | energy distance x 1000 | pairs | nats |")
    print("|---|---|---|---|---|---|")
    rows = [measure(trial[1].visual_ids, trial) for trial in trials]
    show(["real windows", "", ""], rows)
    for solver, clock in SAMPLERS:
        for steps in arguments.steps:
            rows = []
            for trial in trials:
                codes = pipeline(
                    list(trial[1].captions),
                    num_inference_steps=steps,
                    guidance_scale=1.0,
                    temperature=1.0,
                    flow_shift=1.0,
                    solver=solver,
                    clock=clock,
                    generator=torch.Generator().manual_seed(1000 + trial[0]),
                    output_type="latent",
                ).frames
                rows.append(measure(codes, trial))
            rests = solver == "euler" and pipeline.path.rests_at_start
            show([solver, clock, str(steps - rests)], rows)


if __name__ == "__main__":
    main()
