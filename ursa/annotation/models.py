"""Model files of scorers: found, checked and hashed before work begins, loaded where it is done.

A model is a directory (local or on S3) or a commit on the Hugging Face Hub. Only safetensors and
text files are taken: no pickle, and no code that comes with a model is run.
"""

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ursa import storage
from ursa.config import ModelFilesConfig, fingerprint
from ursa.errors import ConfigError, UrsaError

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Files of a model that matter; others (pickles, pictures, notes) are passed over."""
Sha256 = Callable[[Path], str]


def require_packages(extra: str, where: str, least: Mapping[str, tuple[int, int]]) -> None:
    """Refuse to begin without the packages of an extra.

    Args:
        extra: The extra that brings them.
        where: Key of the configuration, for errors.
        least: Oldest version that will do, by package.

    Raises:
        ConfigError: If one is not installed or too old.
    """
    for name, version in least.items():
        try:
            found = package_version(name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not found or tuple(map(int, re.findall(r"\d+", found)[:2])) < version:
            wanted = ".".join(map(str, version))
            raise ConfigError(
                f"{where} needs {name} {wanted} or later, {found or 'nothing'} is installed; "
                f"install the extra: pip install 'ursa-pipeline[{extra}]'"
            )


def package_version(name: str) -> str:
    """Return the version of an installed package, which may decide a result.

    Args:
        name: The package.
    """
    return importlib.metadata.version(name)


def model_name(config: ModelFilesConfig, digest: str) -> str:
    """Return what is written where a model is named.

    Args:
        config: The model.
        digest: Result of `model_digest`.

    Returns:
        Such as `org/name@0123456789ab`; of a directory its last segment and the hash of its files.
    """
    if config.revision is not None:
        return f"{config.model}@{config.revision[:12]}"
    return f"{config.model.rstrip('/').rpartition('/')[2]}@{digest[:12]}"


def model_digest(where: str, config: ModelFilesConfig, sha256: Sha256) -> str:
    """Return a hash of the files of a model, wherever they lie.

    Args:
        where: Key of the configuration, for errors.
        config: The model.
        sha256: Hashes a local file.

    Returns:
        64 hexadecimal digits: of the names and contents of a directory, of the etags of objects on
        S3, or of name and commit on the Hub.

    Raises:
        ConfigError: If there is no such model, or none that can be loaded safely.
        StorageError: If the store refuses or does not answer.
    """
    if config.revision is not None:
        with model_directory(where, config):  # fetched now, and not in the middle of the work
            return fingerprint("hub", config.model, config.revision)
    if storage.is_remote(config.model):
        prefix = config.model.rstrip("/") + "/"
        try:
            found = storage.list_files(config.model)
        except FileNotFoundError:
            found = []
        names = [item.uri.removeprefix(prefix) for item in found]
        _check_names(where, config.model, names)
        return fingerprint(
            "model",
            [
                [name, item.num_bytes, item.etag]
                for name, item in zip(names, found, strict=True)
                if name.endswith(SUFFIXES)
            ],
        )
    with model_directory(where, config) as folder:
        return fingerprint(
            "model",
            [
                [path.relative_to(folder).as_posix(), sha256(path)]
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.name.endswith(SUFFIXES)
            ],
        )


@contextlib.contextmanager
def model_directory(where: str, config: ModelFilesConfig) -> Iterator[Path]:
    """Yield a local directory with the files of a model.

    Args:
        where: Key of the configuration, for errors.
        config: The model.

    Yields:
        The directory; it must not be written to.

    Raises:
        ConfigError: If there is no such model, or none that can be loaded safely.
        StorageError: If the store refuses or does not answer.
    """
    if config.revision is not None:
        folder = _from_hub(where, config.model, config.revision)
        _check_names(where, config.model, [path.name for path in folder.iterdir()])
        yield folder
        return
    try:
        with storage.local_directory(config.model) as folder:
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            _check_names(where, config.model, names)
            yield folder
    except FileNotFoundError as error:
        raise _no_model(where, config.model) from error


def read_config(where: str, config: ModelFilesConfig) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        where: Key of the configuration, for errors.
        config: The model.

    Raises:
        ConfigError: If there is none that can be read.
        StorageError: If the store refuses or does not answer.
    """
    try:
        if config.revision is None:
            data = storage.read_bytes(storage.join(config.model, "config.json"))
        else:
            data = (_from_hub(where, config.model, config.revision) / "config.json").read_bytes()
        values = json.loads(data)
    except FileNotFoundError as error:
        raise _no_model(where, config.model) from error
    except UrsaError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: config.json of {config.model!r} is no JSON") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: config.json of {config.model!r} holds no object")
    return values


def label_places(where: str, id2label: Mapping[Any, Any], labels: Sequence[str]) -> list[int]:
    """Return the outputs of a classifier that bear the labels.

    Args:
        where: Key of the configuration, for errors.
        id2label: Names of the outputs by their numbers, as in config.json.
        labels: Names to look for, in any case.

    Raises:
        ConfigError: If there is no such label; names those that there are.
    """
    known = {str(name).lower(): int(place) for place, name in id2label.items()}
    unknown = [label for label in labels if label.lower() not in known]
    if unknown:
        raise ConfigError(
            f"{where}.labels: the model has no label {unknown[0]!r}; it has "
            f"{', '.join(sorted(map(str, id2label.values()))[:20])}"
        )
    return sorted({known[label.lower()] for label in labels})


@contextlib.contextmanager
def loading_errors(where: str, config: ModelFilesConfig) -> Iterator[None]:
    """Turn what transformers raises about files that do not fit into one error.

    Args:
        where: Key of the configuration, for errors.
        config: The model.

    Raises:
        ConfigError: If the block raises an error of another kind than ours.
    """
    try:
        yield
    except UrsaError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{where}: {config.model!r} cannot be loaded ({(lines or [type(error).__name__])[0]})"
        ) from error


def _from_hub(where: str, name: str, revision: str) -> Path:
    import huggingface_hub  # noqa: PLC0415  (only where a model of the Hub is named)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        # without a network it takes what its cache holds
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (OSError, HfHubHTTPError, HFValidationError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: {name!r} at commit {revision[:12]} is neither in the cache of the Hub nor "
            f"can it be fetched ({type(error).__name__}); give the directory of a model instead"
        ) from error


def _check_names(where: str, model: str, names: list[str]) -> None:
    if "config.json" not in names:
        raise _no_model(where, model)
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{where}: {model!r} holds no .safetensors file; weights in other formats (pickle) are "
            "not loaded, save them as safetensors first"
        )


def _no_model(where: str, model: str) -> ConfigError:
    return ConfigError(
        f"{where}: no model at {model!r} (a directory with config.json); give the directory of a "
        "model, or for one of the Hugging Face Hub `revision`, its commit"
    )
