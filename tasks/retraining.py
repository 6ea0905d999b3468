"""Tasks: is there enough new to train, and what does the training go on from."""

from tasks import tracking
from tasks.context import (
    PreparedData,
    RunContext,
    SourceListing,
    Start,
    TrainedModel,
    given_config,
    list_source,
    sources_uri,
)
from tasks.options import ConfigOverrides, announce, step
from tasks.settings import RuntimeSettings
from ursa import storage
from ursa.artifacts import TokenDatasets, TokenizerRef
from ursa.config import FrozenModel, Preset, RunConfig, fingerprint
from ursa.errors import ManifestError

NETWORK_TAG = "ursa.network"
"""Tag of a version: `network_fingerprint`."""


class NewData(FrozenModel):
    """What a retraining has found before it opens a run.

    Attributes:
        refusal: Why there is nothing to train on; None trains.
        start: The champion to go on from; None trains all stages.
    """

    refusal: str | None = None
    start: Start | None = None


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
    """Compare the source with that of the newest version; nothing is written and no run opened.

    Content counts: a renamed file is not new, and one that is gone makes none.

    Args:
        source_uri: As `ursa.sources.listing.discover_videos` takes it.
        preset: Name of a preset.
        overrides: Values to change in it; None changes none.

    Returns:
        Why there is nothing to do, or what to go on from.

    Raises:
        ConfigError: If the environment, a key or a value is refused.
        DataError: If the source does not exist or holds no video.
        ServiceError: If the tracking server does not answer.
        StorageError: If the store cannot be used.
    """
    settings = RuntimeSettings.from_env()
    config = given_config(preset, overrides)
    tracking_uri, name = settings.mlflow_tracking_uri, config.release.model_name
    newest = tracking.newest_version_tags(tracking_uri, name)
    if not newest:
        announce("no version of %s yet: all stages are trained", name)
        return NewData()
    listing = list_source(source_uri, config, settings)
    if newest.get("ursa.source_fingerprint") == listing.fingerprint:
        return NewData(refusal=f"no new data at {listing.source_uri}")
    count = _num_new(listing, newest, settings)
    wanted = config.retraining.min_new_files
    if count < wanted:
        return NewData(
            refusal=f"{count} files of new content at {listing.source_uri}, "
            f"retraining.min_new_files is {wanted}"
        )
    announce("%d files of new content at %s", count, listing.source_uri)
    if config.retraining.start == "scratch":
        return NewData()
    return NewData(start=_champion(tracking_uri, name))


def _num_new(listing: SourceListing, newest: dict[str, str], settings: RuntimeSettings) -> int:
    """Return how many files have content that the newest version's source did not have.

    Content is told apart by etags, without reading it: sha256 of local files, what the store says
    of objects; of an https address the address itself and what its server says of the version.
    """
    uri = sources_uri(newest.get("ursa.source_fingerprint", ""), settings)
    try:
        before = storage.load_record(uri, SourceListing)
    except ManifestError:  # damaged, or of an older schema: what was there is not known
        before = None
    if before is None or before.source_uri != listing.source_uri:
        return len(_contents(listing))
    return len(_contents(listing) - _contents(before))


def _contents(listing: SourceListing) -> set[str]:
    return {item.etag for item in listing.sources if item.problem is None}


def _champion(tracking_uri: str, name: str) -> Start | None:
    version = tracking.champion_version(tracking_uri, name)
    if version is None:
        announce("%s has no champion: all stages are trained", name)
        return None
    _, number, tags = version
    keys = ("ursa.model_directory", "ursa.tokens", NETWORK_TAG)
    if any(key not in tags for key in keys):
        announce("the champion was registered by an older release: all stages are trained")
        return None
    directory_uri, tokens_uri, network = (tags[key] for key in keys)
    return Start(
        model_uri=f"{tracking.REGISTRY_SCHEME}{name}/{number}",
        directory_uri=directory_uri,
        tokens_uri=tokens_uri,
        network=network,
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
    return {"ursa.started_from": start.model_uri}
