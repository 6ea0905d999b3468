"""Task: one training stage, on Ray Train or on plain local processes."""

import functools

from prefect.settings import get_current_settings

from tasks import cluster, metric_sink, reports, stage_worker, tracking
from tasks.context import PreparedData, RunContext
from tasks.options import announce, step
from tasks.retraining import known_tokens
from tasks.settings import RuntimeSettings
from ursa.artifacts import CheckpointRef, StageRequest
from ursa.config import RunConfig, StageName

LOSS_PICTURE = "loss_by_frame"
"""Series of pictures of the held-out loss by time and latent frame."""


def stage_request(
    context: RunContext,
    prepared: PreparedData,
    stage: StageName,
    init_from: CheckpointRef | None,
    config: RunConfig,
) -> StageRequest:
    """Put together everything that decides a stage.

    Args:
        context: The run.
        prepared: The outcome of its data part.
        stage: Name of the stage.
        init_from: Checkpoint that it starts from; None starts anew.
        config: The run, as `training_config` says.

    Returns:
        The request.
    """
    return StageRequest(
        stage=stage,
        config=config,
        datasets=prepared.datasets,
        visual_tokenizer=prepared.visual_tokenizer,
        text_tokenizer=prepared.text_tokenizer,
        init_from=init_from,
        known=known_tokens(context),
        output_uri=context.data_uri,
    )


@step(run_name="fit the schedule")
def fit_schedule(context: RunContext, prepared: PreparedData) -> None:
    """See `ursa.training.schedule.fit_path`; figures and picture go to the tracking server.

    Args:
        context: The run.
        prepared: The outcome of the data part.

    Raises:
        ServiceError: If the tracking server does not answer.
        UrsaError: What that function raises.
    """
    from ursa.training import schedule  # noqa: PLC0415  (torch: seconds)

    committed = schedule.fit_path(
        context.config.path,
        prepared.visual_tokenizer,
        prepared.datasets,
        output_uri=context.data_uri,
    )
    if committed is None:
        return
    fitted = committed.fitted
    numbers = fitted.model_dump(exclude={"kind", "log_beta", "max_logit", "curve"})
    metric_sink.log_metrics(context.run, {f"path/{key}": value for key, value in numbers.items()})
    tracking.log_files(context.run, committed.folder_uri, [schedule.PICTURE], "path")
    announce(
        "schedule: alpha %.3g, c %.3g off the line by %.1g, table by %.1g; the path takes the %s",
        fitted.alpha,
        fitted.c,
        fitted.power_deviation,
        fitted.table_deviation,
        fitted.kind,
    )


@step(run_name="train {request.stage}", retries=5)
def train_stage(context: RunContext, request: StageRequest) -> CheckpointRef:
    """See `ursa.training.stage.train_stage`; returns at once when the stage is committed.

    The tracking server is needed at the beginning only. When it goes away later, training goes on
    and its metrics wait in the spool of the run.

    Args:
        context: The run.
        request: Everything that decides the stage.

    Returns:
        The committed checkpoint.

    Raises:
        TrainingError: If the loss is not finite, there is no data, or a checkpoint is damaged.
        ConfigError: If the batch cannot be divided evenly among the workers.
        ServiceError: If Ray or the tracking server cannot be reached.
        StorageError: If the store refuses or does not answer.
    """
    from ursa.training import stage, validation  # noqa: PLC0415  (torch: seconds)

    name = reports.slug(request.stage)
    checkpoint = stage.find_stage(request)
    tags = {"ursa.fingerprint": context.fingerprint, **reports.flow_run_tags()}
    with tracking.child_run(context.run, name, tags) as run:
        modality = getattr(request.config.stages, request.stage).modality
        dataset = request.datasets.get(modality, "train")
        tracking.log_inputs(
            run,
            [
                tracking.DatasetInput(
                    f"tokens-{dataset.modality}-{dataset.split}",
                    dataset.manifest_uri,
                    request.datasets.fingerprint,
                    "training",
                )
            ],
        )
        announce("stage %s: %s", request.stage, run.url)
        if checkpoint is None:
            checkpoint = _train(request, run, name)
        tracking.log_stage_samples(run, stage.samples_uri(request), set())
        if checkpoint.grids:
            tracking.log_picture_step(
                run, validation.picture(checkpoint.grids), LOSS_PICTURE, checkpoint.step
            )
    facts = {
        "checkpoint": f"`{checkpoint.uri}`",
        "steps": str(checkpoint.step),
        "samples seen": str(checkpoint.num_samples_seen),
        "curves": f"[MLflow]({run.url})",
    }
    reports.stage_summary(request.stage, checkpoint.metrics, facts)
    return checkpoint


def _train(request: StageRequest, run: tracking.TrackedRun, name: str) -> CheckpointRef:
    from ursa.training import stage  # noqa: PLC0415

    settings = RuntimeSettings.from_env()
    artifact = reports.start_progress(f"train-{name}-progress", f"stage {request.stage}")
    progress_url = f"{get_current_settings().api.url}/artifacts/{artifact}" if artifact else ""
    if settings.launcher == "ray":
        checkpoint = cluster.run_distributed(
            stage_worker.run_stage,
            {
                "request": request.model_dump_json(),
                "execution": settings.execution.model_dump_json(),
                "run": run.model_dump_json(),
                "progress_url": progress_url,
            },
            functools.partial(stage.find_stage, request),
            settings,
        )
    else:
        config = getattr(request.config.stages, request.stage)
        progress = stage_worker.StageProgress(progress_url, config.max_steps)
        samples = stage_worker.StageSamples(run, stage.samples_uri(request), progress)
        sink = stage_worker.LocalSink(run, samples)
        try:
            checkpoint = stage.launch_local(
                request,
                num_workers=settings.num_train_workers,
                execution=settings.execution,
                on_metrics=sink,
            )
        finally:
            sink.close()
    reports.set_progress(artifact, 100.0, f"stage {request.stage}: {checkpoint.step} steps done")
    return checkpoint
