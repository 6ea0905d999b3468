"""The tokenization step: selected clips to token shards, exactly once.

A unit is a few clips; `ClipTokenizer` turns it into one image and one video shard and commits a
unit record that names them. `commit_tokens` joins all units to four committed data sets (image and
video, training and validation). A unit that was committed is never done again, whatever died.
"""

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ursa import storage
from ursa.artifacts import (
    SCHEMA_VERSION,
    Clip,
    ClipSelection,
    Modality,
    Split,
    TokenDataset,
    TokenDatasets,
    TokenizerRef,
)
from ursa.config import RunConfig, TokenizationConfig, fingerprint
from ursa.data.addresses import address_seed
from ursa.data.buckets import bucket_settings, sample_sizes
from ursa.data.clips import local_clip
from ursa.data.shards import shard_bytes, write_shard
from ursa.data.units import (
    MODALITIES,
    RECIPE_NAME,
    SPLITS,
    FailedClip,
    Sample,
    TokenizationRecipe,
    TokenizationUnit,
    TokenizedUnit,
    clip_samples,
    divide_clips,
    make_unit,
    num_variants,
    sample_id,
    unit_record_uri,
)
from ursa.errors import FailureBudgetExceeded, ServiceError, StorageError, UrsaError
from ursa.tokenizers.visual import AutoencoderTokenizer, load_visual_tokenizer
from ursa.video.decode import FrameSize, ReadFrames, read_frames_at
from ursa.video.reader import ClipReader
from ursa.video.variants import ZOOM, vary

logger = logging.getLogger(__name__)

_BATCH_WINDOWS = 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
Rows = dict[Modality, list[dict[str, Any]]]
"""Rows of `token_schema` by modality."""


class ClipFrames(NamedTuple):
    """The frames of all samples of a clip.

    Attributes:
        samples: The samples by modality.
        place: Where in the arrays a frame of the clip is, by its number.
        small: Frames in the size of the samples.
        large: Frames at `ZOOM` times that size, for variants; the small ones if there are none.
    """

    samples: dict[Modality, list[Sample]]
    place: dict[int, int]
    small: np.ndarray
    large: np.ndarray


class TokenizationPlan(NamedTuple):
    """What is committed, what is done and what is left to do."""

    committed: TokenDatasets | None
    done: tuple[TokenizedUnit, ...]
    todo: tuple[TokenizationUnit, ...]
    recipe: TokenizationRecipe
    buckets: Mapping[str, int]
    """Bucket of each unit by its key."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data sets."""
        return self.recipe.fingerprint


def plan_tokenization(
    selection: ClipSelection,
    visual_tokenizer: TokenizerRef,
    config: RunConfig,
    *,
    output_uri: str,
) -> TokenizationPlan:
    """Divide the kept clips into units and find out which are done.

    Args:
        selection: The committed selection.
        visual_tokenizer: The committed tokenizer.
        config: The run; `tokenization` matters.
        output_uri: Root of all data of the run.

    Returns:
        The data sets if they are committed, else the units that are done and those to do.

    Raises:
        ShardFormatError: If a table of the clips is missing or damaged.
        StorageError: If the store refuses or does not answer.
    """
    recipe = TokenizationRecipe(
        selection=selection, visual_tokenizer=visual_tokenizer, settings=config.tokenization
    )
    manifest_uri = _root(output_uri, recipe.fingerprint, "manifest.json")
    committed = storage.load_record(manifest_uri, TokenDatasets)
    if committed is not None:
        return TokenizationPlan(committed, (), (), recipe, {})
    clips, units = divide_clips(recipe)
    uris = [unit_record_uri(output_uri, unit.key) for unit in units]
    results = storage.load_records(uris, TokenizedUnit)
    done = tuple(result for result in results if result is not None)
    todo = tuple(
        make_unit(unit, clips, output_uri)
        for unit, result in zip(units, results, strict=True)
        if result is None
    )
    buckets = {unit.key: unit.bucket for unit in units}
    return TokenizationPlan(None, done, todo, recipe, buckets)


class ClipTokenizer:
    """The unit function, with the visual tokenizer loaded once a process.

    Clips are decoded in child processes, the next ones while one is encoded: a clip on which a
    decoder crashes, hangs or runs out of memory is a failed clip and nothing more.
    """

    def __init__(
        self,
        visual_tokenizer: TokenizerRef,
        config: RunConfig | TokenizationConfig,
        *,
        num_decoders: int = 1,
        device: str = "cpu",
    ) -> None:
        """Load the tokenizer; runs in the process that uses it.

        Args:
            visual_tokenizer: The committed tokenizer.
            config: The run, of which `tokenization` matters, or that section alone.
            num_decoders: Processes that decode, one clip each at a time; the result does not
                depend on it.
            device: Where to encode, such as cpu or cuda.

        Raises:
            ConfigError: If there is no such tokenizer.
            StorageError: If the store refuses or does not answer.
        """
        _keep_freed_memory()
        with storage.local_directory(visual_tokenizer.directory_uri) as folder:
            self._tokenizer = load_visual_tokenizer(folder).to(device=device)
        self._settings = config.tokenization if isinstance(config, RunConfig) else config
        self._num_decoders = num_decoders
        self._pool = ThreadPoolExecutor(num_decoders, thread_name_prefix="decode")
        self._own = threading.local()

    def __call__(self, unit: TokenizationUnit) -> TokenizedUnit:
        """Tokenize a unit and commit its record; a unit that is committed is returned as it is.

        Args:
            unit: A unit of the plan.

        Returns:
            The record. It is not committed if a clip could not be read for now, since another
            attempt may fare better.

        Raises:
            StorageError: If the store does not answer; a clip that cannot be read is not an
                exception but an entry of `failed`.
            ServiceError: If no process that decodes can be started.
        """
        done = storage.load_record(unit.record_uri, TokenizedUnit)
        if done is not None:
            return done
        rows: Rows = {modality: [] for modality in MODALITIES}
        failed: list[FailedClip] = []
        num_too_short = 0
        settings = bucket_settings(self._settings, unit.bucket)
        for clip, reading in self._read_ahead(unit.clips, unit.split, settings):
            try:
                found = encode_clip(clip, unit.split, reading.result(), self._tokenizer, settings)
            except (StorageError, ServiceError):
                raise
            except UrsaError as error:
                logger.warning("clip %s of %s: %s", clip.clip_id, clip.source_uri, error)
                failed.append(
                    FailedClip(
                        clip_id=clip.clip_id,
                        source_uri=clip.source_uri,
                        detail=str(error),
                        transient=error.transient,
                    )
                )
                continue
            num_too_short += not found["video"]
            for modality in MODALITIES:
                rows[modality] += found[modality]
        shards = {
            modality: write_shard(
                rows[modality],
                storage.join(unit.output_uri, "tokens", "shards", f"{modality}-{unit.key[:16]}"),
                codebook_size=len(self._tokenizer.codebook),
            )
            if rows[modality]
            else None
            for modality in MODALITIES
        }
        record = TokenizedUnit(
            key=unit.key,
            split=unit.split,
            image=shards["image"],
            video=shards["video"],
            num_clips=len(unit.clips),
            num_too_short=num_too_short,
            failed=tuple(failed),
        )
        return record if record.is_partial else storage.commit_record(unit.record_uri, record)

    def remake(self, unit: TokenizationUnit, record: TokenizedUnit | None) -> dict[Modality, bytes]:
        """Return the shards of a committed unit again, as bytes; nothing is written.

        Args:
            unit: The unit.
            record: What became of it; clips that failed then are left out again. None: none failed.

        Returns:
            Bytes by modality. On another processor or with other versions of the libraries they
            may differ from those that the record names.

        Raises:
            VideoDecodeError: If a clip cannot be read, or is missing or damaged.
            StorageError: If the store refuses or does not answer.
            ServiceError: If no process that decodes can be started.
        """
        left_out = {clip.clip_id for clip in record.failed} if record is not None else set()
        wanted = [clip for clip in unit.clips if clip.clip_id not in left_out]
        rows: Rows = {modality: [] for modality in MODALITIES}
        settings = bucket_settings(self._settings, unit.bucket)
        for clip, reading in self._read_ahead(wanted, unit.split, settings):
            found = encode_clip(clip, unit.split, reading.result(), self._tokenizer, settings)
            for modality in MODALITIES:
                rows[modality] += found[modality]
        num_codes = len(self._tokenizer.codebook)
        return {
            modality: shard_bytes(part, codebook_size=num_codes) for modality, part in rows.items()
        }

    def close(self) -> None:
        """End the processes that decode; they end with this object as well."""
        self._pool.shutdown(cancel_futures=True)

    def _read_ahead(
        self, clips: Sequence[Clip], split: Split, settings: TokenizationConfig
    ) -> Iterator[tuple[Clip, "Future[ClipFrames]"]]:
        """Yield the clips in their order; while one is encoded, the next ones are decoded."""
        ahead: deque[tuple[Clip, Future[ClipFrames]]] = deque()
        try:
            for clip in clips:
                ahead.append((clip, self._pool.submit(self._read, clip, split, settings)))
                # bounds what is held decoded
                if len(ahead) > self._num_decoders:
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for _, reading in ahead:
                reading.cancel()

    def _read(self, clip: Clip, split: Split, settings: TokenizationConfig) -> ClipFrames:
        if not hasattr(self._own, "reader"):  # one a thread, which ends with it
            self._own.reader = ClipReader()
        return read_clip(clip, split, settings, self._own.reader.read)


def _keep_freed_memory() -> None:
    """Let the C library of this process keep what is freed, if it is glibc.

    Tensors of megabytes come and go with every clip; to give their pages back to the system and to
    have new ones zeroed each time takes a fifth of the time.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def read_clip(
    clip: Clip, split: Split, settings: TokenizationConfig, read: ReadFrames = read_frames_at
) -> ClipFrames:
    """Return the frames of all image and video samples of a clip.

    Args:
        clip: A normalised clip.
        split: Held-out clips have no variants.
        settings: Size, rate and distance of the samples.
        read: Reads frames of a local file.

    Raises:
        VideoDecodeError: If the clip cannot be read; ClipUnavailableError if it is missing, damaged
            or cannot be read for now.
        StorageError: If the store refuses or does not answer.
    """
    samples = clip_samples(clip, settings)
    wanted = sorted({index for found in samples.values() for _, part in found for index in part})
    sizes = [FrameSize(settings.height_px, settings.width_px)]
    if any(num_variants(modality, split, settings) for modality in MODALITIES):
        sizes.append(FrameSize(ZOOM * settings.height_px, ZOOM * settings.width_px))
    with local_clip(clip) as path:
        # one pass over the clip: samples overlap, and random access costs a seek a sample
        frames = read(path, wanted, sizes)
    place = {index: position for position, index in enumerate(wanted)}
    return ClipFrames(samples, place, frames[0], frames[-1])


def encode_clip(
    clip: Clip,
    split: Split,
    frames: ClipFrames,
    tokenizer: AutoencoderTokenizer,
    settings: TokenizationConfig,
) -> Rows:
    """Return the rows of all image and video samples of a clip, training ones with variants.

    Args:
        clip: A normalised clip.
        split: Held-out clips have no variants.
        frames: Result of `read_clip`.
        tokenizer: The visual tokenizer.
        settings: Size, rate and distance of the samples.

    Returns:
        Rows by modality; a clip shorter than a sample has no video rows.
    """
    rows: Rows = {modality: [] for modality in MODALITIES}
    for modality in MODALITIES:
        for variant in range(1 + num_variants(modality, split, settings)):
            for part in _parts(frames.samples[modality]):
                windows = []
                for start, indices in part:
                    places = [frames.place[index] for index in indices]
                    seed = address_seed(clip.clip_id, modality, f"{start:.4f}", variant)
                    windows.append(
                        vary(frames.large[places], seed=seed) if variant else frames.small[places]
                    )
                ids = tokenizer.encode(np.stack(windows)).cpu().numpy()
                rows[modality] += [
                    _row(clip, modality, start, variant, settings.fps, grid)
                    for (start, _), grid in zip(part, ids, strict=True)
                ]
    return rows


def commit_tokens(
    plan: TokenizationPlan,
    units: Sequence[TokenizedUnit],
    visual_tokenizer: TokenizerRef,
    config: RunConfig,
    *,
    output_uri: str,
) -> TokenDatasets:
    """Commit the data sets of a run.

    Args:
        plan: The plan whose `todo` has been done.
        units: Results of `plan.done` and `plan.todo` together.
        visual_tokenizer: The tokenizer that was used.
        config: The run.
        output_uri: Root of all data of the run.

    Returns:
        The committed data sets; of several committers all get the first one's. Where clips could
        not be read for now they have a fingerprint of their own, so that the next plan tries these
        again.

    Raises:
        FailureBudgetExceeded: If more clips failed than `tokenization.max_failed_fraction`.
    """
    if plan.committed is not None:
        return plan.committed
    ordered = sorted(units, key=lambda unit: unit.key)
    failed = [clip for unit in ordered for clip in unit.failed]
    num_clips = sum(unit.num_clips for unit in ordered)
    settings = config.tokenization
    if len(failed) > settings.max_failed_fraction * num_clips:
        named = "; ".join(f"{clip.source_uri}: {clip.detail}" for clip in failed[:3])
        raise FailureBudgetExceeded(
            f"{len(failed)} of {num_clips} clips could not be tokenized, more than tokenization."
            f"max_failed_fraction {settings.max_failed_fraction:g} allows: {named}"
        )
    partial = tuple(unit for unit in ordered if unit.is_partial)
    recipe = plan.recipe.model_copy(update={"partial_units": partial})
    print_ = recipe.fingerprint
    manifest_uri = _root(output_uri, print_, "manifest.json")
    datasets = [
        _dataset(
            (modality, split, bucket),
            [u for u in ordered if u.split == split and plan.buckets[u.key] == bucket],
            visual_tokenizer,
            config,
            manifest_uri,
            print_,
        )
        for bucket in range(len(sample_sizes(settings)))
        for modality in MODALITIES
        for split in SPLITS
    ]
    storage.commit_record(_root(output_uri, print_, RECIPE_NAME), recipe)
    return storage.commit_record(
        manifest_uri,
        TokenDatasets(
            manifest_uri=manifest_uri,
            num_failed_clips=len(failed),
            num_unavailable_clips=sum(clip.transient for clip in failed),
            num_short_clips=sum(unit.num_too_short for unit in ordered),
            fingerprint=print_,
            extra_buckets=tuple(part for part in datasets if part.bucket > 0),
            **{f"{part.modality}_{part.split}": part for part in datasets if part.bucket == 0},
        ),
    )


def latent_shape(config: RunConfig, modality: Modality, bucket: int = 0) -> tuple[int, int, int]:
    """Return (T, H, W) of a sample in latent frames, rows and columns.

    Args:
        config: The run; `tokenization` and `visual_tokenizer` matter.
        modality: An image is one latent frame.
        bucket: 0 is the main size.
    """
    samples = sample_sizes(config.tokenization)[bucket]
    strides = config.visual_tokenizer
    frames = 1 if modality == "image" else 1 + (samples.num_frames - 1) // strides.temporal_stride
    return (
        frames,
        samples.height_px // strides.spatial_stride,
        samples.width_px // strides.spatial_stride,
    )


def _dataset(
    address: tuple[Modality, Split, int],
    units: Sequence[TokenizedUnit],
    visual_tokenizer: TokenizerRef,
    config: RunConfig,
    manifest_uri: str,
    print_: str,
) -> TokenDataset:
    modality, split, bucket = address
    shards = tuple(shard for unit in units if (shard := unit.shard(modality)) is not None)
    shape = latent_shape(config, modality, bucket)
    num_samples = sum(shard.num_samples for shard in shards)
    return TokenDataset(
        manifest_uri=manifest_uri,
        modality=modality,
        split=split,
        bucket=bucket,
        num_samples=num_samples,
        num_tokens=num_samples * shape[0] * shape[1] * shape[2],
        codebook_size=visual_tokenizer.vocab_size,
        visual_tokenizer_fingerprint=visual_tokenizer.fingerprint,
        latent_shape=shape,
        shards=shards,
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(print_, *address),
    )


def _row(
    clip: Clip, modality: Modality, start_s: float, variant: int, fps: float, grid: np.ndarray
) -> dict[str, Any]:
    frames, rows, columns = grid.shape
    return {
        "sample_id": sample_id(clip.clip_id, modality, start_s, variant),
        "clip_id": clip.clip_id,
        "source_sha256": clip.source_sha256,
        "media_sha256": clip.media_sha256,
        "start_s": start_s,
        "variant": variant,
        "fps": fps,
        "num_latent_frames": frames,
        "num_rows": rows,
        "num_columns": columns,
        "visual_ids": grid.ravel(),
        "caption": clip.caption or "",
        "motion_px_per_s": clip.scores.motion_px_per_s if modality == "video" else None,
    }


def _parts(samples: list[Sample]) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), _BATCH_WINDOWS):
        yield samples[start : start + _BATCH_WINDOWS]


def _root(output_uri: str, print_: str, *parts: str) -> str:
    return storage.join(output_uri, "tokens", print_[:32], *parts)
