"""The schedule of a run: fitted to its codebook, committed once and read by every later step."""

from typing import Literal, Self

import torch

from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, StageRequest, TokenDatasets, TokenizerRef
from ursa.config import FrozenModel, PathConfig, fingerprint
from ursa.data.dataset import TokenSamples
from ursa.diffusion.linearization import fit_schedule
from ursa.diffusion.path import Codebook, MetricPath
from ursa.diffusion.schedule import TabulatedSchedule
from ursa.generation import SchedulerConfig
from ursa.tokenizers.visual import load_visual_tokenizer


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
        )

    def table(self) -> TabulatedSchedule:
        """Return the tabulated schedule."""
        return TabulatedSchedule(self.log_beta, max_logit=self.max_logit)


class _Scheduled(FrozenModel):
    """What decides a schedule, and where it is committed."""

    config: PathConfig
    tokenizer_fingerprint: str
    data_fingerprint: str | None

    def uri(self, output_uri: str) -> str:
        name = fingerprint("schedule", SCHEMA_VERSION, self)
        return storage.join(output_uri, "schedules", f"{name[:32]}.json")


def fit_path(
    config: PathConfig, tokenizer: TokenizerRef, datasets: TokenDatasets, *, output_uri: str
) -> FittedSchedule | None:
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
    uri = _Scheduled(
        config=config, tokenizer_fingerprint=tokenizer.fingerprint, data_fingerprint=data
    ).uri(output_uri)
    done = storage.load_record(uri, FittedSchedule)
    if done is not None:
        return done
    codebook = load_path_codebook(tokenizer, config)
    weights = None
    if counts:
        found = TokenSamples(datasets.video_train).code_counts(len(codebook))
        weights = torch.from_numpy(found)
    return storage.commit_record(uri, FittedSchedule.of(codebook, config, weights))


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
    fitted = fit_path(
        config, request.visual_tokenizer, request.datasets, output_uri=request.output_uri
    )
    if fitted is None:
        return SchedulerConfig(alpha=config.alpha, c=config.c, shift=shift, metric=config.metric)
    scheduler = SchedulerConfig(alpha=fitted.alpha, c=fitted.c, shift=shift, metric=config.metric)
    if fitted.kind == "power":
        return scheduler
    return scheduler.model_copy(update={"log_beta": fitted.log_beta, "max_logit": fitted.max_logit})


def build_path(request: StageRequest) -> MetricPath:
    """Return the metric path of a run: its codebook with its schedule."""
    codebook = load_path_codebook(request.visual_tokenizer, request.config.path)
    return MetricPath(codebook, schedule=scheduler_config(request).schedule())


def load_path_codebook(tokenizer: TokenizerRef, config: PathConfig) -> Codebook:
    """Return what the path of a committed visual tokenizer measures distances on.

    Raises:
        ConfigError: If the product path is asked for without an FSQ tokenizer.
    """
    with storage.local_directory(tokenizer.directory_uri) as folder:
        visual = load_visual_tokenizer(folder)
    return SchedulerConfig(metric=config.metric).codebook(visual.codebook, visual.levels)
