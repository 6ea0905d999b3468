"""Networks of transformers as the scorers take them: on one device, deterministic, no pickle.

Pictures are prepared with Pillow on every machine: torchvision resizes a little differently, and
scores would depend on whether it is installed. The frames of one clip are one batch, so what is
said of a clip does not depend on the clips beside it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ursa.annotation.models import loading_errors, model_directory
from ursa.config import ModelFilesConfig
from ursa.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def choose_device(name: Device, where: str = "annotation.device") -> torch.device:
    """Return where networks run.

    Args:
        name: "auto" takes a GPU if there is one.
        where: What sets it, for the error.

    Raises:
        ConfigError: If "cuda" is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(f"{where} is 'cuda' but no GPU is found; use 'auto' or 'cpu'")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


@contextlib.contextmanager
def model_files(where: str, config: ModelFilesConfig) -> Iterator[Path]:
    """Yield the directory of a model while it is loaded; what goes wrong is one error.

    Args:
        where: Key of the configuration, for errors.
        config: The model.

    Yields:
        The directory.

    Raises:
        ConfigError: If there is no such model, or what transformers finds in it does not fit.
        StorageError: If the store refuses or does not answer.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with model_directory(where, config) as folder, loading_errors(where, config):
        yield folder


def load_model(
    kind: Any, where: str, folder: Path, config: ModelFilesConfig, device: torch.device
) -> Any:
    """Load the weights of a model.

    Args:
        kind: A class of transformers, such as `AutoModel`.
        where: Key of the configuration, for errors.
        folder: The directory of the model.
        config: Holds the dtype.
        device: Where it runs.

    Returns:
        The model, ready to use.

    Raises:
        ConfigError: If weights that the model needs are not in the files.
    """
    model, report = kind.from_pretrained(
        folder,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:  # they would be drawn at random
        named = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"{where}: {config.model!r} lacks {len(report['missing_keys'])} weights of a "
            f"{type(model).__name__} ({named}); it is a model of another kind"
        )
    return model.to(device).eval()


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Load a processor, image processor or text tokenizer of a model.

    Args:
        kind: A class of transformers, such as `AutoImageProcessor`.
        folder: The directory of the model.
        **options: More for `from_pretrained`.
    """
    return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


def pixels(processor: Any, frames: np.ndarray, model: Any) -> Tensor:
    """Return frames as a model takes them.

    Args:
        processor: Its image processor.
        frames: RGB, shape (T, H, W, 3), uint8.
        model: The model.

    Returns:
        Shape (T, 3, h, w), of the model's dtype, on its device.
    """
    prepared: Tensor = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    return prepared.to(model.device, model.dtype)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Run a block without gradients, and twice the same on one device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
