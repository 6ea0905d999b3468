"""Versions without known holes, actions that cannot become others, one place for both (S10)."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import av
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
FLOORS = {
    "ray": "2.55",  # cloudpickle from the metadata of Parquet files
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: weights_only was passed by
    "transformers": "5.3",  # CVE-2026-4372
    "mlflow": "3.16.1",  # default password, traversal when a model is created
    "urllib3": "2.6.3",
    "pillow": "11",
    "safetensors": "0.6",
}
CEILINGS = {
    "fastapi": "0.151",  # with it Prefect's server does not start
    "sqlalchemy": "2.1",  # with it Prefect's server plans no run of a schedule
}
NOT_NEEDED = {"diffusers"}
"""Has holes below 0.38 and is no part of this project: whatever brings it must be that new."""
MIN_FFMPEG = (8, 1)
ACTION = re.compile(r"^[\w.-]+/[\w./-]+@[0-9a-f]{40}$")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> dict[str, Requirement]:
    found = map(Requirement, project()["dependencies"])
    return {canonicalize_name(item.name): item for item in found}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(item.name): Version(str(item.specifier).removeprefix("=="))
        for item in found
    }


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_floors_hold_where_it_is_installed_pinned_and_asked_for(name: str, floor: str) -> None:
    least = Version(floor)
    assert Version(metadata.version(name)) >= least
    assert pins()[name] >= least
    asked = [item for item in requirements()[name].specifier if item.operator == ">="]
    assert asked, "no floor in pyproject.toml"
    assert all(Version(item.version) >= least for item in asked)


@pytest.mark.parametrize(("name", "limit"), CEILINGS.items())
def test_what_does_not_start_cannot_be_installed(name: str, limit: str) -> None:
    assert Version(metadata.version(name)) < Version(limit)
    assert pins()[name] < Version(limit)
    assert not requirements()[name].specifier.contains(limit)


def test_what_is_not_needed_is_not_installed_in_a_version_with_holes() -> None:
    assert not NOT_NEEDED & set(requirements())
    assert "diffusers" not in pins() or pins()["diffusers"] >= Version("0.38")


def test_foreign_files_are_read_by_an_ffmpeg_without_known_holes() -> None:
    found = re.match(r"n?(\d+)\.(\d+)", av.ffmpeg_version_info)
    assert found, av.ffmpeg_version_info
    assert tuple(map(int, found.groups())) >= MIN_FFMPEG


def test_every_dependency_has_a_floor_and_a_pin() -> None:
    pinned = pins()
    for name, item in requirements().items():
        assert item.specifier, name
        assert name in pinned, name
        assert item.specifier.contains(pinned[name], prereleases=True), name


def uses() -> list[str]:
    found: list[str] = []
    for path in (ROOT / ".github" / "workflows").glob("*.yaml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            found += [job["uses"]] if "uses" in job else []
            found += [step["uses"] for step in job.get("steps", ()) if "uses" in step]
    return found


def test_actions_are_named_by_their_commit() -> None:
    named = uses()
    assert len(named) >= 4
    assert [name for name in named if not ACTION.match(name)] == []
    # one version of each everywhere
    assert len(set(named)) == len({name.partition("@")[0] for name in named})


def test_workflows_may_only_read() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yaml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path
        assert all("permissions" not in job for job in workflow["jobs"].values()), path


def test_the_audit_and_the_list_of_parts_run_every_night() -> None:
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yaml").read_text())
    commands = [step.get("run") for step in nightly["jobs"]["dependencies"]["steps"]]
    assert {"make audit", "make sbom"} <= set(commands)
    makefile = (ROOT / "Makefile").read_text()
    assert "pip-audit --strict" in makefile
    assert "bandit -q -c pyproject.toml -r ursa flows tasks -ll" in makefile
