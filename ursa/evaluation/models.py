"""Any model on any version of a data set: exported directories, registered models, checkpoints."""

import json
import logging
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field

from ursa import storage
from ursa.artifacts import (
    CheckpointRef,
    ClipSelection,
    EvalReport,
    Measurements,
    StageRequest,
    TokenDatasets,
    TokenizerRef,
)
from ursa.config import (
    STAGES,
    FrozenModel,
    Preset,
    RunConfig,
    StageName,
    fingerprint,
    load_config,
)
from ursa.data.clips import read_selection
from ursa.data.versions import DatasetVersion
from ursa.errors import ConfigError, ManifestError
from ursa.evaluation.drawn import measure_drawn
from ursa.evaluation.held_out import held_out_measurements, held_out_metrics
from ursa.evaluation.measures import join, measurement_metrics
from ursa.evaluation.tokenizer import measure_code_usage, measure_tokenizer
from ursa.generation import UrsaPipeline
from ursa.tokenizers.visual import load_visual_tokenizer
from ursa.training.checkpoint import MARKER_FILE, load_checkpoint
from ursa.training.trained import trained_pipeline
from ursa.video.reader import ClipReader

logger = logging.getLogger(__name__)

DATA = "data"
"""The condition that says which clips and tokens were measured."""
_OF_CODES = "_token_accuracy"
"""Ends the names of metrics of drawn clips that are over codes."""
SETTINGS = (
    "seed",
    "evaluation.timesteps",
    "evaluation.max_samples",
    "evaluation.clips.num_prompts",
    "evaluation.clips.seeds_per_prompt",
    "evaluation.clips.num_windows",
    "evaluation.clips.max_train_windows",
    "evaluation.clips.asked_motion",
)
"""Conditions that `--set` changes. `fewer_steps` and `features` are in the names of their metrics;
how a model is sampled is part of the model."""


class ModelMeasurements(FrozenModel):
    """What was measured of a model, and on what; written by `ursa evaluate --out`."""

    model: str
    data_version_uri: str
    conditions: dict[str, str] = Field(
        default_factory=dict,
        description="what must be the same where two are compared: data, settings, codes; those "
        "that files of older releases lack are not known",
    )
    metrics: dict[str, float]
    measurements: Measurements
    not_measured: tuple[str, ...]


def report_measurements(
    report: EvalReport, data_version_uri: str, conditions: dict[str, str]
) -> ModelMeasurements:
    """Return what a flow has measured, as `ursa evaluate --against` reads it.

    Args:
        report: The evaluation.
        data_version_uri: Manifest of the data set version.
        conditions: As `conditions_of` returns them.
    """
    return ModelMeasurements(
        model=report.model.directory_uri,
        data_version_uri=data_version_uri,
        conditions=conditions,
        metrics=report.metrics,
        measurements=report.measurements,
        not_measured=(),
    )


def conditions_of(
    selection: ClipSelection, tokens_fingerprint: str, codes: TokenizerRef, config: RunConfig
) -> dict[str, str]:
    """Return what must be the same where two models are compared.

    Names of cases alone are not enough: the same prompts and held-out windows are measured against
    other training clips where a version has more of them.

    Args:
        selection: The clips.
        tokens_fingerprint: Of their tokens.
        codes: The visual tokenizer of the data.
        config: The run.

    Returns:
        Values by name; those of `SETTINGS` as `--set` takes them.
    """
    samples = config.tokenization
    return {
        # not where the version lies: a data root may be moved
        DATA: fingerprint(selection.fingerprint, tokens_fingerprint)[:12],
        **{name: _as_json(attrgetter(name)(config)) for name in SETTINGS},
        "frames": f"{samples.num_frames} of {samples.height_px} x {samples.width_px} px at "
        f"{samples.fps:g} /s, every {samples.window_stride_s:g} s",
        "visual tokenizer of the data": fingerprint(codes.sha256 or codes.fingerprint)[:12],
    }


def version_conditions(version: DatasetVersion, config: RunConfig) -> dict[str, str]:
    """Return what must be the same where models are compared on a version of a data set.

    Args:
        version: The version.
        config: As `version_config` returns it.
    """
    return conditions_of(
        version.selection, version.tokens_fingerprint, version.visual_tokenizer, config
    )


def _as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def version_config(
    version: DatasetVersion, preset: Preset, changes: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration under which a model is measured on a version of a data set.

    Args:
        version: Its own settings are kept.
        preset: Says the rest: how much is drawn, and of a checkpoint the network.
        changes: Overrides of whole blocks, as of `evaluation`, and of the seed.

    Raises:
        ConfigError: If a key or value is refused.
    """
    return load_config(preset, {**version.config, **changes})


def open_model(
    directory: str | Path,
    version: DatasetVersion,
    config: RunConfig,
    *,
    device: torch.device | str = "cpu",
) -> UrsaPipeline:
    """Return the pipeline of a model directory, or of a checkpoint of a stage.

    Args:
        directory: A model directory, or the folder of a checkpoint below the data root,
            `checkpoints/<stage>/<fingerprint>/step-<step>.<nonce>`.
        version: The data set that the checkpoint was trained on; its tokenizers are taken.
        config: Names the network of a checkpoint.
        device: Where to run.

    Raises:
        ConfigError: If it is neither.
        CheckpointError: If the checkpoint is damaged or of another network.
        ShardFormatError: If a shard is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    uri = storage.absolute_uri(str(directory))
    if not storage.exists(storage.join(uri, MARKER_FILE)):
        return UrsaPipeline.from_pretrained(directory, device=device)
    place = re.search(r"(?:^|/)([a-z_]+)/[0-9a-f]{32}/step-\d{8}\.[0-9a-f]+$", uri)
    if place is None or place[1] not in STAGES:
        raise ConfigError(
            f"{uri} is a checkpoint, and its place does not say of which stage; it lies at "
            "checkpoints/<stage>/<fingerprint>/ below the data root"
        )
    stage = cast(StageName, place[1])
    marker, _ = load_checkpoint(uri)
    request = StageRequest(
        stage=stage,
        config=config,
        datasets=read_datasets(version),
        visual_tokenizer=version.visual_tokenizer,
        text_tokenizer=version.text_tokenizer,
        init_from=None,
        output_uri=uri.split("/checkpoints/")[0],
    )
    checkpoint = CheckpointRef(
        uri=uri,
        stage=stage,
        step=marker.step,
        num_samples_seen=marker.num_samples_seen,
        metrics=marker.metrics,
        fingerprint=marker.fingerprint,
        parent_uri=None,
    )
    return trained_pipeline(request, checkpoint).to(device)


def measure_model(
    pipeline: UrsaPipeline, version: DatasetVersion, config: RunConfig, *, name: str
) -> ModelMeasurements:
    """Measure a model on a version of a data set.

    Args:
        pipeline: The model.
        version: The data.
        config: As `version_config` returns it.
        name: What the model is called in the result.

    Returns:
        All that docs/evaluation.md lists; losses only if the model has the visual tokenizer of the
        version, as others mean other codes.

    Raises:
        DataExhaustedError: If there is no training video sample.
        ShardFormatError: If a shard or a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    datasets, selected = read_datasets(version), read_selection(version.selection)
    metrics: dict[str, float] = {}
    parts, missing = [], []
    if _same_codes(pipeline, version):
        metrics, grids = held_out_metrics(pipeline, datasets, config)
        parts += [
            held_out_measurements(grids, datasets, config),
            measure_code_usage(datasets.video_train),
        ]
    else:
        missing.append(
            "losses, token accuracies and use of codes: the visual tokenizer of the model is not "
            "that of the data, and other codes mean other things"
        )
    with ClipReader() as reader:
        parts += [
            measure_tokenizer(pipeline, selected, config, reader.read),
            measure_drawn(pipeline, selected, config, reader.read),
        ]
    measurements = join(*parts)
    if missing:
        kept = [item for item in measurements.measures if not item.metric.endswith(_OF_CODES)]
        measurements = measurements.model_copy(update={"measures": tuple(kept)})
    return ModelMeasurements(
        model=name,
        data_version_uri=version.manifest_uri,
        conditions=version_conditions(version, config),
        metrics=metrics | measurement_metrics(measurements),
        measurements=measurements,
        not_measured=tuple(missing),
    )


def read_datasets(version: DatasetVersion) -> TokenDatasets:
    """Return the token data sets of a version.

    Args:
        version: The version.

    Raises:
        ManifestError: If their record is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    found = storage.load_record(version.tokens_uri, TokenDatasets)
    if found is None:
        raise ManifestError(
            f"{version.tokens_uri} is missing: the tokens of data set version {version.number} are "
            "gone; run the data preparation again"
        )
    return found


def _same_codes(pipeline: UrsaPipeline, version: DatasetVersion) -> bool:
    """Whether a model has the visual tokenizer of a version, to the bit."""
    with storage.local_directory(version.visual_tokenizer.directory_uri) as folder:
        known = load_visual_tokenizer(folder).network.state_dict()
    own = pipeline.visual_tokenizer.network.state_dict()
    return known.keys() == own.keys() and all(
        torch.equal(value, own[name].cpu()) for name, value in known.items()
    )
