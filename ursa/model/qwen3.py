"""config.json of a Qwen3 language model, as transformers 4 and 5 write it."""

from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ursa.errors import ConfigError
from ursa.model.config import CONFIG_FILE, TransformerConfig, reasons


class RopeSettings(BaseModel):
    """`rope_parameters` of transformers 5, `rope_scaling` of transformers 4."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rope_theta: float | None = None
    rope_type: str = Field(default="default", validation_alias=AliasChoices("rope_type", "type"))


class Qwen3Settings(BaseModel):
    """What matters of the file; defaults are those of transformers, other keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_window_layers: int = 28
    rope_theta: float | None = None
    rope_parameters: RopeSettings | None = None
    rope_scaling: RopeSettings | None = None
    attention_bias: bool = False
    use_sliding_window: bool = False
    hidden_act: str = "silu"


def read_qwen3_config(directory: Path) -> Qwen3Settings:
    """Read config.json of a Qwen3 language model.

    Args:
        directory: Holds config.json.

    Returns:
        What matters of the file.

    Raises:
        ConfigError: If it is missing, no Qwen3 model, or one with what URSA's network has not: a
            bias, windows, another activation, scaled rotations.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"no Qwen3 model at {directory}: {CONFIG_FILE} is missing")
    try:
        config = Qwen3Settings.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} is no Qwen3 model: {reasons(error)}") from error
    if config.model_type != "qwen3":
        raise ConfigError(f"{path}: model_type must be 'qwen3', got {config.model_type!r}")
    kinds = [rope.rope_type for rope in (config.rope_parameters, config.rope_scaling) if rope]
    foreign = {
        "attention_bias true": config.attention_bias,
        "use_sliding_window true": config.use_sliding_window,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {', '.join(kinds)}": any(kind != "default" for kind in kinds),
    }
    if any(foreign.values()):
        names = ", ".join(name for name, found in foreign.items() if found)
        raise ConfigError(f"{path}: URSA's network has no {names}; take a Qwen3 model without")
    return config


def transformer_config(
    source: Qwen3Settings, *, codebook_size: int, lm_vocab_size: int, bov_token_id: int
) -> TransformerConfig:
    """Return the configuration of URSA's network of the same shape.

    Args:
        source: The language model.
        codebook_size: Codes V.
        lm_vocab_size: Text rows kept.
        bov_token_id: Begin of video, a text id.

    Raises:
        ConfigError: If the base of the rotation is not in the file or the sizes do not fit.
    """
    theta = source.rope_theta
    if theta is None and source.rope_parameters is not None:
        theta = source.rope_parameters.rope_theta
    if theta is None:
        raise ConfigError(
            f"{CONFIG_FILE} names no rope_theta, neither at the top (transformers 4) nor in "
            "rope_parameters (transformers 5); write it, 1000000 for Qwen3"
        )
    try:
        return TransformerConfig(
            hidden_size=source.hidden_size,
            intermediate_size=source.intermediate_size,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_key_value_heads,
            num_hidden_layers=source.num_hidden_layers,
            max_window_layers=source.max_window_layers,
            rope_theta=theta,
            vocab_size=lm_vocab_size + codebook_size,
            lm_vocab_size=lm_vocab_size,
            lm_head_size=codebook_size,
            bov_token_id=bov_token_id,
            head_dim=source.head_dim,
            rms_norm_eps=source.rms_norm_eps,
        )
    except ValidationError as error:
        raise ConfigError(f"no transformer of this shape: {reasons(error)}") from error
