"""Flow: the three training stages, each starting from the weights of the last."""

from prefect import flow

from flows.data_preparation import data_preparation
from tasks.context import (
    PreparedData,
    RunContext,
    TrainedModel,
    commit_trained,
    find_prepared,
    find_trained,
    run_session,
)
from tasks.options import ConfigOverrides
from tasks.retraining import training_config
from tasks.training import fit_schedule, stage_request, train_stage
from ursa.artifacts import CheckpointRef
from ursa.config import Preset


@flow(name="ursa-staged-training", flow_run_name="training {preset}")
def staged_training(
    source_uri: str,
    preset: Preset = "tiny",
    overrides: ConfigOverrides | None = None,
    context: RunContext | None = None,
    prepared: PreparedData | None = None,
) -> TrainedModel:
    """Train on images, then on videos, then with one time a frame.

    Stages before one that has a start of its own (`init_from`) are left out.

    Args:
        source_uri: Directory, `s3://` prefix, manifest or tar file with videos (docs/sources.md).
        preset: Name of a complete configuration.
        overrides: Values that replace those of the preset.
        context: Set when the flow is part of a larger one.
        prepared: Likewise: the data to train on.

    Returns:
        The committed checkpoint of the last stage, and what it was made of.

    Raises:
        UrsaError: The first error of a task that did not go away.
    """
    with run_session(source_uri, preset, overrides, context) as run:
        trained = find_trained(run)
        if trained is not None:
            return trained
        if prepared is None:
            prepared = find_prepared(run) or data_preparation(source_uri, preset, context=run)
        fit_schedule(run, prepared)
        done: list[CheckpointRef] = []
        config = training_config(run, prepared)
        for stage in config.stages.needed():
            request = stage_request(run, prepared, stage, done[-1] if done else None, config)
            done.append(train_stage(run, request))
        return commit_trained(
            run,
            TrainedModel(
                selection=prepared.selection,
                version_uri=prepared.version_uri,
                request=request,
                checkpoint=done[-1],
                stages=tuple(done),
            ),
        )
