"""Flow: evaluate the trained model and register it as a version."""

from prefect import flow

from flows.staged_training import staged_training
from tasks.context import RunContext, TrainedModel, find_trained, run_session
from tasks.evaluation import evaluate_model, export_model
from tasks.options import ConfigOverrides
from tasks.registration import find_version, register_model, report_run
from ursa.artifacts import ModelVersion
from ursa.config import Preset


@flow(name="ursa-model-release", flow_run_name="release {preset}")
def model_release(
    source_uri: str,
    preset: Preset = "tiny",
    overrides: ConfigOverrides | None = None,
    context: RunContext | None = None,
    trained: TrainedModel | None = None,
) -> ModelVersion:
    """Export, evaluate and register; the version becomes champion when the gate holds.

    Args:
        source_uri: Directory, `s3://` prefix, manifest or tar file with videos (docs/sources.md).
        preset: Name of a complete configuration.
        overrides: Values that replace those of the preset.
        context: Set when the flow is part of a larger one.
        trained: Likewise: the model to release.

    Returns:
        The registered version.

    Raises:
        UrsaError: The first error of a task that did not go away.
    """
    with run_session(source_uri, preset, overrides, context) as run:
        version = find_version(run)
        if version is not None:
            return version
        if trained is None:
            trained = find_trained(run) or staged_training(source_uri, preset, context=run)
        model = export_model(run, trained)
        report = evaluate_model(run, trained, model)
        version = register_model(run, trained, report)
        report_run(run, trained, report, version)
        return version
