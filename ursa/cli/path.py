"""`ursa path`: fit the schedule of a probability path, or show a model's."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from ursa.cli.models import model_directory
from ursa.errors import ConfigError

app = App(name="path", help="The schedule of the probability path: fit one, or show a model's.")


@app.command
def fit(
    *,
    levels: str | None = None,
    tokenizer: Path | None = None,
    metric: Literal["normalized", "product"] = "normalized",
    distance: Literal["squared", "euclidean"] = "squared",
    out: Path | None = None,
) -> None:
    """Fit alpha and c, and a table, so that the mean distance falls linearly in t.

    Example: ursa path fit --levels 8,8,8,5,5,5 --out schedule.png

    Args:
        levels: FSQ levels, with commas between.
        tokenizer: Instead of levels, a directory of a visual tokenizer.
        metric: Distances of normalised codes, or of FSQ codes as they are.
        distance: What is to fall linearly.
        out: Where to draw it, .png.
    """
    if (levels is None) == (tokenizer is None):
        raise ConfigError("give --levels or --tokenizer, one of the two")
    if out is not None and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise ConfigError(f"--out must be a .png in a directory that exists, got {out}")
    from ursa.config import load_config
    from ursa.diffusion.grid import grid_codes
    from ursa.generation import SchedulerConfig
    from ursa.tokenizers.visual import load_visual_tokenizer
    from ursa.training.schedule import FittedSchedule

    if tokenizer is not None:
        visual = load_visual_tokenizer(tokenizer)
        codes, sizes = visual.codebook, visual.levels
    else:
        try:
            sizes = tuple(int(level) for level in str(levels).split(","))
        except ValueError as error:
            raise ConfigError(
                f"--levels must be numbers such as 8,8,8,5,5,5, got {levels}"
            ) from error
        codes = grid_codes(sizes)
    codebook = SchedulerConfig(metric=metric).codebook(codes, sizes)
    config = load_config("tiny").path.model_copy(update={"distance": distance, "metric": metric})
    fitted = FittedSchedule.of(codebook, config)
    print(f"codes      {fitted.num_codes}, {fitted.collisions} of them equal to another")
    print(
        f"power      alpha {fitted.alpha:.4f}, c {fitted.c:.4f}: off the line by at most "
        f"{fitted.power_deviation:.2g}, Pearson {fitted.power_pearson:.6f}"
    )
    print(
        f"table      {len(fitted.log_beta)} knots: off by at most {fitted.table_deviation:.2g}, "
        f"Pearson {fitted.table_pearson:.8f}"
    )
    if fitted.num_rows < fitted.num_codes:
        print(f"           fitted to {fitted.num_rows} codes, measured on as many others")
    if out is not None:
        out.write_bytes(fitted.picture())
        print(f"drawn      {out}")


@app.command
def show(*, model: str) -> None:
    """Show the schedule of a model, and how straight the mean distance falls under it.

    Example: ursa path show --model models:/ursa@champion

    Args:
        model: As in `ursa generate`.
    """
    import torch

    from ursa.diffusion.linearization import measure_linearity
    from ursa.diffusion.path import MetricPath
    from ursa.generation import UrsaPipeline

    with model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory)
    path, scheduler = pipeline.path, pipeline.scheduler
    if not isinstance(path, MetricPath):
        print("mixture path: no distances and no schedule")
        return
    table = "" if scheduler.log_beta is None else f"table of {len(scheduler.log_beta)} knots, near "
    print(f"schedule   {table}alpha {scheduler.alpha}, c {scheduler.c}; metric {scheduler.metric}")
    times = torch.tensor([0.04, 0.2, 0.5, 0.8, 0.9, 0.96, 0.99], dtype=torch.float64)
    print("t         " + "".join(f"{t:9.3g}" for t in times.tolist()))
    print("beta      " + "".join(f"{b:9.3g}" for b in path.beta(times).tolist()))
    for name, euclidean in (("squared", False), ("euclidean", True)):
        if euclidean and scheduler.metric == "product":
            continue
        found = measure_linearity(path.codebook, path.schedule, euclidean=euclidean)
        print(
            f"{name:10} off the straight line by at most {found.max_deviation:.2g}, "
            f"Pearson {found.pearson:.6f}"
        )
