"""What a run leaves in Prefect and MLflow: names as in docs/tracking.md, links that resolve."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documented_names import (
    Documented,
    documented,
    documented_metrics,
    expressions,
    metric_names,
    section,
)
from tests.running_services import Finished, mlflow_runs, tags, versions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(finished: Finished) -> dict[str, dict[str, Any]]:
    """The runs of the flow run by their stage."""
    query = f"tags.`prefect.flow_run_id` = '{finished.flow_run['id']}'"
    return {tags(item)["ursa.stage"]: item for item in mlflow_runs(finished.services, query)}


def files(finished: Finished, run: dict[str, Any], path: str = "") -> set[str]:
    """Return all files of a run; pictures of a series are one."""
    services = finished.services
    listed = services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/artifacts/list"
        f"?run_id={run['info']['run_id']}&path={path}"
    )
    found: set[str] = set()
    for item in listed.get("files", []):
        found |= files(finished, run, item["path"]) if item.get("is_dir") else {item["path"]}
    return {re.sub(r"^(images/\w+)[+%]step.*", r"\1", name) for name in found}


def test_artifact_keys_are_documented(finished: Finished) -> None:
    rows = re.findall(r"^\| (`[^|]*) \| (\w+) \|", section("Prefect artifacts"), re.MULTILINE)
    kinds = {
        one: kind
        for keys, kind in rows
        for key in re.findall("`([^`]+)`", keys)
        for one in expressions(key)
    }
    artifacts = finished.services.artifacts()
    documented("Prefect artifacts").check(set(artifacts))
    assert {re.escape(key): item["type"] for key, item in artifacts.items()} == kinds


def test_metrics_are_documented(runs: dict[str, dict[str, Any]]) -> None:
    documented_metrics().check(metric_names(runs))


def test_parameters_are_those_of_the_configuration(
    finished: Finished, runs: dict[str, dict[str, Any]]
) -> None:
    services = finished.services
    address = f"{services.mlflow_url}/get-artifact?path=config.yaml&run_uuid="
    config = yaml.safe_load(fetch(f"{address}{runs['run']['info']['run_id']}"))

    def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
        flat: dict[str, str] = {}
        for key, value in values.items():
            name = f"{prefix}{key}"
            is_group = isinstance(value, dict)
            flat |= dotted(value, f"{name}.") if is_group else {name: str(value)}
        return flat

    logged = {item["key"]: item["value"] for item in runs["run"]["data"]["params"]}
    assert logged == dotted(config)
    assert not any(run["data"].get("params") for stage, run in runs.items() if stage != "run")


def test_runs_files_and_data_sets_are_documented(
    finished: Finished, runs: dict[str, dict[str, Any]]
) -> None:
    rows = [
        [re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:4]]
        for line in section("Runs in MLflow").splitlines()
        if line.startswith("| `")
    ]
    assert {row[0][0] for row in rows} == set(runs)
    for (stage,), inputs, artifacts in rows:
        run = runs[stage]
        used = run.get("inputs", {}).get("dataset_inputs", [])
        assert {item["dataset"]["name"] for item in used} == set(inputs)
        expected = tuple(one for name in artifacts for one in expressions(name))
        Documented(expected, ()).check(files(finished, run))


def test_tags_are_documented(finished: Finished, runs: dict[str, dict[str, Any]]) -> None:
    documented("Tags of runs").check({tag for run in runs.values() for tag in tags(run)})
    stages = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", section("Tags of runs"), re.MULTILINE)
    for cell, of in stages:
        owner = {"all": set(runs), "parent": {"run"}, "children": set(runs) - {"run"}}
        wanted = owner.get(of) or set(re.findall("`([^`]+)`", of))
        for tag in re.findall("`([^`]+)`", cell):
            has = {stage for stage, run in runs.items() if tag in tags(run)}
            assert (tag, has) == (tag, wanted)
    (version,) = versions(finished.services, "ursa")
    documented("Tags of a version").check({tag["key"] for tag in version["tags"]})


def fetch(url: str) -> bytes:
    # as browsers say it: Prefect has its pages for these alone
    request = urllib.request.Request(url, headers={"Accept": "text/html, */*"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code} at {url}") from error


def texts(finished: Finished, runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Everything that a person reads: artifacts and logs, tags, notes, descriptions."""
    services = finished.services
    for item in services.artifacts().values():
        yield from (str(item["data"]), str(item["description"]))
    flow_run = {"flow_run_id": {"any_": [finished.flow_run["id"]]}}
    logs = services.ask(f"{services.prefect_url}/api/logs/filter", {"logs": flow_run, "limit": 200})
    yield from (str(line["message"]) for line in logs)
    for run in runs.values():
        yield from tags(run).values()
    for version in versions(services, "ursa"):
        yield from (str(tag["value"]) for tag in version["tags"])
        yield str(version.get("description"))


def resolve(finished: Finished, url: str) -> str:
    """Get a page, and what it is about from the API behind it; return the kind of the page."""
    services = finished.services
    fetch(url)
    prefect, mlflow = f"{services.prefect_url}/api", f"{services.mlflow_url}/api/2.0/mlflow"
    for pattern, address in (
        (r"/(?:runs|flow-runs)/flow-run/([\w-]+)$", f"{prefect}/flow_runs/{{}}"),
        (r"/artifacts/key/([a-z-]+)$", f"{prefect}/artifacts/{{}}/latest"),
        (r"/#/experiments/\d+/runs/(\w+)\?[\w=]+$", f"{mlflow}/runs/get?run_id={{}}"),
        (
            r"/#/models/(\w+)/versions/(\d+)\?[\w=]+$",
            f"{mlflow}/model-versions/get?name={{}}&version={{}}",
        ),
        (
            r"/#/experiments/\d+/runs/(\w+)/artifacts/([\w./-]+)\?[\w=]+$",
            f"{services.mlflow_url}/get-artifact?run_uuid={{}}&path={{}}",
        ),
        (r"/get-artifact\?path=[\w./-]+&run_uuid=\w+$", None),
    ):
        if found := re.search(pattern, url):
            assert address is None or fetch(address.format(*found.groups()))
            return pattern
    raise AssertionError(f"a page of no known kind: {url}")


def test_every_link_leads_somewhere(finished: Finished, runs: dict[str, dict[str, Any]]) -> None:
    links = {
        url.rstrip(".,:")
        for text in texts(finished, runs)
        for url in re.findall(r"https?://[^\s)\"'<>\]]+", text)
    }
    kinds = {resolve(finished, url) for url in links}
    assert len(kinds) == 6, "pages of both, in both"
    services = finished.services
    of_mlflow = " ".join(value for run in runs.values() for value in tags(run).values())
    assert services.prefect_url in of_mlflow
    of_prefect = " ".join(str(item["data"]) for item in services.artifacts().values())
    assert services.mlflow_url in of_prefect


def test_every_manifest_is_there(finished: Finished, runs: dict[str, dict[str, Any]]) -> None:
    """From tags and notes to records, and from these to all that they name."""
    root = str(finished.services.folder / "data")
    paths = re.compile(rf"(?:file://)?({re.escape(root)}/[^\s`\"',)]+)")
    todo = {one for text in texts(finished, runs) for one in paths.findall(text)}
    seen: set[str] = set()
    manifests = 0
    while todo:
        name = todo.pop()
        seen.add(name)
        path = Path(urllib.parse.unquote(name))
        assert path.exists(), name
        if path.suffix == ".json" and path.is_file() and "checkpoints" not in path.parts:
            record = json.loads(path.read_text("utf-8"))
            manifests += "record" in record
            todo |= set(paths.findall(json.dumps(record))) - seen
    folders = {Path(name).relative_to(root).parts[0] for name in seen}
    assert folders >= {"clips", "selections", "datasets", "tokens", "evaluations", "models"}
    assert manifests >= 6
