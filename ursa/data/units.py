"""Units of tokenization: the few clips that become one shard, their records, and their samples.

A recipe (selection, visual tokenizer, settings) decides the units of a token data set, and a unit
decides its samples. So a reader can tell which samples must be there, and make a shard again.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ursa import storage
from ursa.artifacts import (
    CLIPS,
    SCHEMA_VERSION,
    Clip,
    ClipSelection,
    Modality,
    ShardInfo,
    Split,
    TokenizerRef,
)
from ursa.config import FrozenModel, TokenizationConfig, fingerprint
from ursa.data.buckets import bucket_settings, choose_bucket
from ursa.data.clips import (
    clip_frames,
    clip_windows,
    clips_of,
    each_clip,
    read_selection_tables,
)

MODALITIES: tuple[Modality, ...] = ("image", "video")
SPLITS: tuple[Split, ...] = ("train", "validation")
RECIPE_NAME = "recipe.json"
TOKENIZATION_VERSION = 1
"""Raised when the same clips, tokenizer and settings would give other rows."""


class TokenizationUnit(FrozenModel):
    """A few clips of one split that become one shard a modality.

    All units of a plan are held at once: as JSON their clips take a fifth of the memory.
    """

    key: str
    split: Split
    bucket: int
    clips_json: str
    output_uri: str

    @functools.cached_property
    def clips(self) -> tuple[Clip, ...]:
        """The clips in their order; from the first look on they are held too."""
        return CLIPS.validate_json(self.clips_json)

    @property
    def record_uri(self) -> str:
        """Where the record of the unit is committed."""
        return unit_record_uri(self.output_uri, self.key)


def unit_record_uri(output_uri: str, key: str) -> str:
    """Return where the record of a unit is committed.

    Args:
        output_uri: Root of all data of the run.
        key: Of the unit.
    """
    return storage.join(output_uri, "tokens", "units", f"{key}.json")


class FailedClip(FrozenModel):
    """A clip that could not be tokenized, and why.

    Attributes:
        transient: Whether another attempt may fare better: its file was missing or damaged, or
            time or memory ran out.
    """

    clip_id: str
    source_uri: str
    detail: str
    transient: bool = False


class TokenizedUnit(FrozenModel):
    """What became of a unit; committed unless it is partial."""

    key: str
    split: Split
    image: ShardInfo | None
    video: ShardInfo | None
    num_clips: int
    num_too_short: int
    failed: tuple[FailedClip, ...]

    def shard(self, modality: Modality) -> ShardInfo | None:
        """Return the shard of a modality; None if no clip gave a sample.

        Args:
            modality: "image" or "video".
        """
        return self.image if modality == "image" else self.video

    @property
    def is_partial(self) -> bool:
        """Whether a clip is missing only for now."""
        return any(clip.transient for clip in self.failed)


class TokenizationRecipe(FrozenModel):
    """Everything that decides a token data set, committed beside its manifest.

    Attributes:
        partial_units: Units that lack clips only for now; they have no record of their own.
    """

    selection: ClipSelection
    visual_tokenizer: TokenizerRef
    settings: TokenizationConfig
    partial_units: tuple[TokenizedUnit, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data set."""
        lacking = [
            clip.clip_id for unit in self.partial_units for clip in unit.failed if clip.transient
        ]
        whole = fingerprint(
            "tokens",
            TOKENIZATION_VERSION,
            SCHEMA_VERSION,
            self.selection.fingerprint,
            self.visual_tokenizer.fingerprint,
            self.settings,
        )
        return fingerprint("tokens-without", whole, sorted(lacking)) if lacking else whole


class Sample(NamedTuple):
    """A sample of a clip: the frames from `start_s` on."""

    start_s: float
    frames: list[int]


class UnitRows(NamedTuple):
    """A unit that is known, with its clips still in their table.

    Attributes:
        rows: Places of its clips, int64, in their order.
    """

    key: str
    split: Split
    bucket: int
    rows: np.ndarray


def iter_units(recipe: TokenizationRecipe, output_uri: str) -> Iterator[TokenizationUnit]:
    """Yield the units of a recipe, one at a time: training clips first.

    Args:
        recipe: What decides the data set.
        output_uri: Root of all data of the run.

    Yields:
        What `divide_clips` returns, with the clips.

    Raises:
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    clips, units = divide_clips(recipe)
    for unit in units:
        yield make_unit(unit, clips, output_uri)


def make_unit(unit: UnitRows, clips: pa.Table, output_uri: str) -> TokenizationUnit:
    """Return a unit with its clips.

    Args:
        unit: One of `divide_clips`.
        clips: The table that came with it.
        output_uri: Root of all data of the run.
    """
    return TokenizationUnit(
        key=unit.key,
        split=unit.split,
        bucket=unit.bucket,
        clips_json=CLIPS.dump_json(tuple(clips_of(clips.take(unit.rows)))).decode(),
        output_uri=output_uri,
    )


def divide_clips(recipe: TokenizationRecipe) -> tuple[pa.Table, list[UnitRows]]:
    """Divide the kept clips of a recipe into units: training clips first.

    Clips are ordered by content and divided where their ids say so. A clip that comes or goes
    changes the unit it is in and hardly another; a renamed file changes none, unless its caption
    is made of its name.

    Args:
        recipe: What decides the data set.

    Returns:
        All clips, and units of `clips_per_shard` kept clips of one split and bucket on average,
        twice as many at most.

    Raises:
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    clips, verdicts = read_selection_tables(recipe.selection)
    narrow = clips.select((*_SORTED_BY, *_IN_KEY)).append_column(
        "place", pa.array(np.arange(clips.num_rows))
    )
    units: list[UnitRows] = []
    for split in SPLITS:
        chosen = pc.and_kleene(verdicts["kept"], pc.equal(verdicts["split"], split))
        kept = narrow.filter(chosen).sort_by([(name, "ascending") for name in _SORTED_BY])
        # a copy that was not dropped would give the same samples again
        ids = kept["clip_id"].to_numpy()
        kept = kept.filter(pa.array(np.append(True, ids[1:] != ids[:-1])[: len(ids)]))
        units += _bucket_units(kept, split, clips, recipe)
    return clips, units


_SORTED_BY = ("source_sha256", "start_s", "clip_id", "source_uri")
_IN_KEY = ("media_sha256", "caption", "motion_px_per_s")


def _bucket_units(
    kept: pa.Table, split: Split, clips: pa.Table, recipe: TokenizationRecipe
) -> Iterator[UnitRows]:
    """Yield the units of one split."""
    settings = recipe.settings
    buckets = np.zeros(kept.num_rows, int)
    if settings.extra_buckets:
        whole = clips.take(kept["place"])
        buckets[:] = [choose_bucket(clip, settings) for clip in each_clip(whole)]
    for bucket in range(1 + len(settings.extra_buckets)):
        own = kept.filter(pa.array(buckets == bucket))
        # a bucket more changes the units of those clips alone that go there
        sizes = bucket_settings(settings, bucket).model_dump(mode="json")
        places, ids = own["place"].to_numpy(), own["clip_id"].to_pylist()
        # all that goes into the rows, and not where files lie
        said = list(map(list, zip(ids, *(own[name].to_pylist() for name in _IN_KEY), strict=True)))
        for start, end in _spans(ids, settings.clips_per_shard):
            key = fingerprint(
                "token-unit",
                TOKENIZATION_VERSION,
                SCHEMA_VERSION,
                sizes,
                recipe.visual_tokenizer.fingerprint,
                split,
                said[start:end],
            )
            yield UnitRows(key[:32], split, bucket, places[start:end])


def _spans(clip_ids: Sequence[str], mean_length: int) -> Iterator[tuple[int, int]]:
    """Yield where units begin and end: before one id in `mean_length`, and where one is full."""
    start = 0
    for place, clip_id in enumerate(clip_ids):
        is_boundary = int(clip_id[:12], 16) % mean_length == 0
        if place > start and (is_boundary or place - start == 2 * mean_length):
            yield start, place
            start = place
    if clip_ids:
        yield start, len(clip_ids)


def clip_samples(clip: Clip, settings: TokenizationConfig) -> dict[Modality, list[Sample]]:
    """Return the samples of a clip by modality; one shorter than a sample has no video.

    Args:
        clip: A normalised clip.
        settings: Size, rate and distance of the samples.
    """
    return {
        "image": [Sample(at, [index]) for at, index in clip_frames(clip, settings.image_stride_s)],
        "video": [Sample(at, frames) for at, frames in clip_windows(clip, settings)],
    }


def num_variants(modality: Modality, split: Split, settings: TokenizationConfig) -> int:
    """Return how many variants a sample has beside itself; held-out ones have none.

    Args:
        modality: "image" or "video".
        split: "train" or "validation".
        settings: Numbers of variants of training samples.
    """
    if split != "train":
        return 0
    return settings.image_variants if modality == "image" else settings.video_variants


def sample_id(clip_id: str, modality: Modality, start_s: float, variant: int) -> str:
    """Return the name of a sample, unique in a data set.

    Args:
        clip_id: The clip.
        modality: "image" or "video".
        start_s: Start in the clip, seconds.
        variant: 0 is the sample itself.
    """
    return f"{clip_id}-{modality}-{round(start_s * 1000):07d}-{variant}"


def expected_sample_ids(
    clip: Clip, modality: Modality, split: Split, settings: TokenizationConfig
) -> list[str]:
    """Return the names of all samples of a clip, in the order of their rows.

    Args:
        clip: A normalised clip.
        modality: "image" or "video".
        split: The clip's split.
        settings: Rate and distance of the samples, numbers of variants.
    """
    samples = clip_samples(clip, settings)[modality]
    return [
        sample_id(clip.clip_id, modality, sample.start_s, variant)
        for variant in range(1 + num_variants(modality, split, settings))
        for sample in samples
    ]
