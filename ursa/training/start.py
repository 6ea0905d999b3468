"""Weights that a stage starts from, given as a directory: a model of ours or a Qwen3 model."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ursa import storage
from ursa.artifacts import StageRequest
from ursa.config import StageConfig
from ursa.errors import ConfigError
from ursa.model.config import CONFIG_FILE, TransformerConfig
from ursa.model.pretrained import init_from_qwen3, load_transformer
from ursa.model.transformer import UrsaTransformer
from ursa.tokenizers.text import TOKENIZER_FILE, load_text_tokenizer
from ursa.tokenizers.visual import load_visual_tokenizer

_SETTINGS = {
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_key_value_heads",
    "head_dim": "model.head_dim",
    "rope_theta": "model.rope_theta",
    "rms_norm_eps": "model.rms_norm_eps",
    "lm_vocab_size": "text_tokenizer.directory_uri",
    "bov_token_id": "text_tokenizer.directory_uri",
    "lm_head_size": "visual_tokenizer.directory_uri",
}
"""What decides a value of the network's configuration."""
_NEW_ROWS = ("embed_tokens", "lm_head")
"""Modules whose rows of codes a language model does not have."""


def load_start(
    uri: str, request: StageRequest, config: TransformerConfig, codes: Tensor
) -> UrsaTransformer:
    """Return the network of a directory, for the tokenizers of a run.

    Of a model directory (`UrsaPipeline.save_pretrained`, or its `transformer/` alone) all weights
    are taken. Of a Qwen3 language model the layers and the text rows are; rows of the codes and
    the head are made as `ursa.model.pretrained.init_from_qwen3` says.

    Args:
        uri: The directory, local or on S3; what is in it must not change.
        request: The stage: its tokenizers and the seed of new rows.
        config: The network of the run.
        codes: Code embeddings, shape (V, D).

    Returns:
        The network on the CPU, in float32, in training mode.

    Raises:
        ConfigError: If there are no weights, or they are of another shape or of other tokenizers
            than the run's, or new rows of a language model would stay as they are beside adapters.
        StorageError: If the store refuses or does not answer.
    """
    try:
        with storage.local_directory(uri) as folder:
            root = folder / "transformer" if (folder / "transformer").is_dir() else folder
            _check_tokenizers(uri, folder, request)
            if _is_language_model(uri, root):
                _check_new_rows(uri, request)
                model = init_from_qwen3(
                    root,
                    codebook_size=config.lm_head_size,
                    codebook=codes,
                    seed=request.config.seed,
                    lm_vocab_size=config.lm_vocab_size,
                    bov_token_id=config.bov_token_id,
                    dtype=torch.float32,
                )
            else:
                model = load_transformer(root, dtype=torch.float32)
    except FileNotFoundError as error:
        raise ConfigError(f"{_key(request)}: there is nothing at {uri}") from error
    differences = [
        f"{name} {getattr(model.config, name)} where {key} gives {getattr(config, name)}"
        for name, key in _SETTINGS.items()
        if getattr(model.config, name) != getattr(config, name)
    ]
    if differences:
        raise ConfigError(
            f"{_key(request)}: the weights at {uri} do not fit the network of this run: "
            f"{'; '.join(differences)}; change these settings to what the weights have"
        )
    return model.train()


def _key(request: StageRequest) -> str:
    return f"stages.{request.stage}.init_from"


def _is_language_model(uri: str, root: Path) -> bool:
    path = root / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"no weights at {uri}: expected transformer/{CONFIG_FILE} (a model directory) or "
            f"{CONFIG_FILE} (a transformer or a Qwen3 language model)"
        )
    try:
        # transformers names a model's type, diffusers its class
        return "model_type" in json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _check_new_rows(uri: str, request: StageRequest) -> None:
    """Refuse adapters alone on a language model: it knows no code, and nothing would teach it."""
    stage: StageConfig = getattr(request.config.stages, request.stage)
    if stage.lora is not None and len(stage.lora.whole_modules) < len(_NEW_ROWS):
        raise ConfigError(
            f"stages.{request.stage}.lora: {uri} is a language model, so rows of the codes and the "
            "head begin at random and adapters would leave them so; set "
            f"stages.{request.stage}.lora.whole_modules to [{', '.join(_NEW_ROWS)}], or take a "
            "model that was trained on codes"
        )


def _check_tokenizers(uri: str, folder: Path, request: StageRequest) -> None:
    """Refuse weights that were trained on other ids, where the directory tells."""
    places = [folder / "tokenizer", folder]
    text = next((place for place in places if (place / TOKENIZER_FILE).is_file()), None)
    if text is not None:
        with storage.local_directory(request.text_tokenizer.directory_uri) as ours:
            known, used = (load_text_tokenizer(place).vocabulary() for place in (text, ours))
        if known != used:
            raise ConfigError(
                f"{_key(request)}: the text tokenizer of {uri} has other ids than that of this "
                f"run; set text_tokenizer.directory_uri to {_below(uri, folder, text)}"
            )
    visual = folder / "vae"
    if visual.is_dir():
        with storage.local_directory(request.visual_tokenizer.directory_uri) as ours:
            one, other = (
                load_visual_tokenizer(place).network.state_dict() for place in (visual, ours)
            )
        if one.keys() != other.keys() or any(
            not torch.equal(value, other[name]) for name, value in one.items()
        ):
            raise ConfigError(
                f"{_key(request)}: the visual tokenizer of {uri} gives other codes than that of "
                f"this run; set visual_tokenizer.directory_uri to {_below(uri, folder, visual)}"
            )


def _below(uri: str, folder: Path, place: Path) -> str:
    return uri if place == folder else storage.join(uri, place.name)
