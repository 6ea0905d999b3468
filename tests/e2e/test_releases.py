"""A better model is promoted, a spoilt one refused with its reason, and a rollback undoes a choice.

Through the flow and through the command line, and seen on the pages of MLflow.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome

from tests import media, running_services
from tests.browser import needs_browser, open_browser, wait_for
from tests.running_services import Running, changed, run_arguments, versions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_browser]

NAME = "released"
URSA = (sys.executable, "-c", "from ursa.cli import main; main()")
OVERRIDES = changed(
    {
        "release": {"model_name": NAME, "gate_min_timestep": 0.9},
        # enough held-out windows for an interval; the clips resemble each other
        "selection": {"max_duplicate_distance": None, "validation_fraction": 0.3},
        "tokenization": {"window_stride_s": 0.5},
        "evaluation": {"max_samples": 32},
    }
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    with open_browser(tmp_path / "chromium") as driver:
        yield driver


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Moving pictures in grey frames: what is held out is like what is trained on."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in range(10):
        inner = media.panning(72, step=2, height=40, width=64, seed=seed)
        frames = np.pad(inner, ((0, 0), (28, 28), (40, 40), (0, 0)), constant_values=120)
        media.save_video(folder / f"{seed}.mp4", frames, 24.0)
    return folder


def release(services: Running, source: Path, **stage: Any) -> dict[str, str]:
    """Run the flow with another last stage; return the tags of the version that it has made."""
    overrides = changed({"stages": {"async_finetune": stage}}, OVERRIDES)
    done = services.script(*run_arguments(source, overrides))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    newest = max(versions(services, NAME), key=lambda item: int(item["version"]))
    return {tag["key"]: tag["value"] for tag in newest["tags"]}


def aliases(services: Running) -> dict[str, str]:
    address = f"{services.mlflow_url}/api/2.0/mlflow/registered-models/get?name={NAME}"
    found = services.ask(address)["registered_model"].get("aliases", [])
    return {item["alias"]: item["version"] for item in found}


def ursa_models(services: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*URSA, "models", *arguments, "--name", NAME],
        env={
            **services.environment,
            "MLFLOW_TRACKING_URI": services.mlflow_url,
            "URSA_DATA_URI": str(services.folder / "data"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def shown(browser: Chrome, tmp_path: Path) -> Callable[..., None]:
    """Look at the pages of the model and of its versions, and keep screenshots."""
    url = running_services.start().mlflow_url

    def look(name: str, *, champion: str, words: dict[str, str]) -> None:
        for version, text in words.items():
            browser.get("about:blank")  # a page that is open shows what it knows already
            browser.get(f"{url}/#/models/{NAME}/versions/{version}")
            body = wait_for(browser, f"Version {version}", text, "ursa.registration_key")
            assert ("@ champion" in body) == (version == champion), body[:500]
            browser.save_screenshot(str(tmp_path / f"{name}-version-{version}.png"))
        browser.get("about:blank")
        browser.get(f"{url}/#/models/{NAME}")
        wait_for(browser, *(f"Version {version}" for version in words), "@ champion")
        browser.save_screenshot(str(tmp_path / f"{name}-model.png"))

    return look


def test_better_is_promoted_worse_refused_and_a_choice_undone(
    source: Path, shown: Callable[..., None]
) -> None:
    services = running_services.start()
    first = release(services, source)
    assert first["ursa.decision"].startswith("promoted by flow run")
    better = release(services, source, max_steps=30, learning_rate=0.003)
    assert better["ursa.decision"].startswith("promoted by flow run"), better["ursa.decision"]
    assert "version 1" in better["ursa.comparison"]
    assert aliases(services) == {"champion": "2", "challenger": "2"}
    shown("promoted", champion="2", words={"1": "promoted by", "2": "the gate holds"})

    # two steps so long that nothing of the weights is left
    spoilt = release(services, source, max_steps=2, learning_rate=0.5, warmup_steps=0)
    assert spoilt["ursa.gate_passed"] == "false"
    reason = spoilt["ursa.failed_gates"]
    assert "loss" in reason
    assert spoilt["ursa.decision"].startswith("refused by flow run")
    assert aliases(services) == {"champion": "2", "challenger": "3"}
    shown("refused", champion="2", words={"3": reason.split(";")[0]})

    done = ursa_models(services, "promote", "3")
    assert done.returncode == 1
    assert f"the gate refused version 3: {reason[:60]}" in done.stderr
    assert aliases(services)["champion"] == "2"
    done = ursa_models(services, "promote", "3", "--reason", "to see it")
    assert done.stdout == "champion is version 3, was 2\n", done.stderr
    shown("by-hand", champion="3", words={"2": "promoted by", "3": "to see it"})

    done = ursa_models(services, "rollback", "--reason", "it is noise")
    assert done.stdout == "champion is version 2, was 3\n", done.stderr
    shown("rolled-back", champion="2", words={"2": "promoted by", "3": "it is noise"})

    again = release(services, source, max_steps=2, learning_rate=0.5, warmup_steps=0)
    assert again["ursa.decision"].startswith("rolled back"), "the flow leaves it so"
    done = ursa_models(services, "history", "--json")
    events = [(item["event"], item["version"]) for item in json.loads(done.stdout)]
    assert events == [
        ("promoted", "1"),
        ("promoted", "2"),
        ("refused", "3"),
        ("promoted", "3"),
        ("rolled_back", "3"),
    ]
