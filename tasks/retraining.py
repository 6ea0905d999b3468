"""Tasks: is there enough new to train, and what does the training go on from."""

from tasks import metric_sink, model_registry, releases, reports, tracking
from tasks.context import (
    PreparedData,
    RunContext,
    Start,
    TrainedModel,
    code_fingerprint,
    given_config,
    list_source,
    sources_uri,
)
from tasks.options import ConfigOverrides, announce, step
from tasks.settings import RuntimeSettings
from ursa import ingestion, storage
from ursa.artifacts import ClipSelection, TokenDatasets, TokenizerRef
from ursa.config import FrozenModel, Preset, RunConfig, fingerprint
from ursa.drift import Drift, measure_drift
from ursa.errors import ManifestError, ShardFormatError
from ursa.sources.committed import SourceListing, load_listing

NETWORK_TAG = "ursa.network"
"""Tag of a version: `network_fingerprint`."""


class NewData(FrozenModel):
    """What a retraining has found before it opens a run.

    Attributes:
        refusal: Why there is nothing to train on; None trains.
        start: The champion to go on from; None trains all stages.
        reference_uri: The selection that the champion was trained on, with which new clips are
            compared; None compares with nothing.
    """

    refusal: str | None = None
    start: Start | None = None
    reference_uri: str | None = None


def network_fingerprint(config: RunConfig, *tokenizers: TokenizerRef) -> str:
    """Return what two models share of which one can go on from the other.

    Args:
        config: The run.
        tokenizers: The visual and the text tokenizer.
    """
    prints = [tokenizer.fingerprint for tokenizer in tokenizers]
    return fingerprint("network", config.model, config.path, config.text_tokenizer, prints)


@step(run_name="is there anything new")
def look_for_new_data(
    source_uri: str, preset: Preset, overrides: ConfigOverrides | None
) -> NewData:
    """Compare the source with that of the newest version; no run is opened.

    Content counts: a renamed file is not new, and one that is gone makes none. Where there is
    enough to train on, decisions that a kill interrupted are carried out first, so that the run
    goes on from the champion.

    Args:
        source_uri: As `ursa.sources.listing.discover_videos` takes it.
        preset: Name of a preset.
        overrides: Values to change in it; None changes none.

    Returns:
        Why there is nothing to do, or what to go on from.

    Raises:
        ConfigError: If the environment, a key or a value is refused.
        DataError: If the source does not exist or holds no video.
        ManifestError: If a decision that another run writes is damaged.
        ServiceError: If the tracking server does not answer.
        StorageError: If the store cannot be used.
    """
    settings = RuntimeSettings.from_env()
    config = given_config(preset, overrides)
    tracking_uri, name = settings.mlflow_tracking_uri, config.release.model_name
    newest = model_registry.newest_version_tags(tracking_uri, name)
    if not newest:
        announce("no version of %s yet: all stages are trained", name)
        return NewData()
    listing = list_source(source_uri, config, settings)
    newest = model_registry.newest_version_tags(tracking_uri, name, source_uri=listing.source_uri)
    # files that could not be read for now may be read today: their clips decide
    lacks_files = newest.get(model_registry.FINGERPRINT_TAG) == model_registry.UNFINISHED
    if newest.get("ursa.source_fingerprint") == listing.fingerprint and not lacks_files:
        return NewData(refusal=f"no new data at {listing.source_uri}")
    count = _num_new(listing, newest, settings)
    wanted = config.retraining.min_new_files
    if count < wanted and not lacks_files:
        return NewData(
            refusal=f"{count} files of new content at {listing.source_uri}, "
            f"retraining.min_new_files is {wanted}"
        )
    announce("%d files of new content at %s", count, listing.source_uri)
    champion = model_registry.champion_version(
        tracking_uri,
        name,
        root_uri=settings.data_uri,
        decided_by=reports.decided_by(),
    )
    reference_uri = champion.tags.get("ursa.selection") if champion else None
    if reference_uri is not None:  # what the same files gave the last time
        uri = drift_uri(settings.data_uri, reference_uri, listing.fingerprint, config)
        known = storage.load_record(uri, Drift)
        refusal = known and _why_not(known, listing.source_uri, config)
        if refusal:
            return NewData(refusal=refusal)
    is_fresh = config.retraining.start == "scratch"
    taken = champion and model_registry.taken_down(tracking_uri, champion)
    if taken and not is_fresh:
        announce("the champion was made of what is taken down (%s): all stages are trained", taken)
    start = None if is_fresh or taken else _start(champion, name)
    return NewData(start=start, reference_uri=reference_uri)


def _num_new(listing: SourceListing, newest: dict[str, str], settings: RuntimeSettings) -> int:
    """Return how many files have content that the newest version's source did not have.

    Content is told apart by etags, without reading it: sha256 of local files, what the store says
    of objects; of an https address the address itself and what its server says of the version.
    """
    uri = sources_uri(newest.get("ursa.source_fingerprint", ""), settings)
    try:
        before = load_listing(uri)
    except (
        ManifestError,
        ShardFormatError,
    ):  # damaged, or of an older schema: what was there is not known
        before = None
    if before is None or before.source_uri != listing.source_uri:
        return len(_contents(listing))
    return len(_contents(listing) - _contents(before))


def _contents(listing: SourceListing) -> set[str]:
    return {item.etag for item in listing.sources if item.problem is None}


def _start(champion: model_registry.RegisteredVersion | None, name: str) -> Start | None:
    if champion is None:
        announce("%s has no champion: all stages are trained", name)
        return None
    keys = ("ursa.model_directory", "ursa.tokens", NETWORK_TAG)
    if any(key not in champion.tags for key in keys):
        announce("the champion was registered by an older release: all stages are trained")
        return None
    directory_uri, tokens_uri, network = (champion.tags[key] for key in keys)
    return Start(
        model_uri=f"{releases.REGISTRY_SCHEME}{name}/{champion.version}",
        directory_uri=directory_uri,
        tokens_uri=tokens_uri,
        network=network,
    )


def drift_uri(data_uri: str, reference_uri: str, source_fingerprint: str, config: RunConfig) -> str:
    """Return where it is recorded how far the clips of a source are from those of a model.

    Args:
        data_uri: Root of all data.
        reference_uri: The selection that the model was trained on.
        source_fingerprint: Hash of files and captions of the source.
        config: What the clips are made, measured and selected by.
    """
    key = fingerprint(
        "drift",
        reference_uri,
        source_fingerprint,
        config.ingestion,
        config.annotation,
        config.selection,
        code_fingerprint(),
    )
    return storage.join(data_uri, "drift", key[:32], "manifest.json")


@step(run_name="compare the new clips")
def compare_new_clips(
    context: RunContext, selection: ClipSelection, reference_uri: str
) -> str | None:
    """See `ursa.drift.measure_drift`; the figures go to Prefect and to the tracking server.

    Args:
        context: The run.
        selection: The committed selection.
        reference_uri: The selection that the champion was trained on.

    Returns:
        Why there is nothing to train on; None trains, also where the reference is gone.

    Raises:
        ServiceError: If the tracking server does not answer.
        UrsaError: What that function raises.
    """
    uri = drift_uri(context.data_uri, reference_uri, context.source_fingerprint, context.config)
    drift = storage.load_record(uri, Drift)
    if drift is None:
        reference = storage.load_record(reference_uri, ClipSelection)
        if reference is None:
            announce("%s is gone: new clips are compared with nothing", reference_uri)
            return None
        drift = measure_drift(reference, selection)
        if not ingestion.has_unstable_failures(selection.clips):
            storage.commit_record(uri, drift)
    reports.drift(drift, context.config.retraining.min_drift)
    name, distance = drift.greatest
    if name:
        announce("%d new clips; what differs most is %s: %.3f", drift.num_new, name, distance)
    with tracking.child_run(context.run, "data", reports.flow_run_tags()) as run:
        metric_sink.log_metrics(
            run, {f"drift/{name}": value for name, value in drift.distances.items()}
        )
    refusal = _why_not(drift, context.source_uri, context.config)
    if refusal is not None:
        tracking.tag_run(context.run, {tracking.NOTE: refusal})
    return refusal


def _why_not(drift: Drift, source_uri: str, config: RunConfig) -> str | None:
    """Return why clips that differ so much are not trained on; None if they are."""
    if not drift.num_new:
        return f"no clip of the new files at {source_uri} is kept"
    name, distance = drift.greatest
    least = config.retraining.min_drift
    if least is None or distance >= least:
        return None
    most = f"what differs most is {name}: {distance:.3f}" if distance else "no score differs"
    return (
        f"{drift.num_new} new clips of {drift.num_new_files} files at {source_uri} are like those "
        f"of the champion: {most}, retraining.min_drift is {least:g}"
    )


@step(run_name="what to go on from")
def training_config(context: RunContext, prepared: PreparedData) -> RunConfig:
    """Return the configuration of the stages: of a retraining one that goes on from the champion.

    Args:
        context: The run.
        prepared: The outcome of its data part.

    Returns:
        The run's own configuration where there is no start, or where the champion has another
        network or other tokenizers.
    """
    config, start = context.config, context.start
    if start is None:
        return config
    own = network_fingerprint(config, prepared.visual_tokenizer, prepared.text_tokenizer)
    if own != start.network:
        announce(
            "%s has another network or other tokenizers than this run (see `refit_growth`): all "
            "stages are trained",
            start.model_uri,
        )
        return config
    announce("retraining goes on from %s", start.model_uri)
    wanted = config.retraining
    stage = config.stages.async_finetune
    changed = stage.model_copy(
        update={
            "init_from": start.directory_uri,
            "max_steps": wanted.max_steps,
            "warmup_steps": min(stage.warmup_steps, wanted.max_steps),
            "learning_rate": wanted.learning_rate,
            "new_fraction": wanted.new_fraction,
        }
    )
    stages = config.stages.model_copy(update={"async_finetune": changed})
    return config.model_copy(update={"stages": stages})


def known_tokens(context: RunContext) -> TokenDatasets | None:
    """Return what the model that a retraining goes on from was trained on.

    Args:
        context: The run.

    Raises:
        StorageError: If the store refuses or does not answer.
    """
    if context.start is None:
        return None
    try:
        return storage.load_record(context.start.tokens_uri, TokenDatasets)
    except ManifestError as error:
        announce("all samples are taken alike: %s", error)
        return None


def started_from(context: RunContext, trained: TrainedModel) -> dict[str, str]:
    """Return the tag that says which version a retraining went on from; none of other runs.

    Args:
        context: The run.
        trained: The outcome of its training part.
    """
    start = context.start
    stage = trained.request.config.stages.async_finetune
    if start is None or stage.init_from != start.directory_uri:
        return {}
    return {releases.STARTED_FROM_TAG: start.model_uri}
