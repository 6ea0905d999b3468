"""What belongs to one run: configuration, source, tracking run; and the records of its parts.

`start_run` checks everything that can be wrong before any work begins. The parts of a run
(prepared data, trained model) are committed as records, so that a run that has nothing to do finds
that out without loading a model.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from pydantic import Field

import ursa
from tasks import cluster, model_registry, releases, reports, tracking
from tasks.options import ConfigOverrides, announce, show_library_logs, step
from tasks.settings import RuntimeSettings
from tasks.tracking import TrackedRun
from ursa import ingestion, storage
from ursa.annotation.scorers import check_scorers, score_keys
from ursa.annotation.units import has_failures
from ursa.artifacts import (
    SCHEMA_VERSION,
    CheckpointRef,
    ClipSelection,
    ClipSet,
    StageRequest,
    TokenDatasets,
    TokenizerRef,
)
from ursa.config import (
    STAGES,
    FrozenModel,
    Preset,
    RunConfig,
    StageConfig,
    fingerprint,
    load_config,
)
from ursa.data.versions import newest_version, recorded_source
from ursa.errors import ConfigError
from ursa.sources.committed import SourceListing, commit_listing
from ursa.sources.listing import discover_videos
from ursa.video.selection import check_rules


class Start(FrozenModel):
    """The registered version that a retraining goes on from.

    Attributes:
        model_uri: `models:/<name>/<version>`.
        directory_uri: Its model directory.
        tokens_uri: Manifest of the token data sets that it was trained on.
        network: Its `network_fingerprint`.
    """

    model_uri: str
    directory_uri: str
    tokens_uri: str
    network: str


class RunContext(FrozenModel):
    """What all steps of a run share.

    Attributes:
        source_uri: The source, absolute.
        data_uri: Root of all data that runs make.
        preset: Name of the preset.
        config: Preset and overrides, merged.
        sources_uri: Record of the source's files, a `SourceListing`.
        source_fingerprint: Hash of files and captions of the source.
        newest_version: Number of the newest version of the data set when the source was listed.
        start: What a retraining goes on from; None trains all stages.
        fingerprint: Hash of configuration, source and start.
        run: Parent run in the tracking server.
    """

    source_uri: str
    data_uri: str
    preset: Preset
    config: RunConfig
    sources_uri: str
    source_fingerprint: str
    newest_version: int = 0
    start: Start | None
    fingerprint: str
    run: TrackedRun

    @property
    def prepared_uri(self) -> str:
        """Where the record of the prepared data is committed."""
        key = fingerprint("prepared", self.fingerprint, code_fingerprint())
        return storage.join(self.data_uri, "prepared", key[:32], "manifest.json")

    @property
    def trained_uri(self) -> str:
        """Where the record of the trained model is committed."""
        key = fingerprint("trained", self.fingerprint, code_fingerprint())
        return storage.join(self.data_uri, "trained", key[:32], "manifest.json")

    @property
    def release_fingerprint(self) -> str:
        """What makes two registrations of this run the same: configuration, source and code."""
        return fingerprint("released", self.fingerprint, code_fingerprint())


class PreparedData(FrozenModel):
    """The outcome of the data part of a run, committed."""

    selection: ClipSelection
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef
    datasets: TokenDatasets
    version_uri: str


class TrainedModel(FrozenModel):
    """The outcome of the training part of a run, committed."""

    selection: ClipSelection
    version_uri: str
    request: StageRequest
    checkpoint: CheckpointRef
    stages: tuple[CheckpointRef, ...] = Field(
        default=(), description="all that this run has trained, in their order; not in old records"
    )


@functools.cache
def code_fingerprint() -> str:
    """Return a hash of the source of the library: other code looks at every step again."""
    root = Path(ursa.__file__).parent
    return fingerprint(
        [storage.sha256_file(path) for path in sorted(root.rglob("*.py")) if path.is_file()]
    )


def with_registered_starts(config: RunConfig, tracking_uri: str) -> RunConfig:
    """Put directories in the place of registered models that stages start from.

    An alias may move: what the run begins with decides it to its end, and is in its fingerprint.

    Args:
        config: The configuration as given.
        tracking_uri: Address of the tracking server.

    Returns:
        The configuration in which every `init_from` is a directory.

    Raises:
        ConfigError: If there is no such version.
        ServiceError: If the server does not answer.
    """
    found: dict[str, StageConfig] = {}
    for name in STAGES:
        stage: StageConfig = getattr(config.stages, name)
        if stage.init_from is not None and stage.init_from.startswith(releases.REGISTRY_SCHEME):
            directory = model_registry.registered_directory(tracking_uri, stage.init_from)
            found[name] = stage.model_copy(update={"init_from": directory})
    stages = config.stages.model_copy(update=found)
    return config.model_copy(update={"stages": stages})


def check_adapters(config: RunConfig) -> None:
    """Refuse to begin where adapters are to be trained and peft is missing.

    Args:
        config: The run.

    Raises:
        ConfigError: Names the stage and the extra to install.
    """
    for name in config.stages.needed():
        if getattr(config.stages, name).lora is not None:
            from ursa.model.adapters import check_peft  # noqa: PLC0415  (torch: seconds)

            check_peft(f"stages.{name}.lora")


@step(run_name="check and start", retries=1)
def start_run(
    source_uri: str, preset: Preset, overrides: ConfigOverrides | None, start: Start | None = None
) -> RunContext:
    """Check configuration, services, store and source; open the run in the tracking server.

    Args:
        source_uri: As `ursa.sources.listing.discover_videos` takes it.
        preset: Name of a preset.
        overrides: Values to change in it; None changes none.
        start: The version that a retraining goes on from.

    Returns:
        What all steps of the run share.

    Raises:
        ConfigError: If the environment, a key or a value is refused.
        ServiceError: If the tracking server does not answer.
        DataError: If the source does not exist or holds no video.
        StorageError: If the store cannot be used.
    """
    settings = RuntimeSettings.from_env()
    config = given_config(preset, overrides)
    # before hours of work
    check_scorers(config.annotation)
    check_rules(config.selection, score_keys(config.annotation))
    check_adapters(config)
    tracking.check_service(settings.mlflow_tracking_uri)
    config = with_registered_starts(config, settings.mlflow_tracking_uri)
    place = recorded_source(settings.data_uri, source_uri)
    newest = newest_version(settings.data_uri, place)
    listing = list_source(place, config, settings)
    uri, sources, source_fingerprint = listing.source_uri, listing.sources, listing.fingerprint
    storage.check_store(settings.data_uri)
    commit_listing(listing)
    run_fingerprint = fingerprint(config, source_fingerprint, *([start] if start else []))
    run = tracking.open_run(
        settings.mlflow_tracking_uri,
        f"{preset} {Path(uri).name} {run_fingerprint[:8]}",
        run_fingerprint,
        {
            **reports.flow_run_tags(),
            **tracking.source_version(),
            "ursa.preset": preset,
            "ursa.source_uri": uri,
            "ursa.source_fingerprint": source_fingerprint,
        },
        spool_uri=settings.uri("spool"),
    )
    tracking.log_config(run, config)
    announce(
        "%d files at %s, preset %s, run %s: %s", len(sources), uri, preset, run.run_id, run.url
    )
    return RunContext(
        source_uri=uri,
        data_uri=settings.data_uri,
        preset=preset,
        config=config,
        sources_uri=listing.manifest_uri,
        source_fingerprint=source_fingerprint,
        newest_version=0 if newest is None else newest.number,
        start=start,
        fingerprint=run_fingerprint,
        run=run,
    )


def given_config(preset: Preset, overrides: ConfigOverrides | None) -> RunConfig:
    """Return the configuration of a preset and what is changed in it.

    Args:
        preset: Name of a preset.
        overrides: Values to change in it; None changes none.

    Raises:
        ConfigError: If a key or a value is refused.
    """
    given = overrides.model_dump(mode="json", exclude_unset=True) if overrides else {}
    return load_config(preset, given)


def list_source(source_uri: str, config: RunConfig, settings: RuntimeSettings) -> SourceListing:
    """Return what is at a source now; nothing is written.

    Args:
        source_uri: As `ursa.sources.listing.discover_videos` takes it.
        config: The run.
        settings: Where data are.

    Raises:
        ConfigError: If the data root is inside the source.
        DataError: If the source does not exist or holds no video.
        StorageError: If the store cannot be used.
    """
    # another spelling would be another source: everything would be made anew
    uri = recorded_source(settings.data_uri, source_uri)
    if storage.has_visible_place(settings.data_uri, uri):
        raise ConfigError(
            f"the data root {settings.data_uri} is inside the source {uri}: each run would take "
            "the clips of the one before for new videos; put it elsewhere (URSA_DATA_URI), or give "
            "the folder of the videos alone"
        )
    sources = discover_videos(
        uri,
        allow_https=config.ingestion.allow_https,
        hash_cache=platformdirs.user_cache_path("ursa") / "hashes.sqlite",
    )
    notes_digest = ingestion.notes_digest(uri, sources)
    key = fingerprint(SCHEMA_VERSION, uri, sources, notes_digest)
    return SourceListing(
        manifest_uri=sources_uri(key, settings),
        source_uri=uri,
        sources=sources,
        notes_digest=notes_digest,
        fingerprint=key,
    )


def sources_uri(source_fingerprint: str, settings: RuntimeSettings) -> str:
    """Return where the record of a source's files is.

    Args:
        source_fingerprint: Hash of files and captions.
        settings: Where data are.
    """
    return settings.uri("sources", source_fingerprint[:32], "manifest.json")


@contextlib.contextmanager
def run_session(
    source_uri: str,
    preset: Preset,
    overrides: ConfigOverrides | None,
    context: RunContext | None = None,
    start: Start | None = None,
) -> Iterator[RunContext]:
    """Yield the context of a flow: the given one of the larger flow, or a new one.

    The flow that made the context closes the tracking run with the right status and stops Ray.

    Args:
        source_uri: As `ursa.sources.listing.discover_videos` takes it.
        preset: Name of a preset.
        overrides: Values to change in it; None changes none.
        context: That of the larger flow; then the other arguments are not read.
        start: The version that a retraining goes on from.

    Yields:
        The context.

    Raises:
        UrsaError: What `start_run` raises.
    """
    if context is not None:
        yield context
        return
    show_library_logs()
    try:
        mine = start_run(source_uri, preset, overrides, start)
        try:
            yield mine
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            tracking.close_run(mine.run, status)
            raise
        tracking.close_run(mine.run, "FINISHED")
    finally:
        cluster.shutdown()


@step(run_name="look for finished data")
def find_prepared(context: RunContext) -> PreparedData | None:
    """Return the prepared data of the run if all of it is there.

    Args:
        context: The run.

    Returns:
        The record; None unless all of its parts are still committed.

    Raises:
        ManifestError: If the record is damaged.
        StorageError: If the store refuses or does not answer.
    """
    found = storage.load_record(context.prepared_uri, PreparedData)
    if found is None:
        return None
    parts = (
        found.selection.manifest_uri,
        found.visual_tokenizer.manifest_uri,
        found.text_tokenizer.manifest_uri,
        found.datasets.manifest_uri,
        found.version_uri,
    )
    return found if all(storage.exists(uri) for uri in parts) else None


@step(run_name="commit data")
def commit_prepared(context: RunContext, prepared: PreparedData) -> PreparedData:
    """Commit the prepared data of the run, unless files are missing in it only for now.

    Args:
        context: The run.
        prepared: The outcome of the data part.

    Returns:
        What is committed, or `prepared` as it is.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if _lacks_for_now(prepared.selection.clips, prepared.datasets):
        return prepared
    return storage.commit_record(context.prepared_uri, prepared)


@step(run_name="look for a finished model")
def find_trained(context: RunContext) -> TrainedModel | None:
    """Return the trained model of the run if it is there.

    Args:
        context: The run.

    Returns:
        The record; None unless its checkpoint is still there.

    Raises:
        ManifestError: If the record is damaged.
        StorageError: If the store refuses or does not answer.
    """
    found = storage.load_record(context.trained_uri, TrainedModel)
    if found is None or not _checkpoint_exists(found.checkpoint):
        return None
    return found


def lacks_for_now(trained: TrainedModel) -> bool:
    """Whether the next run is to look again at files or clips that failed.

    Args:
        trained: The outcome of the training part.
    """
    return _lacks_for_now(trained.selection.clips, trained.request.datasets)


def _lacks_for_now(clips: ClipSet, datasets: TokenDatasets) -> bool:
    return (
        ingestion.has_unstable_failures(clips)
        or has_failures(clips)
        or datasets.num_unavailable_clips > 0
    )


def _checkpoint_exists(checkpoint: CheckpointRef) -> bool:
    try:
        return bool(storage.list_files(checkpoint.weights_uri, with_etag=False))
    except FileNotFoundError:
        return False


@step(run_name="commit model")
def commit_trained(context: RunContext, trained: TrainedModel) -> TrainedModel:
    """Commit the trained model of the run, unless files are missing in its data only for now.

    Args:
        context: The run.
        trained: The outcome of the training part.

    Returns:
        What is committed, or `trained` as it is.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if lacks_for_now(trained):
        return trained
    return storage.commit_record(context.trained_uri, trained)
