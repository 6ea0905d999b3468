"""Model directories: what the official pipeline writes, and our own generation_config.json.

    model_index.json          which class reads which folder
    transformer/              config.json, weights
    scheduler/                scheduler_config.json; scheduler_model.pth holds the codebook
    vae/                      config.json, weights of the visual tokenizer
    tokenizer/                tokenizer.json and what transformers reads beside it
    generation_config.json    ours: what a call takes where it names nothing

References:
    github.com/baaivision/URSA, package diffnext: pipelines and schedulers.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from ursa.config import FrozenModel
from ursa.diffusion.codebook import NORM_FLOOR, DenseCodebook
from ursa.diffusion.grid import GridCodebook, has_small_tables, match_grid
from ursa.diffusion.path import Codebook, MetricPath, MixturePath
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.schedule import PowerSchedule, Schedule, TabulatedSchedule
from ursa.errors import ConfigError
from ursa.model.pretrained import load_transformer, save_transformer
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TextTokenizer, load_text_tokenizer
from ursa.tokenizers.visual import (
    AutoencoderTokenizer,
    load_visual_tokenizer,
    save_visual_tokenizer,
)

logger = logging.getLogger(__name__)

INDEX_FILE = "model_index.json"
DEFAULTS_FILE = "generation_config.json"
SCHEDULER_FILE = "scheduler_config.json"
CODEBOOK_FILE = "scheduler_model.pth"
DIFFUSERS_VERSION = "0.35.2"
"""What official files of this layout say of themselves."""


class SampleDefaults(FrozenModel):
    """What a call takes where it names nothing: what the model was trained on.

    The values here are those of the official pipeline, for directories that name none.
    """

    height: int = Field(default=320, gt=0, description="pixels")
    width: int = Field(default=512, gt=0, description="pixels")
    num_frames: int = Field(default=1, gt=0)
    fps: float = Field(default=12.0, gt=0, description="frames per second")
    num_inference_steps: int = Field(default=25, gt=0)
    guidance_scale: float = Field(default=7.0, ge=0)
    guidance_trunc: float = Field(default=0.9, ge=0)
    temperature: float = Field(default=1.0, ge=0, description="of the draw of codes")
    solver: Literal["exact", "euler", "euler_beta"] = Field(
        default="euler", description="of the jump process"
    )
    clock: Literal["official", "linear", "entropy"] = Field(
        default="official", description="grid of the sampler"
    )
    loss_curve: tuple[tuple[float, float], ...] = Field(
        default=(), description="(t, held-out loss in nats): what the entropy clock follows"
    )
    flow_shift: float | None = Field(default=None, description="None: the scheduler's")
    motion_score: float | None = Field(
        default=None, description="median motion of the training clips, px/s at 256 px width"
    )
    max_prompt_length: int = Field(default=320, gt=0, description="ids a prompt")


class SchedulerConfig(FrozenModel):
    """The path and its schedule beta_t = c (t / (1 - t)) ** alpha; alpha None: mixture path.

    A tabulated schedule stands beside the alpha and c that are closest to it, which is what the
    official code reads.
    """

    alpha: float | None = None
    c: float | None = None
    shift: float = Field(default=1.0, gt=0)
    eps: float = 1e-5
    metric: Literal["normalized", "product"] = Field(
        default="normalized",
        description="distances of L2-normalised codes, or the product path of an FSQ grid",
    )
    log_beta: tuple[float, ...] | None = Field(
        default=None, description="log beta at even logits of t from -max_logit to max_logit"
    )
    max_logit: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _drop_others(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")  # noqa: TRY004
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        ignored = [key for key in values if key not in known and not key.startswith("_")]
        if ignored:
            logger.warning("%s: unknown keys ignored: %s", SCHEDULER_FILE, ", ".join(ignored))
        return known

    @model_validator(mode="after")
    def _check(self) -> "SchedulerConfig":
        if self.eps != NORM_FLOOR:
            raise ValueError(f"eps must be {NORM_FLOOR:g}, what codes are normalised with")
        if (self.alpha is None) != (self.c is None):
            raise ValueError(f"alpha and c go together, got alpha={self.alpha}, c={self.c}")
        if (self.log_beta is None) != (self.max_logit is None):
            raise ValueError("log_beta and max_logit go together")
        return self

    def unused_fields(self) -> set[str]:
        """Return the fields of ours that say nothing here."""
        fields = {"metric": "normalized", "log_beta": None, "max_logit": None}
        return {name for name, default in fields.items() if getattr(self, name) == default}

    def schedule(self) -> Schedule:
        """Return beta as a function of t.

        Raises:
            ConfigError: If there is none, or its numbers do not fit.
        """
        if self.log_beta is not None and self.max_logit is not None:
            return TabulatedSchedule(self.log_beta, max_logit=self.max_logit)
        if self.alpha is None or self.c is None:
            raise ConfigError("the mixture path has no schedule; give alpha and c")
        return PowerSchedule(self.alpha, self.c)

    def codebook(self, codes: Tensor, levels: tuple[int, ...] | None) -> Codebook:
        """Return what the path measures distances on, in the form that costs least.

        Args:
            codes: Code embeddings, shape (V, D), any float type, finite.
            levels: Levels of the FSQ tokenizer that they are of; None if it is another.

        Returns:
            The grid if the codes are those of the levels, else a codebook of any codes.

        Raises:
            ConfigError: If the codes are not as stated, or the product path is asked for and they
                are no FSQ grid.
        """
        is_grid = levels is not None and match_grid(codes, levels)
        if self.metric == "product":
            if not is_grid or levels is None:
                raise ConfigError(
                    "metric 'product' needs the codes of an FSQ grid of at most 65,536 codes; "
                    "take 'normalized' for others"
                )
            return ProductCodebook(levels)
        if is_grid and levels is not None and has_small_tables(levels):
            return GridCodebook(levels)
        return DenseCodebook(codes)

    def path(
        self, codes: Tensor, levels: tuple[int, ...] | None = None
    ) -> MetricPath | MixturePath:
        """Return the path over codes.

        Args:
            codes: Code embeddings, shape (V, D), any float type, finite.
            levels: Levels of the FSQ tokenizer that they are of; None if it is another.

        Returns:
            The path, computing in float32.

        Raises:
            ConfigError: As `codebook` and `schedule`.
        """
        if self.alpha is None and self.log_beta is None:
            return MixturePath(len(codes))
        return MetricPath(self.codebook(codes, levels), schedule=self.schedule())


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model directory holds.

    Attributes:
        transformer: The network.
        scheduler: The path's schedule.
        codebook: Code embeddings the path measures distances on, shape (V, D), as stored.
        visual_tokenizer: Frames to codes.
        text_tokenizer: Prompts to ids.
        defaults: What a call takes where it names nothing.
    """

    transformer: UrsaTransformer
    scheduler: SchedulerConfig
    codebook: Tensor
    visual_tokenizer: AutoencoderTokenizer
    text_tokenizer: TextTokenizer
    defaults: SampleDefaults


def find_directory(name: str | Path) -> Path:
    """Return a local directory: the path itself, or the snapshot of a model of the hub.

    Args:
        name: A directory, or a name of the hub such as "BAAI/URSA-1.7B-FSQ320".

    Raises:
        ConfigError: If it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    text = str(name)
    if text.count("/") != 1 or text.startswith(("/", ".", "~")):
        raise ConfigError(
            f"no model at {text}: there is no such directory; give one that holds {INDEX_FILE}, a "
            "name of the hub such as BAAI/URSA-1.7B-FSQ320, or on the command line "
            "models:/NAME@ALIAS"
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow, and rarely needed)
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(text))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"no model at {text}: there is no such directory, and the hub did not give a model "
            f"of that name ({type(error).__name__}); check the name and the network"
        ) from error


def read_directory(root: Path, *, dtype: torch.dtype | None) -> Parts:
    """Read a model directory, official or ours, to the CPU.

    Args:
        root: The directory.
        dtype: Type of the weights of both networks; None keeps them as stored.

    Returns:
        The parts of the model, on the CPU.

    Raises:
        ConfigError: If something is missing or does not fit together.
    """
    if not (root / INDEX_FILE).is_file():
        raise ConfigError(
            f"no model at {root}: {INDEX_FILE} is missing; give the directory that holds it"
        )
    try:
        json.loads((root / INDEX_FILE).read_bytes())
    except ValueError as error:
        raise ConfigError(f"{root / INDEX_FILE} is not JSON: {error}") from error
    transformer = load_transformer(root / "transformer", dtype=dtype)
    visual = load_visual_tokenizer(root / "vae").to(dtype=dtype)
    scheduler = _parse(SchedulerConfig, root / "scheduler" / SCHEDULER_FILE)
    stored = _read_codebook(root / "scheduler" / CODEBOOK_FILE)
    codebook = visual.codebook.cpu() if stored is None else stored
    num_codes = transformer.config.lm_head_size
    for what, size in (
        (f"scheduler/{CODEBOOK_FILE}", len(codebook)),
        ("vae", visual.network.quantizer.codebook_size),
    ):
        if size != num_codes:
            raise ConfigError(
                f"{root}: the transformer predicts {num_codes} codes, {what} has {size}"
            )
    return Parts(
        transformer=transformer,
        scheduler=scheduler,
        codebook=codebook,
        visual_tokenizer=visual,
        text_tokenizer=load_text_tokenizer(root / "tokenizer"),
        defaults=sample_defaults(root),
    )


def sample_defaults(root: Path) -> SampleDefaults:
    """Return what a call of a model takes where it names nothing.

    Args:
        root: The model directory.

    Raises:
        ConfigError: If the file is damaged.
    """
    has_defaults = (root / DEFAULTS_FILE).is_file()
    found: SampleDefaults = (
        _parse(SampleDefaults, root / DEFAULTS_FILE) if has_defaults else SampleDefaults()
    )
    return found


def write_directory(
    parts: Parts, root: Path, *, codebook_file: bool, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a model directory; model_index.json comes last, so a torn one is not taken for whole.

    Args:
        parts: What to write.
        root: Made if missing.
        codebook_file: Whether to write scheduler_model.pth, which the official code needs. It is
            a torch archive of one tensor; without it the directory holds no pickle.
        max_shard_bytes: Largest file of the transformer's weights.

    Raises:
        ConfigError: If `max_shard_bytes` is not positive.
    """
    (root / "scheduler").mkdir(parents=True, exist_ok=True)
    for old in (root / INDEX_FILE, root / "scheduler" / CODEBOOK_FILE):
        old.unlink(missing_ok=True)
    save_transformer(parts.transformer, root / "transformer", max_shard_bytes=max_shard_bytes)
    save_visual_tokenizer(parts.visual_tokenizer.network, root / "vae")
    parts.text_tokenizer.save(root / "tokenizer")
    scheduler = {
        "_class_name": "KineticOptimalScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        # what the official code does not know stands there only where it is used
        **parts.scheduler.model_dump(mode="json", exclude=parts.scheduler.unused_fields()),
    }
    _write_json(root / "scheduler" / SCHEDULER_FILE, scheduler)
    if codebook_file:
        torch.save({"path.emb": parts.codebook.cpu()}, root / "scheduler" / CODEBOOK_FILE)
    _write_json(root / DEFAULTS_FILE, parts.defaults.model_dump(mode="json"))
    models = "diffnext.models"
    visual_homes = {
        "AutoencoderVQCosmos3D": f"{models}.autoencoders.autoencoder_vq_cosmos3d",
        "AutoencoderVQ": f"{models}.autoencoders.autoencoder_vq",
    }
    visual_class = json.loads((root / "vae" / "config.json").read_text("utf-8"))["_class_name"]
    visual_home = visual_homes.get(visual_class, "ursa.tokenizers.fitted")
    index = {
        "_class_name": "URSAPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "transformer": [f"{models}.transformers.transformer_ursa", "URSATransformer3DModel"],
        "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
        "vae": [visual_home, visual_class],
        "tokenizer": ["transformers", parts.text_tokenizer.class_name],
    }
    _write_json(root / INDEX_FILE, index)


def _read_codebook(path: Path) -> Tensor | None:
    """Return `path.emb` of scheduler_model.pth, shape (V, D); None if there is no such file."""
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        codebook: Any = stored["path.emb"]
    except (UnpicklingError, RuntimeError, LookupError, TypeError, EOFError) as error:
        raise ConfigError(
            f"{path} must hold one tensor 'path.emb' and nothing else: {error}"
        ) from error
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        shape = (
            f"{codebook.dtype} {tuple(codebook.shape)}"
            if isinstance(codebook, Tensor)
            else type(codebook).__name__
        )
        raise ConfigError(f"{path}: 'path.emb' must be floats of shape (V, D), got {shape}")
    return torch.as_tensor(codebook)


def _parse(model: type[FrozenModel], path: Path) -> Any:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing") from error
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        )
        raise ConfigError(f"{path} refused: {reasons}") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
