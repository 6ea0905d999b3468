"""Automations and deployments against the schemas of the installed Prefect."""

import importlib.util
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

from tests.compose_stack import ROOT, load_compose


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    path = ROOT / "infra" / "bootstrap.py"
    spec = importlib.util.spec_from_file_location("ursa_bootstrap", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ursa_bootstrap"] = module
    spec.loader.exec_module(module)
    return module


def read(dumped: Any, given: Any, where: str = "") -> None:
    """Fail if something that was given is not in what was read: Prefect ignores unknown names."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in dumped, f"{where}.{key} is unknown"
            read(dumped[key], value, f"{where}.{key}")
    elif isinstance(given, list) and given and isinstance(given[0], dict):
        for index, (one, other) in enumerate(zip(dumped, given, strict=True)):
            read(one, other, f"{where}[{index}]")
    elif isinstance(given, list):
        assert sorted(dumped) == sorted(given), where
    elif isinstance(given, str):
        assert dumped in (given, [given]), where
    else:
        assert dumped == given, where


def test_automations_are_read_whole(bootstrap: ModuleType) -> None:
    block = str(uuid.uuid4())
    found = bootstrap.automations(block)
    assert [item["name"] for item in found] == ["ursa-run-without-heartbeat", "ursa-run-failed"]
    for item in found:
        read(AutomationCore.model_validate(item).model_dump(mode="json"), item)
    assert found[1]["actions"][0]["block_document_id"] == block


def test_an_unknown_name_is_found(bootstrap: ModuleType) -> None:
    item = bootstrap.automations(None)[0]
    item["trigger"]["expected"] = item["trigger"].pop("expect")
    with pytest.raises(AssertionError, match="expected is unknown"):
        read(AutomationCore.model_validate(item).model_dump(mode="json"), item)


def test_without_a_block_nobody_is_told(bootstrap: ModuleType) -> None:
    assert [item["name"] for item in bootstrap.automations(None)] == ["ursa-run-without-heartbeat"]


def test_heartbeats_come_more_often_than_they_are_missed(bootstrap: ModuleType) -> None:
    (zombie,) = bootstrap.automations(None)
    worker = load_compose()["services"]["prefect-worker"]["environment"]
    lines = (ROOT / "infra" / "k8s" / "run.env").read_text().splitlines()
    on_kubernetes = dict(line.split("=", 1) for line in lines if "=" in line)
    for settings in (worker, on_kubernetes):
        # Prefect sends none more often than every 30 s
        assert int(settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) >= 30
        assert zombie["trigger"]["within"] >= 3 * int(settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def deployment(content: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [item for item in content["deployments"] if item["name"] == name]
    return dict(found)


def test_an_event_starts_the_retraining() -> None:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    triggers = deployment(content, "scheduled-retraining")["triggers"]
    (trigger,) = triggers
    read(DeploymentEventTrigger.model_validate(trigger).model_dump(mode="json"), trigger)
    assert trigger["expect"] == ["ursa.data.new"]
    others = [item["name"] for item in content["deployments"] if item.get("triggers")]
    assert others == ["scheduled-retraining"]


def test_deployments_get_the_source_of_the_place(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URSA_POOL", "gpu")
    content = bootstrap.deployments("s3://bucket/videos", "small")
    assert len(content["deployments"]) == 5
    for item in content["deployments"]:
        assert item["parameters"]["source_uri"] == "s3://bucket/videos"
        assert item["parameters"]["preset"] == "small"
        assert item["work_pool"]["name"] == "gpu"
    assert deployment(content, "scheduled-retraining")["parameters"]["only_new"] is True
    monkeypatch.delenv("URSA_POOL")
    unchanged = bootstrap.deployments(None, None)
    assert unchanged == yaml.safe_load(Path(ROOT / "prefect.yaml").read_text())
