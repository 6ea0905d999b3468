"""When a retraining trains, and what it goes on from, with a real registry and real files."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tasks.context import SourceListing, list_source
from tasks.options import ConfigOverrides
from tasks.retraining import NETWORK_TAG, NewData, look_for_new_data
from tasks.settings import RuntimeSettings
from tests import media
from ursa import storage
from ursa.config import load_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow warns about its own imports


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "URSA_MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, address)
    monkeypatch.setenv("URSA_DATA_URI", str(tmp_path / "data"))
    return MlflowClient(address)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        add(folder, name)
    return folder


def add(folder: Path, name: str) -> Path:
    frames = media.panning(12, step=2, height=48, width=64, seed=ord(name))
    return media.save_video(folder / f"{name}.mp4", frames, 12.0)


def register(client: MlflowClient, source: Path, **tags: str) -> str:
    """Register a version of what is at the source now; return its number."""
    settings = RuntimeSettings.from_env()
    listing: SourceListing = list_source(str(source), load_config("tiny"), settings)
    storage.commit_record(listing.manifest_uri, listing)
    if not client.search_registered_models():
        client.create_registered_model("ursa")
    values = {
        "ursa.aliased": "true",
        "ursa.source_fingerprint": listing.fingerprint,
        "ursa.model_directory": "/models/one",
        "ursa.tokens": "/tokens/one.json",
        NETWORK_TAG: "n",
        **tags,
    }
    version = client.create_model_version("ursa", "/models/one", tags=values)
    return str(version.version)


def look(source: Path, **retraining: Any) -> NewData:
    overrides = ConfigOverrides.model_validate({"retraining": retraining}) if retraining else None
    found: NewData = look_for_new_data.fn(str(source), "tiny", overrides)
    return found


def test_without_a_version_all_stages_are_trained(client, source):
    assert look(source) == NewData()


def test_the_same_files_are_nothing_new(client, source):
    register(client, source)
    assert look(source).refusal == f"no new data at {source}"


def test_content_counts_not_names(client, source):
    register(client, source)
    (source / "a.mp4").rename(source / "z.mp4")
    assert look(source).refusal.startswith(
        f"0 files of new content at {source}, retraining.min_new"
    )
    (source / "b.mp4").unlink()
    assert look(source).refusal.startswith("0 files of new content")
    add(source, "c")
    assert look(source).refusal is None


def test_too_few_new_files_wait_for_more(client, source):
    register(client, source)
    add(source, "c")
    assert look(source, min_new_files=2).refusal == (
        f"1 files of new content at {source}, retraining.min_new_files is 2"
    )
    add(source, "d")
    assert look(source, min_new_files=2).refusal is None


def test_it_goes_on_from_the_champion_not_the_newest(client, source):
    number = register(client, source)
    client.set_registered_model_alias("ursa", "champion", number)
    register(client, source, **{"ursa.model_directory": "/models/two"})
    add(source, "c")
    start = look(source).start
    assert start is not None
    assert (start.model_uri, start.directory_uri) == ("models:/ursa/1", "/models/one")
    assert look(source, start="scratch") == NewData()


def test_without_a_champion_that_can_be_gone_on_from_all_stages_are_trained(client, source):
    number = register(client, source)
    add(source, "c")
    assert look(source) == NewData()
    client.set_registered_model_alias("ursa", "champion", number)
    client.delete_model_version_tag("ursa", number, NETWORK_TAG)
    assert look(source) == NewData()
