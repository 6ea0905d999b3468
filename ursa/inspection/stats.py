"""Counts of a data root: files, clips, seconds, reasons, sizes, scores, tokens, captions."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import (
    ClipScores,
    ClipSelection,
    ClipSet,
    Modality,
    Split,
    Threshold,
    TokenDatasets,
)
from ursa.config import FrozenModel, RunConfig
from ursa.data.clips import read_selection_tables
from ursa.inspection.root import (
    TOKENS,
    find_recipe,
    good_records,
    known_configs,
    list_below,
    load_selection,
    version_of,
)

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class FunnelRow(FrozenModel):
    """How many of `total` files or clips came to a step."""

    step: str
    count: int
    total: int


class Quantiles(FrozenModel):
    """Values of a column at `QUANTILES`; none if nothing was measured."""

    num_measured: int
    num_missing: int
    values: tuple[float, ...]


class TokenCount(FrozenModel):
    """Samples of one modality, split and size."""

    manifest_uri: str
    num_failed_clips: int
    num_short_clips: int
    modality: Modality
    split: Split
    latent_shape: tuple[int, int, int]
    num_samples: int
    num_tokens: int
    num_shards: int
    num_bytes: int


class DataStats(FrozenModel):
    """What is in the data of one selection; durations in seconds, sizes in bytes."""

    selection_uri: str
    source_uri: str
    version: int | None
    """Number of the newest data set version with this selection, if there is one."""
    num_files: int
    num_failed_files: int
    num_clips: int
    num_kept: int
    duration_s: float
    kept_duration_s: float
    funnel: tuple[FunnelRow, ...]
    thresholds: tuple[Threshold, ...]
    resolutions: dict[str, int]
    frame_rates: dict[str, int]
    clip_duration_s: Quantiles
    scores: dict[str, Quantiles]
    kept_scores: dict[str, Quantiles]
    captions: dict[str, int]
    licences: dict[str, int]
    tokens: tuple[TokenCount, ...]
    media_bytes: int
    table_bytes: int
    shard_bytes: int


def data_stats(
    root_uri: str, *, selection_uri: str | None = None, config: RunConfig | None = None
) -> DataStats:
    """Count what is in a data root.

    Args:
        root_uri: The data root.
        selection_uri: Manifest or folder of a selection; None takes the newest.
        config: What to try for token data sets without a recipe; None tries the presets.

    Returns:
        The counts, of the selection, its clips and the tokens made from it.

    Raises:
        DataError: If there is no selection.
        ManifestError: If its manifest is damaged.
        ShardFormatError: If a table is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    selection = load_selection(root_uri, selection_uri)
    clips, verdicts = read_selection_tables(selection)
    kept = clips.filter(verdicts["kept"])
    tokens = _count_tokens(root_uri, selection, config)
    return DataStats(
        selection_uri=selection.manifest_uri,
        source_uri=selection.clips.source_uri,
        version=version_of(root_uri, selection),
        num_files=selection.clips.num_videos,
        num_failed_files=selection.clips.num_failed,
        num_clips=selection.clips.num_clips,
        num_kept=selection.num_kept,
        duration_s=total_s(clips),
        kept_duration_s=total_s(kept),
        funnel=funnel(
            selection.clips, selection.rejections, selection.num_train, selection.num_validation
        ),
        thresholds=selection.thresholds,
        resolutions=count_values(resolutions(clips)),
        frame_rates=count_values(f"{fps:g}" for fps in clips["fps"].to_pylist()),
        clip_duration_s=quantiles(clips["duration_s"]),
        scores=_all_quantiles(clips),
        kept_scores=_all_quantiles(kept),
        captions=count_values(source or "none" for source in clips["caption_source"].to_pylist()),
        licences=count_values(text or "unknown" for text in clips["license"].to_pylist()),
        tokens=tokens,
        media_bytes=_media_bytes(root_uri, clips),
        table_bytes=sum(
            storage.size_bytes(uri) for uri in (selection.clips.clips_uri, selection.selection_uri)
        ),
        shard_bytes=sum(part.num_bytes for part in tokens),
    )


def funnel(
    clips: ClipSet,
    rejections: Mapping[str, int],
    num_train: int,
    num_validation: int,
) -> tuple[FunnelRow, ...]:
    """Return how many files and clips came to which step.

    Args:
        clips: The committed clips.
        rejections: Number of rejected clips by reason.
        num_train: Kept clips to train on.
        num_validation: Kept clips that are held out.
    """
    files, total = clips.num_videos, clips.num_clips
    rows = [("files found", files, files)]
    rows += [(f"quarantined: {why}", count, files) for why, count in sorted(clips.failures.items())]
    rows += [
        ("clips made", total, total),
        ("shots too short", clips.num_dropped_shots, total + clips.num_dropped_shots),
    ]
    rows += [(f"rejected: {reason}", count, total) for reason, count in sorted(rejections.items())]
    rows += [
        ("clips kept", num_train + num_validation, total),
        ("kept for training", num_train, total),
        ("kept for validation", num_validation, total),
    ]
    return tuple(FunnelRow(step=step, count=count, total=of) for step, count, of in rows)


def score_names(clips: pa.Table) -> list[str]:
    """Return the columns that hold scores that are numbers.

    Args:
        clips: A table of clips.
    """
    return [
        name
        for name in ClipScores.model_fields
        if name in clips.column_names and _is_number(clips.schema.field(name).type)
    ]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _all_quantiles(clips: pa.Table) -> dict[str, Quantiles]:
    """Return the quantiles of all scores, those of extras by `<scorer>/<score>`."""
    found = {name: quantiles(clips[name]) for name in score_names(clips)}
    extras: dict[str, list[float]] = defaultdict(list)
    for pairs in clips["extra_scores"].to_pylist():
        for pair in pairs:
            extras[pair["name"]].append(pair["value"])
    for name, values in sorted(extras.items()):
        nulls = [None] * (clips.num_rows - len(values))
        found[name] = quantiles(pa.chunked_array([pa.array([*values, *nulls], pa.float64())]))
    return found


def quantiles(column: pa.ChunkedArray) -> Quantiles:
    """Return the values of a column at `QUANTILES`.

    Args:
        column: Numbers; null is "not measured".
    """
    values = column.drop_null().to_numpy()
    return Quantiles(
        num_measured=len(values),
        num_missing=column.null_count,
        values=tuple(np.quantile(values, QUANTILES).tolist()) if len(values) else (),
    )


def resolutions(clips: pa.Table) -> list[str]:
    """Return width and height of every clip, as in "320x180".

    Args:
        clips: A table of clips.
    """
    sizes = zip(clips["width_px"].to_pylist(), clips["height_px"].to_pylist(), strict=True)
    return [f"{width}x{height}" for width, height in sizes]


def total_s(clips: pa.Table) -> float:
    """Return how long all clips are together, seconds.

    Args:
        clips: A table of clips.
    """
    return float(pc.sum(clips["duration_s"]).as_py() or 0.0)


def count_values(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value is there, the most frequent first.

    Args:
        values: Any texts.
    """
    return dict(Counter(values).most_common())


def _count_tokens(
    root_uri: str, selection: ClipSelection, config: RunConfig | None
) -> tuple[TokenCount, ...]:
    """Count the token data sets that were made from a selection."""
    settings = [item.tokenization for item in known_configs(config)]
    counts = []
    for datasets in good_records(root_uri, TOKENS, TokenDatasets):
        recipe = find_recipe(root_uri, datasets, settings)
        if recipe is None or recipe.selection.fingerprint != selection.fingerprint:
            continue
        counts += [
            TokenCount(
                manifest_uri=datasets.manifest_uri,
                num_failed_clips=datasets.num_failed_clips,
                num_short_clips=datasets.num_short_clips,
                modality=part.modality,
                split=part.split,
                latent_shape=part.latent_shape,
                num_samples=part.num_samples,
                num_tokens=part.num_tokens,
                num_shards=len(part.shards),
                num_bytes=sum(shard.num_bytes for shard in part.shards),
            )
            for part in datasets.parts()
        ]
    return tuple(counts)


def _media_bytes(root_uri: str, clips: pa.Table) -> int:
    """Return the size of all clip files, each once; one listing instead of a call a file."""
    names = {uri.rpartition("/")[2] for uri in clips["media_uri"].to_pylist()}
    folder_uri = storage.join(root_uri, "clips", "media")
    return sum(
        item.num_bytes for item in list_below(folder_uri) if item.uri.rpartition("/")[2] in names
    )
