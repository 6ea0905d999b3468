"""A stage that starts from a model of the registry."""

from collections.abc import Iterator

import pytest
from mlflow.tracking import MlflowClient

from tasks.context import with_registered_starts
from ursa.config import STAGES, fingerprint, load_config
from ursa.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow warns about its own imports


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> Iterator[str]:
    address = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    client = MlflowClient(address)
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            environment.setenv(variable, address)
        client.create_registered_model("ursa")
        for folder in ("/data/one", "/data/two"):
            client.create_model_version("ursa", folder, tags={"ursa.model_directory": folder})
        client.create_model_version("ursa", "/elsewhere")
        client.set_registered_model_alias("ursa", "champion", "2")
        yield address


def starting(init_from: str):
    return load_config("tiny", {"stages": {"video_pretrain": {"init_from": init_from}}})


@pytest.mark.parametrize(
    ("given", "directory"),
    [
        ("models:/ursa@champion", "/data/two"),
        ("models:/ursa/1", "/data/one"),
        ("/data/three", "/data/three"),
    ],
)
def test_a_registered_model_becomes_its_directory(uri, given, directory):
    config = with_registered_starts(starting(given), uri)
    assert fingerprint(config) == fingerprint(starting(directory))
    assert config.stages.needed() == STAGES[1:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("models:/ursa@best", "no model models:/ursa@best in the registry at sqlite"),
        ("models:/ursa/9", "no model models:/ursa/9"),
        ("models:/other@champion", "no model models:/other@champion"),
        ("models:/ursa", "names no version; expected models:/<name>@champion or"),
        ("models:/", "names no version"),
        ("models:/ursa/3", "no tag ursa.model_directory: this pipeline did not register it"),
    ],
)
def test_what_is_not_there_is_named(uri, given, message):
    with pytest.raises(ConfigError, match=message):
        with_registered_starts(starting(given), uri)
