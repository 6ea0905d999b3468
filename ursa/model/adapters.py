"""Adapters of low rank on the layers of a network, by the library peft, and how they are merged.

A chosen matrix W becomes W + (alpha / rank) B A with A random and B zero, so that nothing changes
before training; W stays as it is. Only this module imports peft, when it is needed.

References:
    LoRA: arXiv 2106.09685. The directory of an adapter is the one that peft writes and reads.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ursa.config import LoraConfig
from ursa.errors import ConfigError
from ursa.model.pretrained import load_transformer, save_transformer
from ursa.model.transformer import UrsaTransformer

if TYPE_CHECKING:
    import peft

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
TRANSFORMER_FOLDER = "transformer"
_NAME = "default"
"""What peft calls an adapter that nobody has named; files leave it out."""
_PREFIX = "base_model.model."
"""Of all names in a file of peft."""


class SeededDropout(nn.Module):
    """Dropout whose masks follow from seeds that are given, one a sample: no generator's state."""

    def __init__(self, probability: float) -> None:
        """Nothing is drawn yet.

        Args:
            probability: Share of the values that is set to 0, in [0, 1).
        """
        super().__init__()
        self.probability = probability
        self.seeds: Sequence[int] = ()

    # generators of torch cannot be compiled, and seeds change every step
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, values: Tensor) -> Tensor:
        """Set values to 0 at random and scale the others up; in evaluation mode change nothing.

        Args:
            values: Shape (B, ...), B as many as there are seeds.
        """
        if not self.training:
            return values
        keep = torch.stack(
            [
                torch.rand(values.shape[1:], generator=torch.Generator().manual_seed(seed))
                >= self.probability
                for seed in self.seeds
            ]
        )
        return values * keep.to(values.device) / (1 - self.probability)


def check_peft(where: str) -> None:
    """Refuse to begin without peft.

    Args:
        where: What needs it, for the error.

    Raises:
        ConfigError: If it is not installed; names the extra.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            f"{where} needs peft, which is not installed; install the extra: "
            "pip install 'ursa-pipeline[lora]'"
        )


def add_adapters(
    model: UrsaTransformer, config: LoraConfig, *, seed: int, where: str = "LoRA"
) -> None:
    """Put adapters on a network, in place; what is not to be trained needs no gradient any more.

    Args:
        model: The network; its outputs stay the same to the bit.
        config: Rank and places.
        seed: Decides the matrices A.
        where: Key of the configuration, for errors.

    Raises:
        ConfigError: If peft is not installed.
    """
    check_peft(where)
    import peft  # noqa: PLC0415  (an extra)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # what is trained whole stays in its place: the loss reads the head
        peft.inject_adapter_in_model(_peft_config(config, whole_modules=()), model)
    for name, place in {"lm_head": model.lm_head, "embed_tokens": model.model.embed_tokens}.items():
        place.weight.requires_grad_(name in config.whole_modules)
    if config.dropout:
        for name, part in model.named_modules():
            if name.endswith(".lora_dropout"):
                assert isinstance(part, nn.ModuleDict)
                # peft's own draws from the global generator
                part[_NAME] = SeededDropout(config.dropout)


def dropouts(model: nn.Module) -> dict[str, SeededDropout]:
    """Return the dropouts of the adapters by name.

    Args:
        model: The network.
    """
    return {name: part for name, part in model.named_modules() if isinstance(part, SeededDropout)}


def merged_weights(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the weights of a plain network that computes what one with adapters does.

    Args:
        state: `state_dict` of a network with adapters. The matrices are changed in place.
        config: What the adapters were made with.

    Returns:
        Tensors by the names of `UrsaTransformer`, W + (alpha / rank) B A where there was an
        adapter, the others as they are.
    """
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        place = name.removesuffix(".base_layer.weight")
        if place == name:
            merged[name] = value
            continue
        a, b = (state[f"{place}.lora_{part}.{_NAME}.weight"] for part in "AB")
        merged[f"{place}.weight"] = value.add_(b @ a, alpha=config.alpha / config.rank)
    return merged


def save_adapter(
    state: Mapping[str, Tensor], config: LoraConfig, directory: Path, *, base: str | None
) -> None:
    """Write an adapter as peft does: adapter_model.safetensors, then adapter_config.json.

    Args:
        state: What was trained, by the names of a network with adapters.
        config: What the adapters were made with.
        directory: Made if it does not exist.
        base: Address of the weights that the adapter belongs to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PREFIX + name.replace(f".{_NAME}.", "."): value.contiguous()
        for name, value in state.items()
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    values = _peft_config(config, base=base, whole_modules=config.whole_modules).to_dict()
    values["inference_mode"] = True
    # peft keeps names in sets, whose order changes from process to process
    plain = {name: sorted(v) if isinstance(v, set) else v for name, v in values.items()}
    text = json.dumps(plain, indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG_FILE).write_text(text + "\n", "utf-8")


def merge_adapter(model: Path, adapter: Path, out: Path) -> None:
    """Write a copy of a model directory whose transformer has an adapter merged into its weights.

    Any adapter that peft can merge will do. Sums are made in float32; the weights keep their type.

    Args:
        model: A model directory, or its `transformer/` alone.
        adapter: Holds adapter_config.json and adapter_model.safetensors.
        out: The new directory; it must not exist. It appears when it is whole.

    Raises:
        ConfigError: If peft is not installed, `out` exists, there is no adapter or model, or the
            adapter does not fit the network.
    """
    check_peft("ursa merge")
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        if not (adapter / name).is_file():
            raise ConfigError(f"no adapter at {adapter}: {name} is missing")
    if out.exists():
        raise ConfigError(f"{out} exists; name a directory that does not")
    inside = (model / TRANSFORMER_FOLDER).is_dir()
    source = model / TRANSFORMER_FOLDER if inside else model
    network = load_transformer(source)
    dtype = network.lm_head.weight.dtype
    merged = _merged(network.float(), adapter).to(dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=out.parent) as scratch:
        folder = Path(scratch) / "model"
        # an adapter beside the old weights has no place beside the new ones
        left_out = (TRANSFORMER_FOLDER, "adapter") if inside else ("*",)
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*left_out))
        save_transformer(merged, folder / TRANSFORMER_FOLDER if inside else folder)
        folder.replace(out)


def _merged(network: UrsaTransformer, adapter: Path) -> UrsaTransformer:
    import peft  # noqa: PLC0415  (an extra)

    matrices = {
        name.rpartition(".")[2]
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear)
    }
    try:
        with_adapter = peft.PeftModel.from_pretrained(network, str(adapter))
        result = with_adapter.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise ConfigError(
            f"the adapter at {adapter} cannot be merged: {' '.join(map(str.strip, lines[:3]))}; "
            f"the matrices of the network are {', '.join(sorted(matrices))}"
        ) from error
    assert isinstance(result, UrsaTransformer)
    return result


def _peft_config(
    config: LoraConfig, *, whole_modules: Sequence[str], base: str | None = None
) -> "peft.LoraConfig":
    import peft  # noqa: PLC0415  (an extra)

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        modules_to_save=list(whole_modules) or None,
        base_model_name_or_path=base,
    )
