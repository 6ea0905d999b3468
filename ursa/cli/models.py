"""What `--model` and `--device` name."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ursa.errors import ConfigError
from ursa.texts import secret_of_address

_REGISTRY_PREFIX = "models:/"
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*):/{1,2}(?!/)(\S+)")
"""Also with one slash, as a path leaves it."""


@contextmanager
def model_directory(model: str) -> Iterator[Path]:
    """Yield a local model directory; a registry URI is downloaded with the mlflow command.

    Args:
        model: A directory or hub name, which is yielded as it is, or models:/NAME@ALIAS.

    Yields:
        The directory; that of a downloaded model is removed afterwards.

    Raises:
        ConfigError: If the registry does not answer or holds no such model.
    """
    if not model.startswith(_REGISTRY_PREFIX):
        yield Path(model)
        return
    name = model.removeprefix(_REGISTRY_PREFIX)
    if "@" not in name and "/" not in name:
        raise ConfigError(
            f"{model} names no version: give {model}@champion, {model}@challenger or {model}/1"
        )
    tracking_uri = registry_uri()
    check_answers(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="ursa-model-") as folder:
        # the library knows no tracker: the command line of MLflow does the talking
        command = [sys.executable, "-m", "mlflow", "artifacts", "download"]
        command += ["--artifact-uri", model, "--dst-path", folder]
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ConfigError(
                f"{model} cannot be had from {tracking_uri}: {last.partition(': ')[2] or last}; "
                "its models, versions and aliases are on the page /#/models there"
            )
        found = sorted(Path(folder).rglob("model_index.json"))
        if not found:
            raise ConfigError(f"{model} holds no ursa model (model_index.json is missing)")
        yield found[0].parent


def check_place(model: str) -> None:
    """Refuse a model that can be nowhere, before the slow imports.

    Args:
        model: A directory, a name on the hub such as BAAI/URSA-1.7B-FSQ320, or a URI.

    Raises:
        ConfigError: If it is neither.
    """
    is_hub_name = model.count("/") == 1 and not model.startswith(("/", ".", "~"))
    if ":/" not in model and not is_hub_name and not Path(model).is_dir():
        raise ConfigError(
            f"no model at {model}: there is no such directory; give a model directory, "
            "the folder of a checkpoint, a name of the hub such as BAAI/URSA-1.7B-FSQ320, or "
            "models:/NAME@ALIAS"
        )


def registry_uri() -> str:
    """Return the address of the tracking server: what is set, else what `make up` starts."""
    given = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("URSA_MLFLOW_TRACKING_URI")
    address = given or f"http://127.0.0.1:{os.environ.get('URSA_MLFLOW_PORT') or 5000}"
    return without_secret(address, "of MLflow")


def without_secret(address: str, which: str) -> str:
    """Return an address; one that must not be shown is refused.

    Addresses go into messages, records and command lines.

    Args:
        address: Any URI or path.
        which: Says which address it is, such as "of MLflow".

    Raises:
        ConfigError: If it holds a user, a password, a signature or a token; does not show it.
    """
    if found := secret_of_address(address):
        raise ConfigError(
            f"the address {which} holds {found}; give it without, secrets have variables of "
            "their own (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME, "
            "MLFLOW_TRACKING_PASSWORD, PREFECT_API_AUTH_STRING)"
        )
    return address


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuse a command line with an address that must not be shown, before anything reads it.

    A path that was made of such an address looks like one no more, and would be shown. What holds
    spaces is a text, such as a prompt or a reason.

    Args:
        arguments: What stands after `ursa`.

    Raises:
        ConfigError: If one holds a user, a password, a signature or a token; does not show it.
    """
    for number, argument in enumerate(arguments, 1):
        if re.search(r"\s", argument):
            continue
        for scheme, rest in _ADDRESS.findall(argument):
            if f"{scheme}:/" == _REGISTRY_PREFIX:  # what stands before @ is a model
                continue
            without_secret(f"{scheme}://{rest}", f"in argument {number}")


def prefect_uri() -> str:
    """Return the address of the Prefect server, without "/api": what is set, else as above."""
    port = os.environ.get("URSA_PREFECT_PORT") or 4200
    api_url = os.environ.get("PREFECT_API_URL") or f"http://127.0.0.1:{port}/api"
    return without_secret(api_url.rstrip("/").removesuffix("/api"), "of Prefect")


def check_answers(uri: str, *, name: str = "MLflow", variable: str = "MLFLOW_TRACKING_URI") -> None:
    """Make sure that something listens there: MLflow itself would try for minutes.

    Args:
        uri: Address of the server; only http and https are asked.
        name: What it is called.
        variable: Environment variable that sets its address.

    Raises:
        ConfigError: If nothing does.
    """
    import socket
    from urllib.parse import urlsplit

    address = urlsplit(uri)
    if address.scheme not in {"http", "https"}:
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
    except ValueError:  # it may be a part of a password
        raise ConfigError(
            f"the address of the {name} server has no valid port; expected http://host:port in "
            f"{variable}, with %2F, %23 and %3F for / # ? in a password"
        ) from None
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"no {name} server answers at {uri} ({error}); start the services with `make up`, "
            f"or set {variable} to the address of yours"
        ) from error


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Args:
        device: Such as cpu or cuda:0.

    Raises:
        ConfigError: If it cannot; it names the device.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used: {first}; try cpu") from error
