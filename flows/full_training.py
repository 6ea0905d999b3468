"""Flow: from video files to a registered model."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.data_preparation import data_preparation, selected_clips
from flows.model_release import model_release
from flows.staged_training import staged_training
from tasks.context import find_prepared, run_session
from tasks.options import ConfigOverrides
from tasks.registration import find_version, finish_run
from tasks.retraining import NewData, compare_new_clips, look_for_new_data
from tasks.versions import note_version
from ursa.artifacts import ModelVersion
from ursa.config import Preset


@flow(name="ursa", flow_run_name="full-training {preset} {source_uri}")
def full_training(
    source_uri: str,
    preset: Preset = "tiny",
    overrides: ConfigOverrides | None = None,
    only_new: bool = False,  # noqa: FBT001, FBT002  (a field of the Prefect form)
) -> State[ModelVersion]:
    """Prepare the data, train in three stages, evaluate and register.

    Finished work is never done again: a run that was stopped goes on where it was, and a run with
    nothing to do ends as `NothingChanged`.

    Args:
        source_uri: Directory, `s3://` prefix, manifest or tar file with videos (docs/sources.md).
        preset: Name of a complete configuration.
        overrides: Values that replace those of the preset.
        only_new: End as `NoNewData` when there are too few new files since the newest version, or
            their clips are like those of the champion; else go on from it, as `retraining` says.

    Returns:
        Final state, named `Completed`, `NothingChanged` or `NoNewData`.

    Raises:
        UrsaError: The first error of a task that did not go away.
    """
    new = look_for_new_data(source_uri, preset, overrides) if only_new else NewData()
    if new.refusal is not None:
        return Completed(name="NoNewData", message=new.refusal)
    with run_session(source_uri, preset, overrides, start=new.start) as run:
        version = find_version(run)
        known = None if version is None else find_prepared(run)
        if known is not None:
            note_version(run, known)
        if version is None:
            selection = None
            if new.reference_uri is not None:
                selection = selected_clips(run)
                refusal = compare_new_clips(run, selection, new.reference_uri)
                if refusal is not None:
                    return Completed(name="NoNewData", message=refusal)
            prepared = data_preparation(source_uri, preset, context=run, selection=selection)
            trained = staged_training(source_uri, preset, context=run, prepared=prepared)
            version = model_release(source_uri, preset, context=run, trained=trained)
        return finish_run(run, version)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source_uri")
    parser.add_argument("--preset", default="tiny")
    arguments = parser.parse_args()
    full_training(arguments.source_uri, arguments.preset)
