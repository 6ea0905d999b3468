"""New clips at the source: one stage goes on from the champion, and nothing new ends at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import running_services
from tests.running_services import ROOT, TINY, Running, changed, run_arguments, versions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "retrained"
FIRST, NEW = ("tree_hand.mp4", "cardboard_box.mp4"), ("city_night.mp4",)
OVERRIDES = changed(
    {
        "release": {"model_name": NAME},
        "retraining": {"max_steps": 2},
        # so few clips are doubled by one file
        "visual_tokenizer": {"refit_growth": 10},
        "text_tokenizer": {"refit_growth": 10},
    },
    TINY,
)


def run(
    services: Running, source: Path, *more: str, overrides: dict[str, Any] = OVERRIDES
) -> dict[str, Any]:
    done = services.script(*run_arguments(source, overrides, *more))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return services.flow_run(done.stdout)


def add(source: Path, *names: str) -> None:
    for name in names:
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, source)


def test_new_clips_make_a_challenger_from_the_champion(tmp_path: Path) -> None:
    services, source = running_services.start(), tmp_path / "videos"
    source.mkdir()
    add(source, *FIRST)
    run(services, source)
    (first,) = versions(services, NAME)
    services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/registered-models/alias",
        {"name": NAME, "alias": "champion", "version": first["version"]},
    )

    add(source, *NEW)
    alike = changed({"retraining": {"min_drift": 1.0}}, OVERRIDES)
    state = run(services, source, "--param only_new=true", overrides=alike)["state"]
    assert (state["type"], state["name"]) == ("COMPLETED", "NoNewData")
    assert "are like those of the champion" in state["message"]
    assert services.artifacts()["data-drift"]["type"] == "table"
    assert len(versions(services, NAME)) == 1
    again = run(services, source, "--param only_new=true", overrides=alike)
    assert (again["state"]["name"], again["state"]["message"]) == ("NoNewData", state["message"])
    assert again["total_run_time"] < 10, "the clips were known"

    state = run(services, source, "--param only_new=true")["state"]
    assert (state["type"], state["name"]) == ("COMPLETED", "Completed")
    newest = max(versions(services, NAME), key=lambda item: int(item["version"]))
    tags = {item["key"]: item["value"] for item in newest["tags"]}
    assert tags["ursa.started_from"] == f"models:/{NAME}/{first['version']}"
    version = json.loads(Path(tags["ursa.dataset_version"]).read_text())["record"]
    assert {kind: count for kind, count in version["changes"].items() if count} == {"added": 1}
    checkpoint = Path(tags["ursa.checkpoint"])
    assert checkpoint.parents[1].name == "async_finetune"
    assert checkpoint.name.startswith("step-00000002"), "as many steps as `retraining` says"

    again = run(services, source, "--param only_new=true")
    state = again["state"]
    assert (state["name"], state["message"]) == ("NoNewData", f"no new data at {source}")
    assert again["total_run_time"] < 10
    assert len(versions(services, NAME)) == 2
