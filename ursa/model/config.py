"""The configuration of the network and its file; no torch, so that sizes can be planned at once."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from ursa.config import FrozenModel
from ursa.errors import ConfigError

CLASS_NAME = "URSATransformer3DModel"
"""What `_class_name` of config.json says."""
CONFIG_FILE = "config.json"
_LAYOUT_OF_DIFFUSERS = "0.35.2"
_PUBLISHED_CONSTANTS = {"head_dim": 128, "rms_norm_eps": 1e-6, "attn_implementation": None}


class TransformerConfig(FrozenModel):
    """Everything needed to build the network: the flat config.json of the published class.

    Defaults are the published ones (1.7B, FSQ320). Keys of diffusers that begin with an underscore
    are dropped when read. `max_window_layers` and `attn_implementation` are kept for the published
    class and decide nothing here: no layer has a window, attention is torch's own.

    Raises:
        pydantic.ValidationError: If the sizes do not fit together, naming both values.
    """

    hidden_size: int = Field(default=2048, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(default=6144, gt=0, description="width of the MLP")
    num_attention_heads: int = Field(default=16, gt=0)
    num_key_value_heads: int = Field(default=8, gt=0)
    num_hidden_layers: int = Field(default=28, gt=0)
    max_window_layers: int = Field(default=28, ge=0, description="unused: no layer has a window")
    rope_theta: float = Field(default=1_000_000, gt=0, description="base of the frequencies")
    vocab_size: int = Field(default=215_669, gt=0, description="rows of the embedding")
    lm_vocab_size: int = Field(default=151_669, gt=0, description="of these, rows of text")
    lm_head_size: int = Field(default=64_000, gt=0, description="codes V: the rows after them")
    bov_token_id: int = Field(default=151_652, ge=0, description="begin of video, a text id")
    head_dim: int = Field(default=128, gt=0, multiple_of=16, description="width of a head")
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    attn_implementation: str | None = Field(default=None, description="unused, kept")

    @model_validator(mode="before")
    @classmethod
    def _drop_metadata(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise ValueError(f"_class_name must be {CLASS_NAME}, got {name!r}")
        return {key: value for key, value in values.items() if not key.startswith("_")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vocab_size != self.lm_vocab_size + self.lm_head_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} must be lm_vocab_size {self.lm_vocab_size} + "
                f"lm_head_size {self.lm_head_size} = {self.lm_vocab_size + self.lm_head_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.bov_token_id >= self.lm_vocab_size:
            raise ValueError(
                f"bov_token_id {self.bov_token_id} must be a text id below lm_vocab_size "
                f"{self.lm_vocab_size}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name: what peft asks the configuration of a network for."""
        return self.model_dump()


def read_transformer_config(directory: str | Path) -> TransformerConfig:
    """Read config.json of a transformer.

    Args:
        directory: Holds config.json.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: If it is missing or refused; the message names every bad key.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"no transformer at {directory}: {CONFIG_FILE} is missing")
    try:
        return TransformerConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} refused: {reasons(error)}") from error


def config_json(config: TransformerConfig) -> str:
    """Return config.json as the published class reads it; its constants are left out.

    Args:
        config: The network.

    Returns:
        JSON text, keys sorted.
    """
    values = config.model_dump(mode="json")
    for name, constant in _PUBLISHED_CONSTANTS.items():
        if values[name] == constant:
            del values[name]
    metadata = {"_class_name": CLASS_NAME, "_diffusers_version": _LAYOUT_OF_DIFFUSERS}
    return json.dumps(metadata | values, indent=2, sort_keys=True)


def reasons(error: ValidationError) -> str:
    """Return what a refused configuration did wrong, key by key, in one line.

    Args:
        error: What pydantic raised.
    """
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors()
    )
