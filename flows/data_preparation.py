"""Flow: from video files to token data sets."""

from prefect import flow

from tasks import annotation, ingestion, tokenization, versions
from tasks.context import PreparedData, RunContext, commit_prepared, find_prepared, run_session
from tasks.options import ConfigOverrides
from ursa.artifacts import ClipSelection
from ursa.config import Preset


def selected_clips(run: RunContext) -> ClipSelection:
    """Ingest, annotate and select.

    Args:
        run: The run.

    Returns:
        The committed selection.

    Raises:
        UrsaError: The first error of a task that did not go away.
    """
    clips = annotation.annotate_clips(run, ingestion.ingest_videos(run))
    return ingestion.select_clips(run, clips)


@flow(name="ursa-data-preparation", flow_run_name="data {preset}", validate_parameters=True)
def data_preparation(
    source_uri: str,
    preset: Preset = "tiny",
    overrides: ConfigOverrides | None = None,
    context: RunContext | None = None,
    selection: ClipSelection | None = None,
) -> PreparedData:
    """Ingest, annotate, select, fit the tokenizers and tokenize.

    Args:
        source_uri: Directory, `s3://` prefix, manifest or tar file with videos (docs/sources.md).
        preset: Name of a complete configuration.
        overrides: Values that replace those of the preset.
        context: Set when the flow is part of a larger one.
        selection: Likewise: the clips, if they were looked at already.

    Returns:
        The committed selection, tokenizers and token data sets.

    Raises:
        UrsaError: The first error of a task that did not go away.
    """
    with run_session(source_uri, preset, overrides, context) as run:
        prepared = find_prepared(run)
        if prepared is not None:
            versions.note_version(run, prepared)
            return prepared
        if selection is None:
            selection = selected_clips(run)
        visual_tokenizer = ingestion.fit_visual_tokenizer(run, selection)
        text_tokenizer = ingestion.fit_text_tokenizer(run, selection)
        datasets = tokenization.tokenize_clips(run, selection, visual_tokenizer)
        version = versions.commit_version(
            run, selection, visual_tokenizer, text_tokenizer, datasets
        )
        return commit_prepared(
            run,
            PreparedData(
                selection=selection,
                visual_tokenizer=visual_tokenizer,
                text_tokenizer=text_tokenizer,
                datasets=datasets,
                version_uri=version.manifest_uri,
            ),
        )
