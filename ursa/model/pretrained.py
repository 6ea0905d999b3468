"""Weights on disk: the published directory of a transformer, and Qwen3 models to start from.

A directory holds `config.json` and the weights as safetensors, in one file or in shards with an
index, under the names of the published class. Nothing is unpickled.

Dimensions: V = codes, D = width of a code.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ursa.errors import ConfigError
from ursa.model.config import CONFIG_FILE, config_json, read_transformer_config
from ursa.model.qwen3 import read_qwen3_config, transformer_config
from ursa.model.transformer import HEAD_RANGE, UrsaTransformer, fourier_features
from ursa.texts import is_file_name

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_ONE_FILE = (WEIGHTS_FILE, "model.safetensors")
_INDEX_SUFFIX = ".safetensors.index.json"
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?$"
)
_PICKLES = {".bin", ".pth", ".pt", ".ckpt"}
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_NAMED_AT_MOST = 4


def load_transformer(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> UrsaTransformer:
    """Read a transformer, ours or a published one, in evaluation mode.

    The network is built without memory and takes the tensors over one by one, so that no more than
    the weights and one tensor are held at a time.

    Args:
        directory: Holds config.json and diffusion_pytorch_model.safetensors, model.safetensors or
            the shards of one `*.safetensors.index.json`.
        dtype: Type of the weights; None keeps that of the file.
        device: Where the weights go.

    Returns:
        The network, on `device`.

    Raises:
        ConfigError: If a file is missing, damaged, pickled or ambiguous, or a tensor is missing,
            unexpected or of another shape.
    """
    root = Path(directory)
    config = read_transformer_config(root)
    with torch.device("meta"):
        model = UrsaTransformer(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = _read_tensors(root, _weight_files(root), shapes, dtype=dtype, device=device)
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_transformer(
    model: UrsaTransformer, directory: str | Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write config.json and the weights so that the published class reads them too.

    All files are written beside their place first; then config.json is taken away, the weights
    change and the new config.json comes last: a directory without it is no model, and one with it
    is whole. The published class always has heads of 128 and an epsilon of 1e-6: it reads a
    configuration with other values, which are then in config.json, but not rightly.

    Args:
        model: The network, in any floating type.
        directory: Made if it does not exist; weights in it are replaced.
        max_shard_bytes: Larger weights are split into files of at most so much, except for a
            single tensor that is larger.

    Raises:
        ConfigError: If `max_shard_bytes` is not positive.
    """
    if max_shard_bytes <= 0:
        raise ConfigError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=root) as scratch:
        _write_weights(model, Path(scratch), max_shard_bytes)
        config = Path(scratch) / CONFIG_FILE
        config.write_text(config_json(model.config), "utf-8")
        (root / CONFIG_FILE).unlink(missing_ok=True)
        for old in list(root.iterdir()):
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
        for new in sorted(Path(scratch).iterdir()):
            if new != config:
                new.chmod(config.stat().st_mode)  # safetensors lets nobody else read its files
                new.replace(root / new.name)
        config.replace(root / CONFIG_FILE)


def init_from_qwen3(
    directory: str | Path,
    *,
    codebook_size: int,
    codebook: Tensor | None = None,
    seed: int,
    lm_vocab_size: int = 151_669,
    bov_token_id: int = 151_652,
    dtype: torch.dtype | None = None,
) -> UrsaTransformer:
    """Start from a Qwen3 language model: its layers and text rows, new rows for the codes.

    The head of the language model, tied or not, predicts text and is left behind. A row of a code
    is mean + std * f, mean and std those of each column over the text rows and f random Fourier
    features of the codebook (near codes start near), or independent normal numbers without one;
    rows of the head are 0.02 * f. See docs/decisions/0008.

    Args:
        directory: What transformers writes: config.json and safetensors, one file or shards.
        codebook_size: Codes V.
        codebook: Code embeddings, shape (V, D), or None.
        seed: Seed of the new rows, which depend on nothing else but codebook and text rows.
        lm_vocab_size: Text rows kept; the published language model has 151,936 rows, its tokenizer
            151,669 ids.
        bov_token_id: Begin of video; `<|vision_start|>` of the Qwen tokenizer.
        dtype: Type of the weights; None keeps that of the file.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        ConfigError: If it is no Qwen3 directory, uses what URSA has not (bias, windows, scaled
            rotations), has fewer rows than `lm_vocab_size`, or the codebook does not fit.
    """
    if codebook is not None and (codebook.dim() != 2 or len(codebook) != codebook_size):
        raise ConfigError(
            f"codebook must have shape ({codebook_size}, D) as codebook_size says, got "
            f"{tuple(codebook.shape)}"
        )
    root = Path(directory)
    source = read_qwen3_config(root)
    if source.vocab_size < lm_vocab_size:
        raise ConfigError(
            f"{root}: vocab_size {source.vocab_size} is below lm_vocab_size {lm_vocab_size}; give "
            "the number of ids of its tokenizer as lm_vocab_size"
        )
    config = transformer_config(
        source,
        codebook_size=codebook_size,
        lm_vocab_size=lm_vocab_size,
        bov_token_id=bov_token_id,
    )
    with torch.device("meta"):
        model = UrsaTransformer(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    del shapes[_HEAD]
    shapes[_EMBEDDING] = (source.vocab_size, config.hidden_size)
    files = _weight_files(root)
    files.pop(_HEAD, None)
    state = _read_tensors(root, files, shapes, dtype=dtype, device="cpu")
    text = state[_EMBEDDING][:lm_vocab_size]
    std, mean = torch.std_mean(text, dim=0)
    shape = (codebook_size, config.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if codebook is None:
            rows, head = torch.randn(shape), torch.randn(shape)
        else:
            rows = head = fourier_features(codebook, config.hidden_size)
    visual = mean.float() + std.float() * rows
    state[_EMBEDDING] = torch.cat([text, visual.to(text.dtype)])
    state[_HEAD] = (HEAD_RANGE * head).to(text.dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _weight_files(root: Path) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name."""
    found = [root / name for name in _ONE_FILE if (root / name).is_file()]
    found += sorted(root.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{root} holds more than one set of weights ({names}); keep one of them")
    if not found:
        pickles = sorted(path.name for path in root.iterdir() if path.suffix in _PICKLES)
        hint = (
            f"{pickles[0]} is a pickle, which can run code and is not read; convert it with "
            f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), "
            f"{WEIGHTS_FILE!r})"
            if pickles
            else f"expected {WEIGHTS_FILE}, model.safetensors or *{_INDEX_SUFFIX}"
        )
        raise ConfigError(f"no weights at {root}: {hint}")
    if not found[0].name.endswith(_INDEX_SUFFIX):
        with _open(found[0]) as file:
            return dict.fromkeys(file.keys(), found[0])
    try:
        weight_map = json.loads(found[0].read_text("utf-8"))["weight_map"]
        places = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{found[0]} is no index of shards: weight_map is missing") from error
    outside = [place for place in places.values() if not is_file_name(place)]
    if outside:
        text = str(outside[0])[:200]
        raise ConfigError(f"{found[0]}: shards must stand beside the index, got {text!r}")
    return {str(name): root / place for name, place in places.items()}


def _read_tensors(
    root: Path,
    files: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """Read exactly the tensors of `shapes`, file by file, and check them."""
    problems = [
        f"{kind}: {', '.join(names[:_NAMED_AT_MOST])}"
        + (f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else "")
        for kind, names in (
            ("missing", sorted(shapes.keys() - files.keys())),
            ("unexpected", sorted(files.keys() - shapes.keys())),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"the weights at {root} do not fit {CONFIG_FILE} beside them; {'; '.join(problems)}"
        )
    state: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        with _open(path) as file:
            held = set(file.keys())
            for name in (name for name, place in files.items() if place == path):
                if name not in held:
                    raise ConfigError(f"{path} lacks {name}, which the index places there")
                value = file.get_tensor(name)
                if tuple(value.shape) != shapes[name] or not value.is_floating_point():
                    raise ConfigError(
                        f"{path}: {name} must be floating point of shape {shapes[name]}, got "
                        f"{value.dtype} {tuple(value.shape)}"
                    )
                # a copy: what the file maps must not change under the model's feet
                state[name] = value.to(device=device, dtype=dtype or value.dtype, copy=True)
    return state


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} is missing or damaged: {error}") from error


def _write_weights(model: UrsaTransformer, folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, value in model.state_dict().items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value.contiguous()
        size += value.nbytes
        total += value.nbytes
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    names = [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / f"{stem}{_INDEX_SUFFIX}").write_text(text, "utf-8")
