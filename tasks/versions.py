"""Task: commit the version of the data set, and show what is in it."""

import ursa
from tasks import reports, tracking
from tasks.context import PreparedData, RunContext, list_source
from tasks.options import announce, step
from tasks.settings import RuntimeSettings
from ursa import storage
from ursa.artifacts import ClipSelection, TokenDatasets, TokenizerRef
from ursa.data import versions
from ursa.data.versions import DatasetVersion
from ursa.errors import DataError

CARD = "data-card.html"
CARD_FOLDER = "data"


@step(run_name="commit data set version")
def commit_version(
    context: RunContext,
    selection: ClipSelection,
    visual_tokenizer: TokenizerRef,
    text_tokenizer: TokenizerRef,
    datasets: TokenDatasets,
) -> DatasetVersion:
    """See `ursa.data.versions.commit_version`; the data card goes to the tracking server.

    Args:
        context: The run.
        selection: The committed selection.
        visual_tokenizer: The committed visual tokenizer.
        text_tokenizer: The committed text tokenizer.
        datasets: The four committed data sets.

    Returns:
        The committed version.

    Raises:
        DataError: If the source has changed and another run has committed a version of that.
        ManifestError: If what another run has just committed is damaged.
        ServiceError: If the tracking server does not answer.
        ShardFormatError: If a table of the clips or of the changes is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    _refuse_old_listing(context)
    version = versions.commit_version(
        context.data_uri,
        context.config,
        selection,
        (visual_tokenizer, text_tokenizer),
        datasets,
        code={"ursa": ursa.__version__, **tracking.source_version()},
    )
    counts = ", ".join(f"{count} {change}" for change, count in version.changes.items())
    announce("data set version %d: %s, %d as before", version.number, counts, version.num_unchanged)
    reports.dataset_version(version, versions.read_changes(version))
    _publish_card(context, version)
    return version


@step(run_name="note data set version")
def note_version(context: RunContext, prepared: PreparedData) -> DatasetVersion:
    """Commit the version of prepared data again if another one came since: the source went back.

    Args:
        context: The run.
        prepared: Its data, all of which is there.

    Returns:
        The newest version, which is of these data.

    Raises:
        ManifestError: If what another run has just committed is damaged.
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    return versions.commit_version(
        context.data_uri,
        context.config,
        prepared.selection,
        (prepared.visual_tokenizer, prepared.text_tokenizer),
        prepared.datasets,
        code={"ursa": ursa.__version__, **tracking.source_version()},
    )


def _refuse_old_listing(context: RunContext) -> None:
    """Refuse a listing that a version committed since may know better: what was removed came back.

    A source that has changed is no reason by itself: the next run takes that up.
    """
    newest = versions.newest_version(context.data_uri, context.source_uri)
    if newest is None or newest.number <= context.newest_version:
        return
    now = list_source(context.source_uri, context.config, RuntimeSettings.from_env())
    if now.fingerprint != context.source_fingerprint:
        raise DataError(
            f"{context.source_uri} has changed since this run listed it, and another run has "
            f"committed version {newest.number} of its data set meanwhile: run again (what is done "
            "is kept)"
        )


def _publish_card(context: RunContext, version: DatasetVersion) -> None:
    """Write the data card beside the version, and log and link it."""
    from ursa.inspection.card import data_card  # noqa: PLC0415  (matplotlib: a second)

    folder_uri = storage.join(context.data_uri, "cards", version.fingerprint[:32])
    card = data_card(
        context.data_uri, selection_uri=version.selection.manifest_uri, config=context.config
    )
    storage.put_if_absent(storage.join(folder_uri, CARD), card.encode())
    with tracking.child_run(context.run, "data", reports.flow_run_tags()) as run:
        tracking.log_files(run, folder_uri, [CARD], CARD_FOLDER)
        tracking.tag_run(run, {"ursa.dataset_version": version.manifest_uri})
    reports.link(
        "data-card",
        run.page(f"{CARD_FOLDER}/{CARD}"),
        f"data card of version {version.number}",
        "Funnel, scores, sizes, captions and examples of the clips.",
    )
