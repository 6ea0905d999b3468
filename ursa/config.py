"""The configuration of a run: complete, typed and frozen before work begins.

A preset is one complete YAML file in `ursa/presets`; overrides are a nested mapping merged over
it. Every key is checked: an unknown one is an error that names it. Configuration decides the
result of a run; where a run takes place (addresses, pool sizes) is in `tasks.settings`.
"""

import functools
import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from ursa.errors import ConfigError, name_hint, size_hint

Preset = Literal["tiny", "small"]
PRESETS: tuple[Preset, ...] = ("tiny", "small")
StageName = Literal["image_pretrain", "video_pretrain", "async_finetune"]
STAGES: tuple[StageName, ...] = ("image_pretrain", "video_pretrain", "async_finetune")

HeldOutMetric = Literal[
    "loss", "accuracy", "async_loss", "async_accuracy", "i2v_loss", "i2v_accuracy"
]
_ITEMS_AT_ONCE = 1024
"""Means over held-out samples: one t for all frames, a t of its own for each, first frame given."""

MODEL_NAME_PATTERN = r"""^[^/:.%"'?@\\]+$"""
"""Names of registered models: MLflow takes no others, or does not find what it has taken.

It cannot search for quotes and backslashes, and reads ? and @ in models:/NAME as ends of the name.
"""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class FrozenModel(BaseModel):
    """An immutable record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ConfigSection(FrozenModel):
    """A part of the configuration; the error of an unknown key names the nearest known one."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _name_known_keys(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return build(values)
        except ValidationError as error:
            lines = [
                InitErrorDetails(
                    type=PydanticCustomError(
                        item["type"], _explained(item, list(cls.model_fields))
                    ),
                    loc=item["loc"],
                    input=item["input"],
                )
                for item in error.errors()
            ]
            raise ValidationError.from_exception_data(error.title, lines) from error


def _explained(item: ErrorDetails, known: list[str]) -> str:
    """Return the message of an error in a section; those of sections inside are explained."""
    if item["type"] != "extra_forbidden" or len(item["loc"]) > 1:
        return item["msg"]
    return f"unknown key; {name_hint(str(item['loc'][0]), known)}"


class IngestionConfig(ConfigSection):
    """From foreign files to normalised, measured clips."""

    max_file_bytes: int = Field(gt=0, description="larger files are quarantined, bytes")
    max_duration_s: float = Field(gt=0, description="longer files are quarantined, seconds")
    max_side_px: int = Field(gt=0, description="wider or higher frames are quarantined, pixels")
    min_side_px: int = Field(gt=0, description="narrower or lower frames are quarantined, pixels")
    min_fps: float = Field(gt=0, description="slower videos are quarantined, frames per second")
    pixel_budget: int = Field(gt=0, description="frames x width x height decoded per file at most")
    # records of clips hold this section; those written before the next key was lack it
    pixel_budget_per_s: int = Field(
        default=0,
        ge=0,
        description="what every second of video adds to it: 4K at 60 fps is 500 million",
    )
    child_timeout_s: float = Field(
        gt=0, description="wall time of the decoding process per file; finished video earns more"
    )
    # as above
    child_cpu_s: int = Field(
        default=3600,
        gt=0,
        description="processor time of the decoding process; finished video earns more",
    )
    child_memory_bytes: int = Field(gt=0, description="address space of the decoding process")
    clip_fps: float = Field(gt=0, description="frame rate of normalised clips, frames per second")
    clip_height_px: int = Field(gt=0, description="normalised clips are at most this high, pixels")
    crop_borders: bool = Field(description="cut straight black bars off clips")
    shot_threshold: float = Field(
        gt=0,
        description="change between two frames that may be a cut, PySceneDetect content_val: mean "
        "of hue, saturation and value, 8-bit levels",
    )
    shot_ratio: float = Field(
        ge=1, description="it is one if it is so many times the changes around it"
    )
    adaptive_threshold: float = Field(
        gt=0, description="smaller change that may be a cut too, content_val"
    )
    adaptive_ratio: float = Field(
        ge=1, description="it is one if it is so many times the changes around it"
    )
    transition_threshold: float | None = Field(
        gt=0,
        description="mean change of luma from one end of a dissolve or fade to the other, 8-bit "
        "levels; None looks for none",
    )
    max_transition_s: float = Field(
        gt=0, le=10, description="longest dissolve or fade that is seen as a whole, seconds"
    )
    min_clip_s: float = Field(gt=0, description="shorter shots are dropped, seconds")
    max_clip_s: float = Field(gt=0, description="longer shots are cut into pieces, seconds")
    max_failed_fraction: Fraction = Field(description="more failed files stop the run")
    allow_https: bool = Field(description="fetch videos that a source names by https:// addresses")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_clip_s > self.max_clip_s:
            raise ValueError(
                f"min_clip_s {self.min_clip_s} must not exceed max_clip_s {self.max_clip_s}"
            )
        return self


class FramesConfig(ConfigSection):
    """What a scorer or captioner sees of a clip.

    No preset turns one on, so what is right for most has its default here.
    """

    num_frames: int = Field(default=4, ge=1, le=64, description="frames of a clip, evenly spread")
    max_side_px: int = Field(default=512, ge=32, le=4096, description="larger frames are shrunk")


class ModelFilesConfig(FramesConfig):
    """A model of transformers: a directory, or a name on the Hugging Face Hub."""

    model: str = Field(min_length=1, description="directory or s3:// prefix, or name on the Hub")
    revision: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{40}$",
        description="commit on the Hub, 40 hexadecimal digits; None: `model` is a directory",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32")


SHORT_PROMPT = (
    "These are frames of one video clip, in order. Say in one plain sentence what is seen and "
    "what happens. Name no camera, frame or video."
)
LONG_PROMPT = (
    "These are frames of one video clip, in order. Describe in three to six plain sentences what "
    "is seen: subjects, what they do, place, light, movement of the camera. Name no frames."
)
JSON_PROMPT = (
    "These are frames of one video clip, in order. Answer with a JSON object of two texts: "
    '"short", one plain sentence that says what is seen and what happens, and "long", three to '
    "six plain sentences on subjects, what they do, place, light and movement of the camera. "
    "Name no frames."
)
Replace = Annotated[
    Literal["template", "all"],
    Field(description="template: only captions made of file names are replaced; all: every one"),
]


class UrlCaptionerConfig(FramesConfig):
    """A captioner behind the chat completions protocol of OpenAI (vLLM, Ollama, a service).

    The key, if one is needed, is in the environment alone: URSA_CAPTIONER_API_KEY.
    """

    kind: Literal["url"]
    replace: Replace = "template"
    base_url: str = Field(description="what comes before /chat/completions, often ends in /v1")
    model: str = Field(min_length=1, description="name of the model at this address")
    revision: str = Field(default="", description="tells models of this name apart, in any words")
    prompt: str = Field(default=JSON_PROMPT, min_length=1)
    response_format: Literal["json_schema", "json_object", "none"] = Field(
        default="json_schema", description="how the server is asked for JSON"
    )
    max_tokens: int = Field(default=512, gt=0, description="tokens of an answer at most")
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=120.0, gt=0, description="longest silence of the server")
    max_retries: int = Field(default=4, ge=0, description="after a busy, broken or silent server")
    concurrency: int = Field(default=4, ge=1, le=256, description="requests at the same time")
    allow_plain_http: bool = Field(
        default=False, description="http:// to other machines: pictures and key go unencrypted"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            parts = urlsplit(self.base_url)
            host = parts.hostname or ""
            _ = parts.port
        except ValueError:
            parts, host = urlsplit(""), ""
        if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
            raise ValueError("base_url must be http(s)://host[:port][/path], without ? and #")
        if parts.username is not None or parts.password is not None:
            raise ValueError("base_url must hold no user and password; set URSA_CAPTIONER_API_KEY")
        if parts.scheme == "http" and not (self.allow_plain_http or _is_loopback(host)):
            raise ValueError(
                f"base_url must be https:// for host {host!r}; set allow_plain_http to send "
                "pictures and key unencrypted"
            )
        return self


class ModelCaptionerConfig(ModelFilesConfig):
    """A captioner on this machine: an image-text-to-text model of transformers."""

    kind: Literal["model"]
    replace: Replace = "template"
    prompt: str = Field(default=SHORT_PROMPT, min_length=1)
    long_prompt: str | None = Field(default=LONG_PROMPT, description="None: no long captions")
    max_tokens: int = Field(default=256, gt=0, description="tokens of an answer at most")


class SimilarityConfig(ModelFilesConfig):
    """Score `similarity`: how well caption and frames fit, by a CLIP or SigLIP model."""

    kind: Literal["similarity"]


class AestheticConfig(ModelFilesConfig):
    """Scores `rating`, `least_rating`: a head over CLIP or SigLIP embeddings of frames."""

    kind: Literal["aesthetic"]
    head: str = Field(min_length=1, description="safetensors file of the head, docs/annotation.md")
    activation: Literal["none", "relu"] = Field(
        default="none", description="between the layers of the head"
    )


class ClassifierConfig(ModelFilesConfig):
    """Scores `probability` (of the worst frame), `mean_probability`: of labels of a classifier."""

    kind: Literal["classifier"]
    labels: tuple[str, ...] = Field(min_length=1, description="their probabilities are added up")


class TextAreaConfig(FramesConfig):
    """Score `area_fraction`: share of the picture in text that an OCR model detects."""

    kind: Literal["text_area"]


CaptionerConfig = Annotated[UrlCaptionerConfig | ModelCaptionerConfig, Field(discriminator="kind")]
ScorerConfig = Annotated[
    SimilarityConfig | AestheticConfig | ClassifierConfig | TextAreaConfig,
    Field(discriminator="kind"),
]
ScorerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class AnnotationConfig(ConfigSection):
    """Optional captioner and scorers; with none, clips go on as they are."""

    captioner: CaptionerConfig | None = Field(description="writes captions; None writes none")
    scorers: dict[ScorerName, ScorerConfig] = Field(
        description="by name; their scores are `<name>/<score>` in extra_scores"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: a GPU if there is one")
    clips_per_unit: int = Field(gt=0, description="clips a unit of work")
    max_failed_fraction: Fraction = Field(
        description="more clips on which one of them fails stop the run"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "captioner" in self.scorers:
            raise ValueError("no scorer may be named 'captioner': the captioner is called that")
        return self


class SelectionRule(ConfigSection):
    """Limits on one score, in the unit of the scorer that they were chosen for."""

    score: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="name of the score")
    scorer: str = Field(
        pattern=r"^[A-Za-z0-9_.-]+$", description="who measures it; clips of another are refused"
    )
    least: float | None = Field(
        default=None, allow_inf_nan=False, description="clips below are rejected, unit of the score"
    )
    greatest: float | None = Field(
        default=None, allow_inf_nan=False, description="clips above are rejected, unit of the score"
    )
    least_percentile: float | None = Field(
        default=None, ge=0, le=100, description="share of the clips below that is rejected, percent"
    )
    greatest_percentile: float | None = Field(
        default=None, ge=0, le=100, description="share up to which clips are kept, percent"
    )
    keep_fraction: float | None = Field(
        default=None, gt=0, le=1, description="share of the clips that is kept"
    )
    keep: Literal["greatest", "least"] = Field(
        default="greatest", description="which clips `keep_fraction` keeps, by their score"
    )
    source: str | None = Field(default=None, description="where the numbers come from")

    @model_validator(mode="after")
    def _check(self) -> Self:
        pairs = (("least", "greatest"), ("least_percentile", "greatest_percentile"))
        for names in pairs:
            low, high = (getattr(self, name) for name in names)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{names[0]} {low:g} must not exceed {names[1]} {high:g}")
        limits = [name for pair in pairs for name in pair] + ["keep_fraction"]
        if all(getattr(self, name) is None for name in limits):
            raise ValueError(f"a rule needs one of {', '.join(limits)}, got none")
        return self


RecipeName = Literal[
    "cosmos", "data-juicer", "data-juicer-t2v", "koala", "opensora", "opensora-plan", "panda",
    "ursa-basic",
]  # fmt: skip
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)


class SelectionConfig(ConfigSection):
    """Thresholds over stored scores; `None` switches a threshold off."""

    min_motion_px_per_s: float | None = Field(description="slower clips are rejected, px/s")
    max_motion_px_per_s: float | None = Field(description="faster clips are rejected, px/s")
    min_sharpness: float | None = Field(description="variance of the Laplacian, 8-bit luma squared")
    min_luminance: float | None = Field(description="mean luma of the clip, 0..255")
    max_luminance: float | None = Field(description="mean luma of the clip, 0..255")
    max_black_border_fraction: float | None = Field(description="share of the picture in bars")
    min_clip_s: float | None = Field(description="shorter clips are rejected, seconds")
    max_camera_motion_px_per_s: float | None = Field(description="faster cameras, px/s")
    min_object_motion_px_per_s: float | None = Field(description="slower objects, px/s")
    max_dark_fraction: float | None = Field(description="share of pixels clipped at the dark end")
    max_bright_fraction: float | None = Field(
        description="share of pixels clipped at the bright end"
    )
    max_black_fraction: float | None = Field(description="share of frames that are black")
    max_freeze_fraction: float | None = Field(description="share of frames in still runs")
    max_slideshow_fraction: float | None = Field(
        description="share of frames in stills that a cut or dissolve joins to another"
    )
    min_distinct_fps: float | None = Field(
        description="frames a second that are not the one before once more; clips that are all "
        "still have none and pass"
    )
    max_flicker: float | None = Field(
        description="distance of mean luma from its neighbours in time, 8-bit levels"
    )
    max_text_area_fraction: float | None = Field(
        description="share of the picture in lines of text"
    )
    max_static_overlay_fraction: float | None = Field(
        description="share of the picture in edges that stay while it moves; clips in which too "
        "little moves to tell pass"
    )
    recipe: RecipeName | None = Field(description="published rules to apply beside all others")
    rules: tuple[SelectionRule, ...] = Field(description="limits on any score, of extras too")
    drop_duplicates: bool = Field(description="reject clips with equal source bytes and span")
    max_duplicate_distance: int | None = Field(
        ge=0,
        le=8,
        description="reject clips of which most frames are seen again in a better one: hashes "
        "differ in so many of 64 bits at most",
    )
    validation_fraction: Fraction = Field(
        description="share of sources held out, with all that show the same"
    )
    split_seed: int = Field(
        ge=0, description="decides which sources are held out, whatever the seed of the run is"
    )


class VisualTokenizerConfig(ConfigSection):
    """A causal FSQ autoencoder fitted to the selected clips, or one that exists already."""

    directory_uri: str | None = Field(description="an existing tokenizer; None fits one")
    levels: tuple[int, ...] = Field(min_length=1, description="FSQ levels, one a channel")
    temporal_stride: Literal[4] = Field(description="frames per latent frame after the first")
    spatial_stride: Literal[8] = Field(description="pixels per latent row and column")
    hidden_channels: int = Field(gt=0, description="width of the residual networks")
    num_residual_blocks: int = Field(ge=0, description="per side; 0 is the plain PCA solution")
    max_steps: int = Field(ge=0, description="optimizer steps; 0 keeps the PCA solution")
    batch_size: int = Field(gt=0, description="clips a step")
    learning_rate: float = Field(gt=0)
    augmented_fraction: Fraction = Field(
        description="share of fitting samples cropped, flipped and recoloured at random"
    )
    max_windows: int = Field(gt=0, description="samples held in memory for fitting at most")
    checkpoint_every: int = Field(gt=0, description="steps between checkpoints of the fit")
    refit_growth: float | None = Field(
        ge=1,
        description="when the source has changed, the tokenizer of the data set version before is "
        "kept, and with it all old tokens, until there are so many times the training clips that "
        "it was fitted to; 1 fits again at every change, None never",
    )
    seed: int = Field(ge=0)

    @property
    def codebook_size(self) -> int:
        """Number of codes: the product of the levels."""
        size = 1
        for level in self.levels:
            size *= level
        return size


class SampleSize(ConfigSection):
    """The size of the samples of a bucket."""

    num_frames: int = Field(gt=0, description="frames of a video sample: 1 + 4k")
    height_px: int = Field(gt=0, description="height of a sample, pixels; divisible by 8")
    width_px: int = Field(gt=0, description="width of a sample, pixels; divisible by 8")


class TokenizationConfig(ConfigSection):
    """How clips are cut into samples for the visual tokenizer."""

    fps: float = Field(gt=0, description="frame rate of a sample, frames per second")
    num_frames: int = Field(gt=0, description="frames of a video sample: 1 + 4k")
    height_px: int = Field(gt=0, description="height of a sample, pixels; divisible by 8")
    width_px: int = Field(gt=0, description="width of a sample, pixels; divisible by 8")
    extra_buckets: tuple[SampleSize, ...] = Field(
        description="further sizes: a clip goes to the one that keeps most of its picture; models "
        "are sampled and evaluated at the main size above"
    )
    window_stride_s: float = Field(gt=0, description="distance between starts of samples, seconds")
    image_stride_s: float = Field(gt=0, description="distance between frames used as images")
    image_variants: int = Field(
        ge=0, description="crops, mirrored or recoloured, of every training image beside itself"
    )
    video_variants: int = Field(
        ge=0, description="crops, mirrored or recoloured, of every training sample beside itself"
    )
    clips_per_shard: int = Field(
        gt=0, description="clips a unit of work and a shard, on average; twice as many at most"
    )
    max_failed_fraction: Fraction = Field(description="more failed clips stop the run")


class TextTokenizerConfig(ConfigSection):
    """A byte-level BPE trained on the captions, or one that exists already."""

    directory_uri: str | None = Field(description="an existing tokenizer; None trains one")
    vocab_size: int = Field(ge=260, description="text vocabulary including the special tokens")
    max_prompt_length: int = Field(gt=0, description="prompts are padded or cut to it, tokens")
    refit_growth: float | None = Field(
        ge=1, description="as visual_tokenizer.refit_growth: a new vocabulary is another model"
    )


class ModelConfig(ConfigSection):
    """The transformer: Qwen3 blocks with full attention, 3-D RoPE and a visual head."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=16)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class PathConfig(ConfigSection):
    """The metric path over the codebook and its schedule."""

    schedule: Literal["fitted", "tabulated", "fixed"] = Field(
        description="fitted: the alpha and c under which the mean distance falls linearly, or a "
        "table where the best deviate by more than max_deviation; tabulated: the table in any "
        "case; fixed: alpha and c as given"
    )
    max_deviation: Fraction = Field(
        description="from the straight line, relative to the mean distance at t = 0"
    )
    distance: Literal["squared", "euclidean"] = Field(description="what is to fall linearly")
    weights: Literal["uniform", "frequency"] = Field(
        description="the mean is over codes, or over the tokens of the training videos"
    )
    metric: Literal["normalized", "product"] = Field(
        description="normalized: distances of L2-normalised codes, as in the paper; product: of "
        "FSQ codes as they are, which is another path"
    )
    alpha: float = Field(gt=0, description="exponent, used when fixed")
    c: float = Field(gt=0, description="scale, used when fixed")


LoraTarget = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


class LoraConfig(ConfigSection):
    """Adapters of low rank: each chosen matrix W becomes W + (alpha / rank) B A, W stays as it is.

    No preset turns them on, so what is right for most has its default here.
    """

    rank: int = Field(default=16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(
        default=32.0, gt=0, allow_inf_nan=False, description="alpha / rank scales what B A adds"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the inputs of A that is set to 0 in training"
    )
    target_modules: tuple[LoraTarget, ...] = Field(
        default=LORA_TARGETS, description="matrices with an adapter, in every layer"
    )
    whole_modules: tuple[Literal["embed_tokens", "lm_head"], ...] = Field(
        default=(),
        description="trained whole beside the adapters: rows of text and codes, the visual head",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target_modules:
            raise ValueError(f"target_modules must name one of {', '.join(LORA_TARGETS)}")
        for name in ("target_modules", "whole_modules"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {', '.join(values)}; leave one out")
        return self


class StageConfig(ConfigSection):
    """One training stage; the three stages differ only in these values."""

    init_from: str | None = Field(
        description="directory of a model or of a Qwen3 language model to start from, which nobody "
        "changes; None starts from the stage before, the first from random weights"
    )
    lora: LoraConfig | None = Field(
        description="trains adapters of low rank and keeps the weights; None trains all weights"
    )
    modality: Literal["image", "video"]
    timesteps: Literal["synchronous", "per_frame"] = Field(
        description="one t a sample, or one t a latent frame (asynchronous)"
    )
    synchronous_fraction: Fraction = Field(
        description="share of samples that keep one t for all frames in mode per_frame"
    )
    timestep_shift: float = Field(gt=0, description="1 is none, larger means more noise")
    max_steps: int = Field(gt=0, description="optimizer steps")
    scale_shift: bool = Field(
        description="samples of other sizes have timestep_shift times sqrt(tokens / tokens of the "
        "main size)"
    )
    image_fraction: float = Field(
        ge=0, lt=1, description="share of steps on images in a stage on videos"
    )
    new_fraction: float | None = Field(
        gt=0,
        le=1,
        description="in a retraining: share of steps on shards that the model it starts from was "
        "not trained on, the rest replays the others; None treats all alike",
    )
    global_batch_size: int = Field(
        gt=0,
        description="samples a step over all workers; of other sizes a multiple or a whole part, "
        "for about as many tokens",
    )
    gradient_accumulation_steps: int = Field(
        gt=0, description="parts of a worker's batch that go through the network one by one"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        description="type of the products; weights, optimizer, average and loss are float32"
    )
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(ge=0, description="end of the cosine")
    warmup_steps: int = Field(ge=0)
    adam_betas: tuple[Decay, Decay]
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    prompt_dropout: Fraction = Field(description="probability of the empty prompt")
    motion_prefix_probability: Fraction = Field(description="probability of `motion=..., `")
    checkpoint_every: int = Field(gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(gt=0)
    validate_every: int = Field(gt=0, description="steps between validations")
    sample_every: int | None = Field(
        gt=0, description="steps between samples of fixed prompts and seeds; None draws none"
    )
    log_every: int = Field(gt=0, description="steps between metrics")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.modality == "image" and self.timesteps == "per_frame":
            raise ValueError("timesteps 'per_frame' needs modality 'video', got 'image'")
        if self.modality == "image" and self.image_fraction:
            raise ValueError(
                f"image_fraction {self.image_fraction:g} is for modality 'video'; set it to 0"
            )
        if self.gradient_accumulation_steps > self.global_batch_size:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} must be at most "
                f"global_batch_size {self.global_batch_size}"
            )
        return self


def bucket_batch_size(main: int, main_tokens: int, tokens: int) -> int:
    """Return the samples a step of a bucket: about as many tokens as a batch of the main size has.

    Args:
        main: Samples a step of the main size.
        main_tokens: Tokens of a sample of the main size.
        tokens: Tokens of a sample of the bucket.

    Returns:
        A multiple of `main`, or the largest whole part of it, and at least 1.
    """
    wanted = main * main_tokens / tokens
    if wanted >= main:
        return main * int(wanted / main)
    return max(size for size in range(1, main + 1) if main % size == 0 and size <= max(wanted, 1))


class StagesConfig(ConfigSection):
    """The three stages in their fixed order."""

    image_pretrain: StageConfig
    video_pretrain: StageConfig
    async_finetune: StageConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_pretrain.lora is not None and self.image_pretrain.init_from is None:
            raise ValueError(
                "image_pretrain.lora needs image_pretrain.init_from: without it the stage begins "
                "with random weights, which adapters would leave random"
            )
        return self

    def needed(self) -> tuple[StageName, ...]:
        """Return the stages that decide the result: none before one with a start of its own."""
        starts = [i for i, name in enumerate(STAGES) if getattr(self, name).init_from is not None]
        return STAGES[max(starts, default=0) :]


class SamplingConfig(ConfigSection):
    """How samples are drawn for evaluation."""

    num_inference_steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)
    guidance_trunc: float = Field(ge=0, le=1)
    temperature: float = Field(
        gt=0, description="the guided logits are divided by it; 1 is the law of the paper"
    )
    timestep_shift: float = Field(gt=0)
    num_prompts: int = Field(gt=0, description="training captions sampled, most frequent first")


class ClipEvaluationConfig(ConfigSection):
    """What clips are drawn for metrics, and what they are compared with."""

    num_prompts: int = Field(
        ge=0, description="training captions, most frequent first; 0 draws nothing from prompts"
    )
    seeds_per_prompt: int = Field(gt=0, description="clips of each prompt")
    num_windows: int = Field(
        ge=0, description="held-out windows that are continued from their first frame; 0: none"
    )
    max_train_windows: int = Field(
        gt=0, description="training windows among which the nearest to a clip is looked for"
    )
    asked_motion: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        description="motion asked of each clip of a prompt, px/s at 256 px width; one asks nothing"
    )
    fewer_steps: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        description="further numbers of steps: quality against steps"
    )
    features: Literal["statistics", "latents"] | ModelFilesConfig = Field(
        description="of the Frechet distance: colour, detail and motion, the tokenizer's codes, or "
        "an image network of transformers"
    )


class EvaluationConfig(ConfigSection):
    """What is measured on held-out clips."""

    timesteps: tuple[float, ...] = Field(min_length=1, description="t at which loss is measured")
    max_samples: int = Field(gt=0, description="held-out samples used at most")
    batch_size: int = Field(gt=0)
    sampling: SamplingConfig
    clips: ClipEvaluationConfig


class ReleaseConfig(ConfigSection):
    """What a version must reach to become champion."""

    model_name: str = Field(
        pattern=MODEL_NAME_PATTERN,
        description="name in the registry; MLflow takes none with / : . % ? @ \\ or quotes",
    )
    gate_min_timestep: Fraction = Field(description="from this t on, loss must beat the unigram")
    budgets: dict[HeldOutMetric, Annotated[float, Field(ge=0)] | None] = Field(
        description="by how much the 95 % interval may say that a metric is worse than the "
        "champion's: losses in nats, accuracies in [0, 1]; None is not judged"
    )
    require_comparison: bool = Field(
        description="whether a version is refused that cannot be compared with the champion, as "
        "when its visual tokenizer is another"
    )


class RetrainingConfig(ConfigSection):
    """When and how a run with `only_new` trains: from the champion, in one stage."""

    min_new_files: int = Field(
        gt=0, description="with fewer files of new content at the source a run ends as NoNewData"
    )
    min_drift: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="if no score of the new clips is further than this from what the champion was "
        "trained on (Jensen-Shannon distance less chance; `ursa.drift`), a run ends as NoNewData "
        "before it trains; None: it always trains",
    )
    start: Literal["champion", "scratch"] = Field(
        description="champion: async_finetune goes on from the champion, with the values below, "
        "where it has the same network and tokenizers; scratch: all stages"
    )
    max_steps: int = Field(gt=0, description="optimizer steps from the champion")
    learning_rate: float = Field(gt=0)
    new_fraction: float | None = Field(gt=0, le=1, description="as stages.*.new_fraction")


class RunConfig(ConfigSection):
    """Everything that decides the result of a run."""

    seed: int = Field(ge=0)
    ingestion: IngestionConfig
    annotation: AnnotationConfig
    selection: SelectionConfig
    visual_tokenizer: VisualTokenizerConfig
    tokenization: TokenizationConfig
    text_tokenizer: TextTokenizerConfig
    model: ModelConfig
    path: PathConfig
    stages: StagesConfig
    retraining: RetrainingConfig
    evaluation: EvaluationConfig
    release: ReleaseConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        samples = self.tokenization
        self._check_size(samples, "tokenization")
        shapes = [(samples.num_frames, samples.height_px, samples.width_px)]
        for place, size in enumerate(samples.extra_buckets):
            name = f"tokenization.extra_buckets.{place}"
            self._check_size(size, name)
            shape = (size.num_frames, size.height_px, size.width_px)
            if shape in shapes:
                raise ValueError(f"{name} is there twice: {size}; leave one out")
            shapes.append(shape)
        if self.tokenization.fps > self.ingestion.clip_fps:
            raise ValueError(
                f"tokenization.fps {self.tokenization.fps} must not exceed "
                f"ingestion.clip_fps {self.ingestion.clip_fps}"
            )
        return self

    def _check_size(self, size: SampleSize | TokenizationConfig, name: str) -> None:
        """Refuse a size that is not a whole number of latent frames, rows and columns."""
        stride_t = self.visual_tokenizer.temporal_stride
        if hint := size_hint(size.num_frames, stride_t, 1):
            raise ValueError(
                f"{name}.num_frames must be 1 + {stride_t}k, got {size.num_frames}; {hint}"
            )
        stride_s = self.visual_tokenizer.spatial_stride
        for side in ("height_px", "width_px"):
            if hint := size_hint(value := getattr(size, side), stride_s, stride_s):
                raise ValueError(
                    f"{name}.{side} must be divisible by {stride_s}, got {value}; {hint}"
                )


def _without_password(text: str) -> str:
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, by name or number; nothing is resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _partial(model: type[BaseModel]) -> type[BaseModel]:
    """Return a copy of a configuration model in which every field may be left out."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation: Any = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = _partial(annotation)
        fields[name] = (annotation, Field(default=None, description=info.description))
    return create_model(f"{model.__name__}Overrides", __base__=ConfigSection, **fields)


ConfigOverrides = _partial(RunConfig)
"""RunConfig with every field optional: the type of the flow parameter `overrides`."""


def load_config(preset: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a preset and merge overrides over it.

    Args:
        preset: Name of a file in `ursa/presets`, without its ending.
        overrides: Nested mapping of the values to change, as in
            `{"stages": {"video_pretrain": {"max_steps": 10}}}`.

    Returns:
        The complete, frozen configuration.

    Raises:
        ConfigError: If the preset does not exist, a key is unknown or a value not allowed.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return parse_config(_merge(_read_preset(preset), overrides or {}))


@functools.cache
def _read_preset(preset: str) -> Mapping[str, Any]:
    """Return the values of a preset, parsed once a process: nobody changes them."""
    text = resources.files("ursa.presets").joinpath(f"{preset}.yaml").read_text("utf-8")
    values: Mapping[str, Any] = yaml.safe_load(text)
    return values


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a RunConfig from a complete mapping.

    Args:
        values: All values by name, nested as in a preset.

    Returns:
        The complete, frozen configuration.

    Raises:
        ConfigError: If a key is missing or unknown or a value not allowed; it names every bad key.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {item['msg']}"
            f" (got {_without_password(str(item['input']))[:80]!r})"
            for item in error.errors()
        ]
        raise ConfigError("configuration refused: " + "; ".join(lines)) from error


def _merge(base: Any, overrides: Any) -> Any:
    if isinstance(base, dict) and isinstance(overrides, Mapping):
        merged = dict(base)
        for key, value in overrides.items():
            merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return overrides


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of the canonical JSON of the parts, 64 hexadecimal digits.

    Args:
        *parts: JSON values, pydantic models or lists of these: the configuration sections, parent
            fingerprints and schema versions that decide a step's output. No clock, host or run id.
    """
    digest = hashlib.sha256()
    for place, part in enumerate(parts):
        digest.update(b"," if place else b"[")
        for text in _canonical_texts(part):
            digest.update(text.encode("utf-8", "surrogatepass"))
    digest.update(b"]" if parts else b"[]")
    return digest.hexdigest()


def _canonical_texts(part: Any) -> Iterator[str]:
    """Yield the canonical JSON of a part; of a long list some items at a time.

    The text of a million files would be many times larger than they are.
    """
    if not isinstance(part, (list, tuple)):
        yield _canonical_text(part)
        return
    yield "["
    for start in range(0, len(part), _ITEMS_AT_ONCE):
        items = [_plain(item) for item in part[start : start + _ITEMS_AT_ONCE]]
        yield f"{',' if start else ''}{_canonical_text(items)[1:-1]}"
    yield "]"


def _canonical_text(part: Any) -> str:
    return json.dumps(_plain(part), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(part: Any) -> Any:
    return part.model_dump(mode="json") if isinstance(part, BaseModel) else part
