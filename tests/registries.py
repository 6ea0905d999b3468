"""A store of MLflow in a database, and registered models whose versions have no files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tasks import releases, tracking
from ursa.decisions import list_decisions


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(address).create_experiment(
        tracking.EXPERIMENT, artifact_location=(folder / "files").as_uri()
    )
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            environment.setenv(variable, address)  # MLflow writes both for processes to come
        yield address
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri("")


def bare_registry(address: str, name: str, root: Path) -> releases.Registry:
    """A registered model for versions without files."""
    client = MlflowClient(address, registry_uri=address)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    return releases.Registry(client, name, str(root), "a test")


def add_version(registry: releases.Registry, key: str) -> str:
    tags = {releases.WHOLE_TAG: "true", "ursa.registration_key": key, "ursa.gate_passed": "true"}
    made = registry.client.create_model_version(registry.name, "/somewhere", tags=tags)
    return str(made.version)


def champion_of(registry: releases.Registry) -> str | None:
    return releases.aliases(registry.client, registry.name).get("champion")


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def events(registry: releases.Registry) -> list[tuple[str, str, str | None]]:
    found = list_decisions(registry.root_uri, registry.name)
    return [(item.event, item.version, item.champion) for item in found]


def run_ursa(
    registry: releases.Registry, address: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command of `ursa models` on a registered model."""
    ursa = "from ursa.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", ursa, "models", *arguments, "--name", registry.name],
        env={**os.environ, "MLFLOW_TRACKING_URI": address, "URSA_DATA_URI": registry.root_uri},
        capture_output=True,
        text=True,
        timeout=120,
    )
