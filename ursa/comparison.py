"""The champion on the held-out samples of another model: measured once, compared sample by sample.

Both predict the same noisy tokens, so that a difference is one of the networks. That needs the same
codes: losses over the codes of another visual tokenizer mean other things.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Comparison,
    ExportedModel,
    GridSetting,
    HeldOutScores,
    LossGrid,
    TokenDatasets,
)
from ursa.bootstrap import footage_spans
from ursa.config import RunConfig, TokenizationConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples, source_ids
from ursa.diffusion.path import MetricPath, MixturePath
from ursa.errors import ConfigError, DataError, ManifestError
from ursa.gate import compare, not_compared
from ursa.generation import UrsaPipeline
from ursa.model.transformer import UrsaTransformer
from ursa.training.validation import measure_grid, settings_of

logger = logging.getLogger(__name__)


class Champion(NamedTuple):
    """The registered version that a model is compared with.

    Attributes:
        version: Its number in the registry.
        model_key: `ExportedModel.content_key` of its files; None if others have registered it.
        tokens_uris: Manifests of the token data sets that it, the model that is compared and those
            that they went on from were trained on, the own ones of that model left out; None among
            them is an unknown one.
        open: Yields its model directory, which is downloaded if it must be measured.
    """

    version: str
    model_key: str | None
    tokens_uris: tuple[str | None, ...]
    open: Callable[[], AbstractContextManager[Path]]


class ScoresPlace(NamedTuple):
    """Where the scores of any model on the held-out samples of a model are committed.

    Attributes:
        model: The model whose tokenizer and path made the noisy tokens.
        datasets: Its token data sets; the held-out videos are measured.
        config: The run; `evaluation` and the seed matter.
        output_uri: Root of all data of the run.
    """

    model: ExportedModel
    datasets: TokenDatasets
    config: RunConfig
    output_uri: str

    def uri(self, model_key: str) -> str:
        """Return where the scores of a model are, or will be.

        Args:
            model_key: `ExportedModel.content_key` of the model that is measured.
        """
        evaluation = self.config.evaluation
        files = self.model.sha256.items()
        print_ = fingerprint(
            "held-out-scores-2",  # with spans
            SCHEMA_VERSION,
            model_key,
            self.datasets.video_validation.fingerprint,
            {name: digest for name, digest in files if name.startswith(("vae/", "scheduler/"))},
            evaluation.timesteps,
            evaluation.max_samples,
            evaluation.batch_size,
            self.config.seed,
        )
        return storage.join(self.output_uri, "scores", print_[:32], "manifest.json")

    def held_out(self) -> TokenSamples:
        """Return the samples.

        Raises:
            DataExhaustedError: If there is none.
            ShardFormatError: If a shard is missing or damaged.
            StorageError: If the store refuses or does not answer.
        """
        limit = self.config.evaluation.max_samples
        return TokenSamples(self.datasets.video_validation, max_samples=limit)

    def find(self, model_key: str) -> HeldOutScores | None:
        """Return the scores of a model, if it was measured before; damaged ones count as none.

        Args:
            model_key: `ExportedModel.content_key` of the model.

        Raises:
            StorageError: If the store refuses or does not answer.
        """
        try:
            return storage.load_lasting(self.uri(model_key), HeldOutScores)
        except ManifestError as error:
            logger.warning("the model is measured again: %s", error)
            return None

    def commit(self, model_key: str, grids: tuple[LossGrid, ...]) -> HeldOutScores | None:
        """Commit the scores of a model.

        Args:
            model_key: `ExportedModel.content_key` of the model.
            grids: What was measured on `held_out`.

        Returns:
            The committed scores; None without grids, or if a loss is not finite.

        Raises:
            ShardFormatError: If a shard is missing or damaged.
            StorageError: If the store refuses or does not answer.
        """
        if not grids or not all(grid.is_finite for grid in grids):
            return None
        held_out, uri = self.held_out(), self.uri(model_key)
        scores = HeldOutScores(
            manifest_uri=uri,
            model_key=model_key,
            sample_ids=tuple(held_out.sample_ids),
            clip_ids=tuple(held_out.clip_ids),
            source_ids=tuple(held_out.source_ids),
            span_ids=held_out_spans(held_out, self.config.tokenization),
            grids=grids,
        )
        try:
            return storage.commit_record(uri, scores)
        except ManifestError as error:  # they are no less true for it
            logger.warning("%s; delete it, and the next run writes it again", error)
            return scores


def held_out_spans(samples: TokenSamples, config: TokenizationConfig) -> tuple[str, ...]:
    """Return the stretch of footage of each sample.

    Args:
        samples: Held-out windows.
        config: Rate and length of the windows.
    """
    window_s = config.num_frames / config.fps
    return footage_spans(samples.clip_ids, samples.starts_s, window_s=window_s)


def compare_with(
    champion: Champion, pipeline: UrsaPipeline, scores: HeldOutScores | None, place: ScoresPlace
) -> Comparison:
    """Measure the champion where a model was measured, unless that was done before; compare them.

    The champion predicts the same noisy tokens: those of the model's path. What it was trained on
    is left out.

    Args:
        champion: The champion.
        pipeline: The model.
        scores: What the model does on each held-out sample; None if nothing is held out, or its
            losses are not finite.
        place: Where scores on these samples are committed.

    Returns:
        The comparison; with its problem if the two cannot be compared.

    Raises:
        ShardFormatError: If a shard is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    if champion.model_key is None:
        return not_compared(champion.version, "it was not registered by this pipeline")
    if scores is None:
        return not_compared(champion.version, "there is no finite held-out loss")
    theirs = place.find(champion.model_key)
    if theirs is None:
        with champion.open() as directory:
            try:
                other = UrsaPipeline.from_pretrained(directory, device=pipeline.device)
            except ConfigError as error:
                return not_compared(champion.version, f"it cannot be read: {error}")
            if problem := _other_tokens(directory, other, pipeline, place.model):
                return not_compared(champion.version, problem)
            held_out = place.held_out()
            grids = tuple(
                measure(other, held_out, place.config, setting=setting, path=pipeline.path)
                for setting in settings_of(held_out)
            )
        theirs = place.commit(champion.model_key, grids)
        if theirs is None:
            return not_compared(champion.version, "its held-out loss is not finite")
    return compare(
        scores,
        theirs,
        champion_version=champion.version,
        known_sources=_trained_sources(champion.tokens_uris),
        config=place.config.release,
    )


def measure(
    pipeline: UrsaPipeline,
    samples: TokenSamples,
    config: RunConfig,
    *,
    setting: GridSetting = "synchronous",
    network: UrsaTransformer | None = None,
    path: MetricPath | MixturePath | None = None,
) -> LossGrid:
    """Measure a model on samples.

    Args:
        pipeline: The model.
        samples: What is measured on.
        config: The run; `evaluation` and the seed matter.
        setting: See `LossGrid`.
        network: Stands in the place of the model's own.
        path: Likewise: what makes the noise.

    Returns:
        The grid.
    """
    return measure_grid(
        network or pipeline.transformer,
        # as in training, noise is drawn on the CPU: every device predicts the same tokens
        (path or pipeline.path).to("cpu"),
        pipeline.text_tokenizer,
        samples,
        timesteps=config.evaluation.timesteps,
        batch_size=config.evaluation.batch_size,
        max_prompt_length=pipeline.defaults.max_prompt_length,
        seed=address_seed(config.seed, "validation"),
        setting=setting,
    )


def _other_tokens(
    directory: Path, other: UrsaPipeline, pipeline: UrsaPipeline, model: ExportedModel
) -> str | None:
    """Return why losses of two models are not of the same tokens; None if they are."""
    names = [name for name in model.sha256 if name.startswith("vae/")]
    for name in names:
        path = directory / name
        if not path.is_file() or storage.sha256_file(path) != model.sha256[name]:
            return "its visual tokenizer is another, and losses over other codes mean other things"
    if type(other.path) is not type(pipeline.path):
        return "its noise is of another kind"
    return None


def _trained_sources(tokens_uris: Iterable[str | None]) -> set[str] | None:
    """Return the sources that models were trained on; None if some of their data are gone."""
    sources: set[str] = set()
    for uri in tokens_uris:
        try:
            datasets = None if uri is None else storage.load_record(uri, TokenDatasets)
            if datasets is None:
                return None
            parts = [part for part in datasets.parts() if part.split == "train"]
            sources |= set().union(*(source_ids(part) for part in parts))
        except DataError as error:
            logger.warning("what the champion was trained on cannot be read: %s", error)
            return None
    return sources
