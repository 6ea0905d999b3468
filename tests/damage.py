"""Models that somebody has spoilt."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ursa import storage
from ursa.artifacts import ExportedModel
from ursa.config import fingerprint


def noisy_model(
    model: ExportedModel, folder: Path, *, scale: float, part: str = "transformer"
) -> ExportedModel:
    """Copy a model and add noise of a standard deviation to the weights of a part."""
    shutil.copytree(storage.local_path(model.directory_uri), folder)
    generator = torch.Generator().manual_seed(0)
    for path in sorted((folder / part).glob("*.safetensors")):
        weights = {
            name: value + scale * torch.randn(value.shape, generator=generator)
            for name, value in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): storage.sha256_file(path) for path in files}
    return model.model_copy(
        update={
            "directory_uri": str(folder),
            "sha256": hashes,
            "fingerprint": fingerprint(model.fingerprint, part, str(scale)),
        }
    )
