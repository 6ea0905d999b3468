"""Fixtures and the markers that follow from a test's directory."""
# ruff: noqa: E402

import gc
import logging
import os
import threading
from pathlib import Path

# what is imported stays: the collector shall not look through it again and again
gc.disable()
# what other libraries add to Hypothesis (trio a full collection) no test needs
os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"

import cv2
import pytest
import torch

from tests import factories
from ursa.artifacts import StageRequest, TokenDatasets
from ursa.config import RunConfig

torch.set_num_threads(1)
cv2.setNumThreads(1)
# tests of tasks import Prefect, which then handles the library's lines; here no flow reads them
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        directory = item.path.relative_to(root).parts[0]
        if directory in {"integration", "e2e"}:
            item.add_marker(directory)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    # threads of MLflow that still retry must not write to the closed output
    logging.raiseExceptions = False


@pytest.fixture(scope="session")
def tiny_config() -> RunConfig:
    """The tiny preset at a size at which a step takes milliseconds."""
    return factories.tiny_config()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> factories.TinyData:
    """Synthetic token data sets and tokenizers, committed below one directory."""
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("tiny-data")))


@pytest.fixture(scope="session")
def token_datasets(tiny_data: factories.TinyData) -> TokenDatasets:
    return tiny_data.datasets


@pytest.fixture
def no_threads_left():
    """Fail if a thread that began during the test is still there after it."""
    before = set(threading.enumerate())
    yield
    assert not [thread.name for thread in threading.enumerate() if thread not in before]


@pytest.fixture
def make_request(tiny_data: factories.TinyData, tmp_path: Path):
    """Return a function that makes stage requests with their own output directory."""

    def make(stage: str = "video_pretrain", *, output: str = "out", **changes) -> StageRequest:
        return factories.stage_request(tiny_data, stage, str(tmp_path / output), **changes)

    return make


@pytest.fixture(scope="session")
def exported_model(tiny_data: factories.TinyData, tmp_path_factory: pytest.TempPathFactory):
    """A model of four steps, exported."""
    from ursa.release import export_model
    from ursa.training.stage import train_stage

    output_uri = str(tmp_path_factory.mktemp("exported"))
    request = factories.stage_request(tiny_data, "video_pretrain", output_uri, max_steps=4)
    return export_model(request, train_stage(request), output_uri=output_uri)
