"""The frozen records that cross steps: references, counts and fingerprints, never tensors.

Every record is JSON (pydantic, frozen, unknown keys refused). A step's output exists when its
`manifest.json` exists; the manifest holds the record and is written last.
"""

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, TypeAdapter

from ursa.config import (
    FrozenModel,
    HeldOutMetric,
    IngestionConfig,
    RunConfig,
    SelectionConfig,
    StageName,
    fingerprint,
)

SCHEMA_VERSION = 3
"""Version of every manifest and Parquet schema; a reader refuses another one."""

HASH_BYTES = 8
"""Bytes of the hash of a frame."""

Modality = Literal["image", "video"]
Split = Literal["train", "validation"]
HexBytes = Annotated[
    bytes,
    BeforeValidator(lambda value: bytes.fromhex(value) if isinstance(value, str) else value),
    PlainSerializer(bytes.hex, return_type=str, when_used="json-unless-none"),
]
"""Bytes that are hexadecimal digits in JSON."""


def _whole_hashes(value: bytes) -> bytes:
    if len(value) % HASH_BYTES:
        raise ValueError(f"got {len(value)} bytes, expected {HASH_BYTES} for each frame")
    return value


GridSetting = Literal["synchronous", "per_frame", "image_to_video"]


class FailureReason(StrEnum):
    """Why a file was quarantined at ingestion."""

    EMPTY_FILE = "empty_file"
    NOT_REGULAR_FILE = "not_regular_file"
    FILE_TOO_LARGE = "file_too_large"
    NOT_A_VIDEO = "not_a_video"
    UNAVAILABLE = "unavailable"
    MISSING = "missing"
    REFUSED = "refused"
    UNREADABLE = "unreadable"
    NO_VIDEO_STREAM = "no_video_stream"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    FPS_TOO_LOW = "fps_too_low"
    RESOLUTION_TOO_LOW = "resolution_too_low"
    RESOLUTION_TOO_HIGH = "resolution_too_high"
    PIXEL_BUDGET = "pixel_budget"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"


class RejectReason(StrEnum):
    """Why a readable clip was not selected.

    A rule or recipe adds the score that decided: `too_low:<scorer>/<score>`, `too_high:...`,
    `not_measured:...`.
    """

    TOO_SHORT = "too_short"
    TOO_STATIC = "too_static"
    TOO_FAST = "too_fast"
    CAMERA_TOO_FAST = "camera_too_fast"
    OBJECTS_TOO_STATIC = "objects_too_static"
    BLURRED = "blurred"
    TOO_DARK = "too_dark"
    TOO_BRIGHT = "too_bright"
    UNDEREXPOSED = "underexposed"
    OVEREXPOSED = "overexposed"
    BLACK_FRAMES = "black_frames"
    BLACK_BORDERS = "black_borders"
    FROZEN = "frozen"
    SLIDESHOW = "slideshow"
    REPEATED_FRAMES = "repeated_frames"
    FLICKER = "flicker"
    TEXT = "text"
    OVERLAY = "overlay"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    TOO_LOW = "too_low"
    TOO_HIGH = "too_high"
    NOT_MEASURED = "not_measured"


class SourceVideo(FrozenModel):
    """One file at the source. `etag` changes whenever the content may have changed."""

    uri: str = Field(description="of a member of a tar file: `<uri of the tar>#<name>`")
    num_bytes: int = Field(ge=0)
    etag: str
    offset_bytes: int | None = Field(
        default=None, ge=0, description="where a member begins in its tar file; None is no member"
    )
    problem: FailureReason | None = Field(
        default=None, description="why it cannot be read, if that is known without reading it"
    )
    detail: str = Field(default="", description="more about the problem, in words")


class VideoInfo(FrozenModel):
    """What a file or a clip is, after decoding."""

    width_px: int = Field(gt=0)
    height_px: int = Field(gt=0)
    fps: float = Field(gt=0)
    num_frames: int = Field(gt=0)
    duration_s: float = Field(gt=0)
    codec: str


class ClipScores(FrozenModel):
    """Raw measurements of a clip; `None` is "not measured", never a sentinel number.

    Motion is measured on pictures 256 px wide, about 12 a second. How, in docs/filters.md.
    """

    motion_px_per_s: float | None = Field(
        description="mean optical flow magnitude, px/s, from 0; flat ground counts as still"
    )
    camera_motion_px_per_s: float | None = Field(
        description="mean length of the affine motion that most of the flow follows, px/s, from 0"
    )
    object_motion_px_per_s: float | None = Field(
        description="mean length of the flow less the camera's motion, px/s, from 0"
    )
    sharpness: float | None = Field(description="variance of the Laplacian of 8-bit luma")
    luminance: float | None = Field(description="mean luma, 0..255")
    dark_fraction: float | None = Field(description="share of pixels of luma 0..8, in [0, 1]")
    bright_fraction: float | None = Field(description="share of pixels of luma 247..255, in [0, 1]")
    black_fraction: float | None = Field(
        description="share of frames with 98 % of their pixels at luma 0..24, in [0, 1]"
    )
    black_border_fraction: float | None = Field(
        description="share of the picture in black bars, in [0, 1], after bars were cut away"
    )
    freeze_fraction: float | None = Field(
        description="share of frames in still runs of at least 0.5 s, in [0, 1]"
    )
    slideshow_fraction: float | None = Field(
        description="share of frames in still runs that a cut or dissolve joins to another still, "
        "in [0, 1]"
    )
    distinct_fps: float | None = Field(
        description="frames a second that differ from the one before, outside of still runs; at "
        "most the rate of the clip; None where all is still"
    )
    flicker: float | None = Field(
        description="mean distance of mean luma from that of its neighbours in time, 8-bit levels"
    )
    text_area_fraction: float | None = Field(
        description="share of the picture in lines of text that stay for a second, in [0, 1]"
    )
    static_overlay_fraction: float | None = Field(
        description="share of the picture in edges that stay while it moves, in [0, 1]; None where "
        "too little moves"
    )
    perceptual_hash: str | None = Field(
        description="64-bit hashes of nine frames, 16 hexadecimal digits each"
    )
    frame_hashes: Annotated[HexBytes, AfterValidator(_whole_hashes)] | None = Field(
        default=None,
        description="64-bit hashes of eight frames a second, 8 bytes each; None in clips of older "
        "releases",
    )


class CroppedPixels(FrozenModel):
    """What was cut away around the picture, pixels of the upright source with square pixels."""

    left: int = Field(ge=0)
    top: int = Field(ge=0)
    right: int = Field(ge=0)
    bottom: int = Field(ge=0)


NOT_CROPPED = CroppedPixels(left=0, top=0, right=0, bottom=0)


class Clip(FrozenModel):
    """A normalised clip: H.264, constant frame rate, closed GOP, upright, in MP4."""

    clip_id: str = Field(description="sha256 of source bytes and span, 32 hexadecimal digits")
    source_uri: str
    source_sha256: str
    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)
    media_uri: str
    media_sha256: str
    info: VideoInfo
    cropped_px: CroppedPixels = Field(
        default=NOT_CROPPED, description="black bars that were cut away"
    )
    scores: ClipScores
    extra_scores: dict[str, float] = Field(
        default_factory=dict, description="by `<scorer>/<score>`: what scorers of extras measured"
    )
    caption: str | None = None
    caption_long: str | None = None
    caption_source: Literal["sidecar", "manifest", "tar", "template", "captioner"] | None = None
    caption_model: str | None = Field(
        default=None, description="what wrote the captions, if a model"
    )
    license: str | None = Field(default=None, description="of the source, as it was given")
    attribution: str | None = Field(default=None, description="whom the source asks to name")


CLIPS = TypeAdapter(tuple[Clip, ...])
"""Clips from and to JSON."""


class IngestedVideo(FrozenModel):
    """What became of one source file: its clips, or the reason why it has none."""

    source: SourceVideo
    source_sha256: str | None
    info: VideoInfo | None
    clips: tuple[Clip, ...]
    failure: FailureReason | None
    detail: str = ""
    num_dropped_shots: int = Field(default=0, ge=0, description="shots shorter than min_clip_s")


class ClipSet(FrozenModel):
    """All clips of a source, committed. Rows are in `clips.parquet` beside the manifest."""

    manifest_uri: str
    clips_uri: str
    source_uri: str
    num_videos: int
    num_failed: int
    num_clips: int
    num_dropped_shots: int
    failures: dict[FailureReason, int]
    # records written before it lack it
    failures_uri: str | None = Field(
        default=None, description="table of the failures; None is the one beside the manifest"
    )
    config: IngestionConfig = Field(description="what made the clips, where the set came first")
    fingerprint: str


class Threshold(FrozenModel):
    """A limit as a selection applied it, with percentiles and shares in numbers."""

    key: str = Field(description="of the configuration: `min_sharpness`, `rules.0`, `cosmos.0`")
    scorer: str
    score: str
    least: float | None
    greatest: float | None
    is_relative: bool = Field(description="it follows from a percentile or a share of the clips")
    source: str | None = Field(description="where the numbers come from, if that is known")


class ClipSelection(FrozenModel):
    """Verdict, reason and split of every clip, committed in `selection.parquet`."""

    manifest_uri: str
    selection_uri: str
    clips: ClipSet
    num_kept: int
    num_train: int
    num_validation: int
    rejections: dict[str, int] = Field(description="by reason: a RejectReason, see there")
    config: SelectionConfig
    thresholds: tuple[Threshold, ...] = Field(description="in the order in which they decide")
    fingerprint: str


class SelectedClip(FrozenModel):
    """The verdict on one clip; a kept clip has a split, a rejected one a reason."""

    clip: Clip
    kept: bool
    reason: str | None = Field(description="a RejectReason, with the score if a rule decided")
    split: Split | None


class TokenizerRef(FrozenModel):
    """A visual or text tokenizer directory, committed."""

    manifest_uri: str
    directory_uri: str
    kind: Literal["visual", "text"]
    vocab_size: int = Field(gt=0, description="codes of a visual, ids of a text tokenizer")
    metrics: dict[str, float]
    sha256: dict[str, str] = Field(
        default_factory=dict, description="by file name; empty in records of older releases"
    )
    fingerprint: str


class ShardInfo(FrozenModel):
    """One Parquet shard."""

    uri: str
    num_samples: int = Field(ge=0)
    num_bytes: int = Field(gt=0)
    sha256: str


SAMPLES_PICTURE = "samples.png"
"""The last file that a stage writes of the samples of a step."""


class TokenDataset(FrozenModel):
    """Token shards of one modality, split and size, committed; the manifest lists the shards."""

    manifest_uri: str
    modality: Modality
    split: Split
    bucket: int = Field(ge=0, description="0 is the main size, then `extra_buckets` in their order")
    num_samples: int
    num_tokens: int
    codebook_size: int
    visual_tokenizer_fingerprint: str
    latent_shape: tuple[int, int, int] = Field(description="(T, H, W) in latent units")
    shards: tuple[ShardInfo, ...]
    schema_version: int
    fingerprint: str

    def with_shards(self, shards: Iterable[ShardInfo]) -> "TokenDataset":
        """Return the data set of some of its shards.

        Args:
            shards: Which, in their order.
        """
        chosen = tuple(shards)
        num_samples = sum(shard.num_samples for shard in chosen)
        return self.model_copy(
            update={
                "shards": chosen,
                "num_samples": num_samples,
                "num_tokens": num_samples * math.prod(self.latent_shape),
                "fingerprint": fingerprint(self.fingerprint, [shard.sha256 for shard in chosen]),
            }
        )


class TokenDatasets(FrozenModel):
    """The token data sets of a run: four of the main size, and four of each further bucket."""

    manifest_uri: str
    image_train: TokenDataset
    image_validation: TokenDataset
    video_train: TokenDataset
    video_validation: TokenDataset
    extra_buckets: tuple[TokenDataset, ...]
    num_failed_clips: int
    num_unavailable_clips: int = Field(
        0, description="failed clips that could not be read for now; the next run tries them again"
    )
    num_short_clips: int = Field(description="kept clips that gave images alone")
    fingerprint: str

    def get(self, modality: Modality, split: Split) -> TokenDataset:
        """Return the data set of the main size of a modality and split.

        Args:
            modality: "image" or "video".
            split: "train" or "validation".
        """
        dataset: TokenDataset = getattr(self, f"{modality}_{split}")
        return dataset

    def of(self, modality: Modality, split: Split) -> tuple[TokenDataset, ...]:
        """Return the data sets of all sizes of a modality and split, by bucket.

        Args:
            modality: "image" or "video".
            split: "train" or "validation".
        """
        extra = (
            part for part in self.extra_buckets if (part.modality, part.split) == (modality, split)
        )
        return (self.get(modality, split), *extra)

    def parts(self) -> tuple[TokenDataset, ...]:
        """Return all data sets: those of the main size first."""
        main = (
            self.image_train,
            self.image_validation,
            self.video_train,
            self.video_validation,
        )
        return (*main, *self.extra_buckets)


class LossGrid(FrozenModel):
    """Held-out loss in nats and accuracy in [0, 1] of a model by time and latent frame.

    In the setting "synchronous" all frames are at the time of the row, in "per_frame" the frame is
    and the others are at times of their own, in "image_to_video" the first frame is clean and all
    others are at that time. The noisy tokens of a cell are the same in all three.
    """

    setting: GridSetting
    timesteps: tuple[float, ...]
    loss_by_time: tuple[float, ...]
    accuracy_by_time: tuple[float, ...]
    first_frame: int = Field(description="first latent frame measured; those before it are given")
    loss: tuple[tuple[float, ...], ...] = Field(description="a row a time, a column a frame")
    accuracy: tuple[tuple[float, ...], ...] = Field(description="likewise")
    sample_loss: tuple[float, ...] = Field(description="mean over times and frames of each sample")
    sample_accuracy: tuple[float, ...] = Field(description="likewise")

    @property
    def mean_loss(self) -> float:
        """Mean over the times, nats."""
        return sum(self.loss_by_time) / len(self.loss_by_time)

    @property
    def mean_accuracy(self) -> float:
        """Mean over the times, in [0, 1]."""
        return sum(self.accuracy_by_time) / len(self.accuracy_by_time)

    @property
    def is_finite(self) -> bool:
        """Whether a record can hold it: JSON has finite numbers alone."""
        return all(math.isfinite(loss) for row in self.loss for loss in row)


class CheckpointRef(FrozenModel):
    """A committed checkpoint of a stage."""

    uri: str
    stage: StageName
    step: int
    num_samples_seen: int
    metrics: dict[str, float]
    loss_curve: tuple[tuple[float, float], ...] = Field(
        default=(), description="(t, held-out loss in nats) of the averaged weights; may be empty"
    )
    grids: tuple[LossGrid, ...] = Field(
        default=(), description="of the averaged weights at the end; empty if nothing is held out"
    )
    fingerprint: str
    parent_uri: str | None
    merged_uri: str | None = Field(
        default=None,
        description="where adapters were trained: a checkpoint of the averaged weights with them "
        "merged, and in its `adapter/` what was trained, as peft writes it",
    )

    @property
    def weights_uri(self) -> str:
        """The checkpoint that holds the averaged weights of the whole network."""
        return self.merged_uri or self.uri


class StageRequest(FrozenModel):
    """Everything that decides one training stage."""

    stage: StageName
    config: RunConfig
    datasets: TokenDatasets
    visual_tokenizer: TokenizerRef
    text_tokenizer: TokenizerRef
    init_from: CheckpointRef | None
    known: TokenDatasets | None = Field(
        None, description="what the weights it starts from were trained on, for `new_fraction`"
    )
    output_uri: str


class ExportedModel(FrozenModel):
    """A directory that `UrsaPipeline.from_pretrained` reads, committed; no pickle inside."""

    manifest_uri: str
    directory_uri: str
    checkpoint: CheckpointRef
    tokens_uri: str = Field(description="manifest of the token data sets of its last stage")
    started_from_uri: str | None = Field(
        default=None,
        description="directory of the weights that its first stage began with; None were drawn, or "
        "an older release has written this",
    )
    sha256: dict[str, str] = Field(description="sha256 of every file by its relative path")
    fingerprint: str

    @property
    def content_key(self) -> str:
        """What makes two models the same, byte for byte: sha256, 64 hexadecimal digits."""
        return fingerprint(self.sha256)


BootstrapUnit = Literal["source", "prompt", "clip", "span", "sample"]
"""What `ursa.bootstrap` may draw as a whole."""


class HeldOutScores(FrozenModel):
    """What a model does on each held-out sample of a data set, committed."""

    manifest_uri: str
    model_key: str = Field(description="`ExportedModel.content_key`")
    sample_ids: tuple[str, ...]
    clip_ids: tuple[str, ...] = Field(description="of the same samples")
    source_ids: tuple[str, ...] = Field(description="likewise: sha256 of the source")
    span_ids: tuple[str, ...] = Field(
        default=(), description="likewise: `ursa.bootstrap.footage_spans`; not in old records"
    )
    grids: tuple[LossGrid, ...] = Field(description="`sample_loss` and so on in the same order")


class MetricInterval(FrozenModel):
    """A mean over held-out samples with its 95 % bootstrap interval."""

    metric: HeldOutMetric
    value: float
    low: float
    high: float


class MetricChange(FrozenModel):
    """A metric of the challenger less that of the champion, on the same samples and noise."""

    metric: HeldOutMetric
    champion: float
    challenger: float
    low: float | None = Field(
        description="95 % bootstrap interval of the difference; None of too few samples"
    )
    high: float | None
    budget: float | None = Field(description="by how much it may be worse; None is not judged")

    @property
    def difference(self) -> float:
        """Challenger less champion."""
        return self.challenger - self.champion


class Comparison(FrozenModel):
    """A challenger against the champion, sample by sample; `problem` says why there is none."""

    champion_version: str
    problem: str | None = Field(description="why they cannot be compared; None if they are")
    refuses: bool = Field(
        default=False,
        description="whether that refuses the challenger: the champion is of the same kind and "
        "works, but what is held out cannot judge it",
    )
    unit: BootstrapUnit | None = Field(
        description="what the bootstrap draws as a whole; None of too few samples"
    )
    num_units: int = Field(ge=0)
    num_samples: int = Field(ge=0)
    num_known_sources: int | None = Field(
        description="held-out sources left out, as the champion was trained on them; None if its "
        "training data are gone, so that nobody knows"
    )
    changes: tuple[MetricChange, ...]


class MeasuredCases(FrozenModel):
    """What metrics of a model were measured on: drawn clips, or windows of real ones."""

    name: str = Field(description="such as t2v; metrics name their cases by it")
    cases: tuple[str, ...] = Field(description="the same for all models, if data and seed are")
    units: tuple[str, ...] = Field(description="of each case what the bootstrap draws as a whole")
    unit: BootstrapUnit | None = Field(description="what that is; None of too few cases")


class Measure(FrozenModel):
    """A metric of a model with its 95 % bootstrap interval."""

    metric: str = Field(description="its name in MLflow, without the `eval/` before it")
    value: float
    low: float | None = Field(description="None of too few cases, and where nothing is drawn")
    high: float | None
    unit: str = Field(description="of the value")
    better: Literal["higher", "lower"] | None = Field(description="None if neither is")
    cases: str | None = Field(description="name of the `MeasuredCases`; None if there are none")
    values: tuple[float, ...] = Field(description="by case; empty if it is no mean over cases")


class Measurements(FrozenModel):
    """What a model does, with what it was measured on."""

    measures: tuple[Measure, ...] = ()
    cases: tuple[MeasuredCases, ...] = ()


class EvalReport(FrozenModel):
    """Metrics on held-out tokens and generated samples, committed."""

    manifest_uri: str
    model: ExportedModel
    metrics: dict[str, float]
    grids: tuple[LossGrid, ...] = Field(default=(), description="on held-out clips")
    samples_uri: str
    samples: tuple[str, ...] = Field(description="files under samples_uri")
    intervals: tuple[MetricInterval, ...] = Field(
        default=(), description="of the means over held-out samples; empty of too few"
    )
    comparison: Comparison | None = Field(
        default=None, description="with the champion; None if there was no other champion"
    )
    measurements: Measurements = Field(
        default=Measurements(), description="on drawn clips, real ones and reconstructions"
    )
    gate_passed: bool
    failed_gates: tuple[str, ...]
    fingerprint: str


class ModelVersion(FrozenModel):
    """A version in the model registry."""

    name: str
    version: str
    run_id: str
    model_uri: str
    alias: str | None
    is_new: bool = Field(description="False when the same model had been registered before")
