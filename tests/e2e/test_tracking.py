"""What a run leaves in Prefect and MLflow: names as in docs/tracking.md, links that resolve."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.running_services import ROOT, STAGES, Finished, mlflow_runs, tags, versions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PAGE = ROOT / "docs" / "tracking.md"
EVALUATION = ROOT / "docs" / "evaluation.md"
MEANS = ("loss", "accuracy", "i2v_loss", "i2v_accuracy", "async_loss", "async_accuracy")
PLACEHOLDERS = {
    "stage": STAGES,
    "mean": MEANS,
    "split": ("train", "validation"),
}
NUMBERS = {
    "t": r"0\.\d+",
    "frame": r"\d+",
    "step": r"\d+",
    "number": r"\d+",
    "clip": r"[\w-]+",
    "scorer": r"[a-z-]+",
    "score": r"[\d.]+",
    "N": r"\d+",
    "measure": r"[\w./-]+",
}


class Documented(NamedTuple):
    """Names of a section, as expressions: of every run, and of some."""

    always: tuple[str, ...]
    sometimes: tuple[str, ...]

    def check(self, found: set[str]) -> None:
        """Fail unless these names, and no others, were found."""
        known = (*self.always, *self.sometimes)
        unknown = {name for name in found if not any(re.fullmatch(one, name) for one in known)}
        assert not unknown, f"without a row in {PAGE}"
        gone = [one for one in self.always if not any(re.fullmatch(one, name) for name in found)]
        assert not gone, f"in {PAGE}, but the run has none"


def section(title: str, page: Path = PAGE) -> str:
    text = page.read_text("utf-8")
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def expressions(name: str) -> list[str]:
    """Return the names that a name with placeholders stands for, as regular expressions."""
    for key, values in PLACEHOLDERS.items():
        if f"<{key}>" in name:
            return [
                one for value in values for one in expressions(name.replace(f"<{key}>", value, 1))
            ]
    parts = re.split(r"<(\w+)>", name)
    return ["".join(NUMBERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))]


def names(text: str, column: int = 1) -> tuple[str, ...]:
    """Return the names in one column of all tables of a text."""
    cells = [line.split("|")[column] for line in text.splitlines() if line.startswith("| ")]
    found = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert len(found) == len(set(found)), "a name has two rows"
    return tuple(one for name in found for one in expressions(name))


def documented(title: str) -> Documented:
    always, _, sometimes = section(title).partition("Only in some runs:")
    beside = re.findall("`([^`]+)`", sometimes.splitlines()[0]) if sometimes else []
    more = [one for name in beside for one in expressions(name)]
    return Documented(names(always), (*names(sometimes), *more))


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
    found = {item["key"] for run in runs.values() for item in run["data"].get("metrics", [])}
    always, sometimes = documented("Metrics")
    measured = [f"eval/{one}" for one in names(section("Metrics", EVALUATION))]
    ends = [f"{one}_(low|high)" for one in measured]
    Documented((*always, *measured), (*sometimes, *ends)).check(found)


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
