"""New clips at the source: one stage goes on from the champion, and nothing new ends at once."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import running_services
from tests.documented_names import MEANS, documented, documented_metrics, metric_names
from tests.running_services import (
    ROOT,
    TINY,
    Running,
    changed,
    mlflow_runs,
    run_arguments,
    versions,
)
from tests.running_services import tags as run_tags
from ursa.data.versions import DatasetVersion, find_uses, read_changes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "retrained"
FIRST = ("tree_hand.mp4", "cardboard_box.mp4")
NEW = ("black_bottle.mp4", "bbb_stretch.mp4", "city_night.mp4")
UNDER_WAY = {"SCHEDULED", "PENDING", "RUNNING", "CANCELLING"}
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


def set_up_schedule(services: Running, source: Path) -> None:
    """Switch the schedule on for the source, with the configuration of this test."""
    changes = [word for change in changes_of(OVERRIDES) for word in ("--set", change)]
    ursa = [sys.executable, "-c", "from ursa.cli import main; main()"]
    done = subprocess.run(
        [*ursa, "schedule", "on", "--source", str(source), "--preset", "tiny", *changes],
        env={**services.environment, "PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def changes_of(values: dict[str, Any], section: str = "") -> Iterator[str]:
    """Yield nested values as `--set` takes them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from changes_of(value, f"{section}{name}.")
        else:
            yield f"{section}{name}={json.dumps(value)}"


def fire_event(services: Running, limit_s: float = 400) -> dict[str, Any]:
    """Say that there are new videos; return the run that this has started, when it has ended."""
    query = {"deployments": {"name": {"any_": ["scheduled-retraining"]}}, "sort": "START_TIME_DESC"}
    runs = f"{services.prefect_url}/api/flow_runs/filter"
    before = {item["id"] for item in services.ask(runs, query)}
    subprocess.run(
        [
            *(sys.executable, "-m", "prefect", "event", "emit", "ursa.data.new"),
            *("--resource-id", "ursa.source.videos"),
        ],
        env={**services.environment, "PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for item in services.ask(runs, query):
            if item["id"] not in before and item["state"]["type"] not in UNDER_WAY:
                return dict(item)
        time.sleep(1)
    raise AssertionError("the event has started no run that ended")


def check_names(services: Running, flow_run_id: str, version: dict[str, Any]) -> None:
    """Fail unless what a retraining with a champion leaves is documented, and what is is there."""
    query = f"tags.`prefect.last_flow_run_id` = '{flow_run_id}'"
    runs = {run_tags(item)["ursa.stage"]: item for item in mlflow_runs(services, query)}
    found = metric_names(runs)
    assert not documented_metrics().unknown(found)
    assert {"drift/sharpness", "drift/caption_words"} <= found
    of_champion = {f"eval/{one}_{mean}" for one in ("champion", "vs_champion") for mean in MEANS}
    assert of_champion <= found
    of_runs = {tag for run in runs.values() for tag in run_tags(run)}
    assert not documented("Tags of runs").unknown(of_runs)
    of_version = {tag["key"] for tag in version["tags"]}
    documented("Tags of a version").check(of_version)
    assert "ursa.started_from" in of_version
    assert not documented("Prefect artifacts").unknown(set(services.artifacts()))


def test_new_clips_make_a_challenger_from_the_champion(tmp_path: Path) -> None:
    services, source = running_services.start(), tmp_path / "videos"
    source.mkdir()
    add(source, *FIRST)
    whole = run(services, source)
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

    set_up_schedule(services, source)
    begun = fire_event(services)
    state = begun["state"]
    assert (state["type"], state["name"]) == ("COMPLETED", "Completed")
    # three stages and two files then, one stage and three files (whose clips are there) now
    assert begun["total_run_time"] < 1.5 * whole["total_run_time"]
    did = {key: item["description"] for key, item in services.artifacts().items()}
    assert re.match("3 files: done in .*; 2 were known$", did["ingest-progress"])
    shards = re.match("([0-9]+) shards: done in .*; ([0-9]+) were known$", did["tokenize-progress"])
    assert shards
    assert [int(count) for count in shards.groups()] == [2, 1], "old clips are not tokenized again"
    newest = max(versions(services, NAME), key=lambda item: int(item["version"]))
    tags = {item["key"]: item["value"] for item in newest["tags"]}
    assert tags["ursa.started_from"] == f"models:/{NAME}/{first['version']}"
    version = json.loads(Path(tags["ursa.dataset_version"]).read_text())["record"]
    assert {kind: count for kind, count in version["changes"].items() if count} == {"added": 3}
    found = DatasetVersion.model_validate(version)
    assert {Path(item.source_uri).name for item in read_changes(found)} == set(NEW)
    for name in NEW:
        (use,) = find_uses(str(services.folder / "data"), (source / name).as_uri())
        assert use[0].manifest_uri == tags["ursa.dataset_version"]
    checkpoint = Path(tags["ursa.checkpoint"])
    assert checkpoint.parents[1].name == "async_finetune"
    assert checkpoint.name.startswith("step-00000002"), "as many steps as `retraining` says"

    check_names(services, begun["id"], newest)

    again = fire_event(services)
    state = again["state"]
    assert (state["name"], state["message"]) == ("NoNewData", f"no new data at {source}")
    assert again["total_run_time"] < 10
    assert len(versions(services, NAME)) == 2
