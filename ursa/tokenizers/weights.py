"""Reading and writing the directory of a visual autoencoder: config.json and safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ursa.errors import ConfigError
from ursa.texts import is_file_name
from ursa.tokenizers.cosmos import CosmosAutoencoder, CosmosConfig
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.ibq import ImageAutoencoder, ImageConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OFFICIAL_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = OFFICIAL_WEIGHTS_FILE + ".index.json"
_NAMED_KEYS = 3
_NOT_READ = ("_name_or_path", "_use_default_values")
"""What diffusers adds about where a file came from; it says nothing of the network."""


def write_network(
    network: FittedAutoencoder | CosmosAutoencoder | ImageAutoencoder, directory: Path
) -> None:
    """Write config.json and the weights into a directory; see `save_visual_tokenizer`.

    Args:
        network: Any of the three.
        directory: Made if missing; a network that was there is deleted first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # of a network that was here before nothing may stay
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    for old in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        old.unlink()
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    values = network.config.model_dump(mode="json", by_alias=True)
    if isinstance(network, FittedAutoencoder):
        config = json.dumps({"_class_name": "FittedAutoencoder", **values}, indent=2)
        file = directory / WEIGHTS_FILE
        save_file(weights, file)
    else:
        if not values.get("causal_attention", True):
            del values["causal_attention"]
        config = json.dumps(values, indent=2, sort_keys=True) + "\n"
        file = directory / OFFICIAL_WEIGHTS_FILE
        save_file(weights, file, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(config, "utf-8")
    # safetensors lets nobody else read its files
    file.chmod((directory / CONFIG_FILE).stat().st_mode)


def read_network(directory: Path) -> FittedAutoencoder | CosmosAutoencoder | ImageAutoencoder:
    """Read a network in the type of its file; see `load_visual_tokenizer`.

    Args:
        directory: Holds config.json and the weights.

    Returns:
        The network of the class that config.json names, on the CPU.

    Raises:
        ConfigError: If a file is missing or damaged, the configuration is refused, or the weights
            are not those of the network.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"no visual tokenizer at {directory}: {CONFIG_FILE} is missing")
    values = _read_json(path)
    try:
        network = _build(values, path)
    except ValidationError as error:
        raise ConfigError(f"{path} does not describe a visual tokenizer: {error}") from error
    weights, source = _read_weights(directory)
    _check_weights(weights, network.state_dict(), source)
    network.load_state_dict(weights, assign=True)
    return network


def _build(
    values: dict[str, Any], path: Path
) -> FittedAutoencoder | CosmosAutoencoder | ImageAutoencoder:
    values = {key: value for key, value in values.items() if key not in _NOT_READ}
    match values.get("_class_name"):
        case "AutoencoderVQCosmos3D":
            return CosmosAutoencoder(CosmosConfig.model_validate(values))
        case "AutoencoderVQ":
            return ImageAutoencoder(ImageConfig.model_validate(values))
        case "FittedAutoencoder" | "CosmosAutoencoder":  # the second is its former name
            del values["_class_name"]
            return FittedAutoencoder(FittedConfig.model_validate(values))
        case name:
            raise ConfigError(
                f"{path}: _class_name must be 'FittedAutoencoder', 'AutoencoderVQCosmos3D' or "
                f"'AutoencoderVQ', got {name!r}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of a directory, and the file that names them."""
    for name in (OFFICIAL_WEIGHTS_FILE, INDEX_FILE, WEIGHTS_FILE):
        source = directory / name
        if source.is_file():
            break
    else:
        raise ConfigError(
            f"{directory} holds no weights: expected {OFFICIAL_WEIGHTS_FILE}, {INDEX_FILE} or "
            f"{WEIGHTS_FILE}"
        )
    files = [source.name]
    if source.name == INDEX_FILE:
        shards = _read_json(source).get("weight_map")
        if not isinstance(shards, dict) or not all(map(is_file_name, shards.values())):
            raise ConfigError(f"{source}: weight_map must map keys to file names beside it")
        files = sorted(set(shards.values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            weights |= load_file(directory / name)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{directory / name} cannot be read: {error}") from error
    return weights, source


def _check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path
) -> None:
    faults = [
        f"{fault} {_some(keys)}"
        for fault, keys in (
            ("missing", [key for key in expected if key not in weights]),
            ("unexpected", [key for key in weights if key not in expected]),
            (
                "of another shape",
                [
                    f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
                    for key, value in expected.items()
                    if key in weights and weights[key].shape != value.shape
                ],
            ),
            (
                "not floating",
                [key for key in expected if key in weights and not _is_float(weights[key])],
            ),
        )
        if keys
    ]
    if faults:
        raise ConfigError(
            f"{source} does not hold the weights of the network in {CONFIG_FILE}: "
            + "; ".join(faults)
        )


def _is_float(value: Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _some(keys: list[str]) -> str:
    more = len(keys) - _NAMED_KEYS
    return ", ".join(keys[:_NAMED_KEYS]) + (f" and {more} more" if more > 0 else "")
