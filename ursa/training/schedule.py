"""The schedule of a run: fitted to its codebook, committed once and read by every later step."""

import io
from typing import Literal, NamedTuple, Self

import numpy as np
import torch

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, StageRequest, TokenDatasets, TokenizerRef
from ursa.config import FrozenModel, PathConfig, fingerprint
from ursa.data.dataset import code_counts
from ursa.diffusion.linearization import fit_schedule
from ursa.diffusion.path import Codebook, MetricPath
from ursa.diffusion.schedule import PowerSchedule, Schedule, TabulatedSchedule
from ursa.generation import SchedulerConfig
from ursa.tokenizers.visual import load_visual_tokenizer

PICTURE = "schedule.png"


class FittedSchedule(FrozenModel):
    """What was found for a codebook. Deviations are relative to the mean distance at t = 0.

    Attributes:
        kind: Which of the two the path takes.
        alpha: Exponent of the best power, or of the fixed one.
        c: Its scale.
        power_deviation: Largest deviation of the power from a straight line.
        power_pearson: Correlation of its mean distance with t.
        log_beta: Knots of the tabulated schedule; see `TabulatedSchedule`.
        max_logit: End of the table.
        table_deviation: Largest deviation of the table.
        table_pearson: Correlation of its mean distance with t.
        num_codes: Codes V.
        num_rows: Codes over which the mean was taken.
        collisions: Codes that another equals.
        curve: (beta, mean distance relative to that at beta = 0).
    """

    kind: Literal["power", "table"]
    alpha: float
    c: float
    power_deviation: float
    power_pearson: float
    log_beta: tuple[float, ...]
    max_logit: float
    table_deviation: float
    table_pearson: float
    num_codes: int
    num_rows: int
    collisions: int
    curve: tuple[tuple[float, float], ...]

    @classmethod
    def of(
        cls, codebook: Codebook, config: PathConfig, weights: torch.Tensor | None = None
    ) -> Self:
        """Fit the schedule to a codebook.

        Args:
            codebook: The codes.
            config: What is to fall linearly, and when the table is taken.
            weights: How often each code is x_1, shape (V,); None is uniformly.

        Returns:
            The fit, and what the path takes of it.

        Raises:
            ConfigError: If the codebook has no such distance.
        """
        fit = fit_schedule(codebook, weights, euclidean=config.distance == "euclidean")
        power, table = fit.power_linearity, fit.table_linearity
        bends = power.max_deviation > config.max_deviation
        return cls(
            kind="table" if config.schedule == "tabulated" or bends else "power",
            alpha=fit.power.alpha,
            c=fit.power.c,
            power_deviation=power.max_deviation,
            power_pearson=power.pearson,
            log_beta=fit.table.log_beta,
            max_logit=fit.table.max_logit,
            table_deviation=table.max_deviation,
            table_pearson=table.pearson,
            num_codes=len(codebook),
            num_rows=fit.num_rows,
            collisions=codebook.collisions(),
            curve=fit.curve,
        )

    def table(self) -> TabulatedSchedule:
        """Return the tabulated schedule."""
        return TabulatedSchedule(self.log_beta, max_logit=self.max_logit)

    def picture(self) -> bytes:
        """Return a PNG: how the mean distance falls in t, and beta, beside the published ones."""
        from matplotlib.figure import Figure  # noqa: PLC0415  (half a second, rarely needed)

        t = np.linspace(0, 1, 257)[1:-1]
        betas, means = np.array(self.curve).T
        schedules: dict[str, tuple[Schedule, str]] = {
            "alpha 0.9, c 3 (official default)": (PowerSchedule(0.9, 3.0), "-"),
            "alpha 1, c 5 (paper, FSQ)": (PowerSchedule(1.0, 5.0), "-"),
            f"alpha {self.alpha:.3g}, c {self.c:.3g}: off by {self.power_deviation:.1g}": (
                PowerSchedule(self.alpha, self.c),
                "-",
            ),
            f"table: off by {self.table_deviation:.1g}": (self.table(), ":"),
        }
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(t, 1 - t, color="0.7", linewidth=4, label="straight line")
        for label, (schedule, style) in schedules.items():
            beta = schedule.beta(torch.from_numpy(t)).numpy()
            # below the first beta measured the mean is a straight line in beta
            falls = np.interp(beta, np.append(0, betas), np.append(1, means))
            left.plot(t, falls, style, label=label)
            right.semilogy(t, beta, style, label=label)
        left.set(
            xlabel="t", ylabel="mean distance from x_1, relative", title=f"{self.num_codes} codes"
        )
        right.set(xlabel="t", ylabel="beta")
        left.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        return picture.getvalue()


class CommittedSchedule(NamedTuple):
    """A fit and the directory of its record and its picture, schedule.png."""

    fitted: FittedSchedule
    folder_uri: str


def fit_path(
    config: PathConfig, tokenizer: TokenizerRef, datasets: TokenDatasets, *, output_uri: str
) -> CommittedSchedule | None:
    """Fit the schedule of a run to its codebook, or return the committed fit.

    Args:
        config: The path.
        tokenizer: The visual tokenizer.
        datasets: Its tokens, whose frequencies count if the configuration says so.
        output_uri: Root of all data of the run.

    Returns:
        The committed fit; None if the schedule is fixed.

    Raises:
        ConfigError: If the codebook does not have what the configuration asks for.
    """
    if config.schedule == "fixed":
        return None
    counts = config.weights == "frequency"
    data = datasets.video_train.fingerprint if counts else None
    name = fingerprint("schedule", SCHEMA_VERSION, config, tokenizer.fingerprint, data)
    folder_uri = storage.join(output_uri, "schedules", name[:32])
    uri = storage.join(folder_uri, "manifest.json")
    done = storage.load_record(uri, FittedSchedule)
    if done is not None:
        return CommittedSchedule(done, folder_uri)
    codebook = SchedulerConfig(metric=config.metric).codebook(*load_codes(tokenizer))
    weights = None
    if counts:
        weights = torch.from_numpy(code_counts(datasets.video_train))
    fitted = FittedSchedule.of(codebook, config, weights)
    storage.write_bytes(storage.join(folder_uri, PICTURE), fitted.picture())
    return CommittedSchedule(storage.commit_record(uri, fitted), folder_uri)


def scheduler_config(request: StageRequest, *, shift: float = 1.0) -> SchedulerConfig:
    """Return the scheduler of a run, as an exported model has it.

    Args:
        request: Any stage of the run.
        shift: Timestep shift of the sampler.

    Returns:
        alpha and c; beside them the table where the path takes it.

    Raises:
        ConfigError: As `fit_path`.
    """
    config = request.config.path
    committed = fit_path(
        config, request.visual_tokenizer, request.datasets, output_uri=request.output_uri
    )
    if committed is None:
        return SchedulerConfig(alpha=config.alpha, c=config.c, shift=shift, metric=config.metric)
    fitted = committed.fitted
    scheduler = SchedulerConfig(alpha=fitted.alpha, c=fitted.c, shift=shift, metric=config.metric)
    if fitted.kind == "power":
        return scheduler
    return scheduler.model_copy(update={"log_beta": fitted.log_beta, "max_logit": fitted.max_logit})


def build_path(request: StageRequest) -> MetricPath:
    """Return the metric path of a run: its codebook with its schedule.

    Args:
        request: Any stage of the run; a schedule that is fitted is committed below its output.

    Returns:
        The path on the CPU, in float32.

    Raises:
        ConfigError: If there is no visual tokenizer where the request says, or its codes do not
            have what the path asks for.
    """
    return path_over(request, *load_codes(request.visual_tokenizer))


def path_over(
    request: StageRequest, codes: torch.Tensor, levels: tuple[int, ...] | None
) -> MetricPath:
    """Return the path of `build_path` over the codes of its tokenizer, which are at hand.

    Args:
        request: As for `build_path`.
        codes: Codes of the tokenizer, shape (V, D), any float type.
        levels: Its FSQ levels, if any.

    Returns:
        The path on the CPU, in float32.

    Raises:
        ConfigError: As `fit_path`.
    """
    scheduler = scheduler_config(request)
    return MetricPath(scheduler.codebook(codes, levels), schedule=scheduler.schedule())


def load_codes(tokenizer: TokenizerRef) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Return the codes of a committed visual tokenizer, and its FSQ levels if any.

    Args:
        tokenizer: The committed tokenizer.

    Returns:
        Codes, shape (V, D), float32, on the CPU, and levels, one a channel, or None.

    Raises:
        ConfigError: If there is no tokenizer.
    """
    with storage.local_directory(tokenizer.directory_uri) as folder:
        visual = load_visual_tokenizer(folder)
    return visual.codebook, visual.levels
