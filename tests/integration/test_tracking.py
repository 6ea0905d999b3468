"""Runs, metrics and the registry in a real MLflow store (SQLite and a local folder)."""

import functools
import io
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
from markdown_it import MarkdownIt
from mlflow.tracking import MlflowClient
from PIL import Image

from tasks import metric_sink, model_registry, registration, tracking
from tasks.context import RunContext
from tasks.metric_sink import MetricSink
from tasks.tracking import TrackedRun
from ursa import storage
from ursa.artifacts import CheckpointRef, EvalReport, ExportedModel, ModelVersion
from ursa.config import load_config
from ursa.errors import RegistrationError, ServiceError
from ursa.gate import not_compared

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # MLflow warns about its own imports
]
NAME = "ursa"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(address)
    client.create_experiment(tracking.EXPERIMENT, artifact_location=(folder / "files").as_uri())
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as environment:
        # MLflow writes both for processes to come, such as those of other tests
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            environment.setenv(variable, address)
        yield address
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri("")


def open_run(uri: str, print_: str, tags: dict[str, str]) -> TrackedRun:
    spool_uri = uri.removeprefix("sqlite:///").replace("mlflow.db", "spool")
    return tracking.open_run(uri, "a run", print_, tags, spool_uri=spool_uri)


def history(run: TrackedRun, key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for item in MlflowClient(run.tracking_uri).get_metric_history(run.run_id, key):
        found.setdefault(item.step, []).append(item.value)
    return found


def report_of(folder: Path, content: bytes, *, gate_passed: bool) -> EvalReport:
    model = folder / "model"
    (model / "vae").mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(content)
    (model / "vae" / "config.json").write_bytes(b"{}")
    checkpoint = CheckpointRef(
        uri=str(folder), stage="async_finetune", step=1, num_samples_seen=1, metrics={},
        fingerprint="c", parent_uri=None,
    )  # fmt: skip
    exported = ExportedModel(
        manifest_uri=str(folder / "manifest.json"),
        directory_uri=str(model),
        tokens_uri=str(folder / "tokens.json"),
        checkpoint=checkpoint,
        sha256={
            name: storage.sha256_file(model / name)
            for name in ("weights.safetensors", "vae/config.json")
        },
        fingerprint="m",
    )
    return EvalReport(
        manifest_uri=str(folder / "evaluation.json"), model=exported, metrics={"eval/loss": 1.5},
        samples_uri=str(folder), samples=(), gate_passed=gate_passed,
        failed_gates=() if gate_passed else ("eval/loss",), fingerprint="e",
    )  # fmt: skip


def register(run: TrackedRun, report: EvalReport) -> tracking.ModelVersion:
    tags = {"ursa.run_fingerprint": "f", "ursa.tokens_fingerprint": "tokens"}
    root_uri = str(Path(report.samples_uri).parent)
    return model_registry.register_version(
        run, report, load_config("tiny"), tags, root_uri=root_uri, decided_by="a test"
    )


@pytest.mark.parametrize("name", ["my model (1)#x", "a&b+c;d", "[a](b) <c>", "\u00fc"])
def test_links_of_a_run_lead_to_its_version_whatever_its_name(
    uri: str, tmp_path: Path, name: str
) -> None:
    run = open_run(uri, f"print of {name}", {})
    version = ModelVersion(
        name=name, version="3", run_id=run.run_id, model_uri="", alias=None, is_new=True
    )
    context = RunContext(
        source_uri="videos",
        data_uri=str(tmp_path),
        preset="tiny",
        config=load_config("tiny"),
        sources_uri="",
        source_fingerprint="s",
        start=None,
        fingerprint=name,
        run=run,
    )
    note = MarkdownIt("commonmark").parse(registration.run_note(context, version))
    first = note[1].children
    assert first is not None
    assert [part.type for part in first[:3]] == ["link_open", "text", "link_close"]
    assert first[1].content == f"{name} version 3"
    address = urlsplit(str(first[0].attrGet("href")))
    # what MLflow's pages make of it: the path of the fragment, its parts decoded
    path = address.fragment.partition("?")[0].split("/")
    assert [unquote(part) for part in path] == ["", "models", name, "versions", "3"]


def test_same_fingerprint_is_the_same_run(uri: str) -> None:
    first = open_run(uri, "print-1", {"ursa.preset": "tiny"})
    tracking.close_run(first, "KILLED")
    again = open_run(uri, "print-1", {"ursa.preset": "small"})
    other = open_run(uri, "print-2", {})
    assert again == first != other
    stored = MlflowClient(uri).get_run(first.run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.tags["ursa.preset"] == "small"


def test_child_is_closed_with_the_right_status_and_taken_up_again(uri: str) -> None:
    parent = open_run(uri, "print-3", {})
    with pytest.raises(ValueError, match="no"), tracking.child_run(parent, "data", {}) as first:
        raise ValueError("no")
    assert MlflowClient(uri).get_run(first.run_id).info.status == "FAILED"
    with tracking.child_run(parent, "data", {}) as again:
        assert MlflowClient(uri).get_run(again.run_id).info.status == "RUNNING"
    assert again == first
    assert MlflowClient(uri).get_run(first.run_id).info.status == "FINISHED"


def test_sink_keeps_one_value_a_step_over_a_resume(uri: str) -> None:
    run = open_run(uri, "print-4", {})
    with MetricSink(run) as sink:
        for step in range(1, 6):
            sink(step, {"train/loss": float(step)})
    with MetricSink(run) as sink:  # the second try starts from the checkpoint of step 3
        for step in range(4, 9):
            sink(step, {"train/loss": -1.0})
    assert history(run, "train/loss") == {
        **{step: [float(step)] for step in range(1, 6)},
        **{step: [-1.0] for step in range(6, 9)},
    }


SYSTEM = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_usage_megabytes",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
}


def test_sink_measures_its_machine_beside_the_steps(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_sink, "FLUSH_EVERY_S", 0.1)
    monkeypatch.setattr(metric_sink, "MEASURE_EVERY_S", 0.5)
    run = open_run(uri, "print-5", {})
    with MetricSink(run, measures_machine=True) as sink:
        for step in range(1, 12):
            sink(step, {"train/loss": float(step)})
            sum(range(2_000_000))  # so that the processor has something to do
            time.sleep(0.1)
    assert history(run, "train/loss") == {step: [float(step)] for step in range(1, 12)}
    metrics = MlflowClient(uri).get_run(run.run_id).data.metrics
    of_system = {key for key in metrics if key.startswith("system/")}
    assert of_system >= {f"system/{key}" for key in SYSTEM}
    assert all("gpu_" in key for key in of_system - {f"system/{key}" for key in SYSTEM})
    shares = history(run, "system/cpu_utilization_percentage")
    assert 1 < len(shares) < 5, "a step is a second"
    assert max(shares) < 5, "since the run began"
    assert all(0 < value <= 100 for (value,) in shares.values())


def test_sink_neither_waits_nor_raises_when_the_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_sink, "CLOSE_PATIENCE_S", 0.1)
    gone = TrackedRun(
        tracking_uri="http://127.0.0.1:9", experiment_id="1", run_id="x", spool_uri=str(tmp_path)
    )
    with MetricSink(gone, measures_machine=True) as sink:
        began = time.monotonic()
        for step in range(1000):
            sink(step, {"train/loss": 1.0})
        assert time.monotonic() - began < 1.0
    text = (tmp_path / "x.jsonl").read_text()
    assert text.count('"train/loss"') == 1000
    assert text.count('"system/cpu_utilization_percentage"') >= 1


def test_finished_run_keeps_the_tags_of_who_made_it(uri: str) -> None:
    first = {"prefect.flow_run_id": "1", "mlflow.source.git.commit": "a", "ursa.preset": "tiny"}
    later = {"prefect.flow_run_id": "2", "mlflow.source.git.commit": "b", "ursa.preset": "tiny"}
    run = open_run(uri, "print-tags", first)
    tracking.close_run(run, "KILLED")
    open_run(uri, "print-tags", later)  # goes on with what was stopped
    found = tracking.run_tags(run)
    assert found["prefect.flow_run_id"] == found["prefect.last_flow_run_id"] == "2"
    assert found["mlflow.source.git.commit"] == "b"
    tracking.close_run(run, "FINISHED")
    open_run(uri, "print-tags", first)
    found = tracking.run_tags(run)
    assert (found["prefect.flow_run_id"], found["prefect.last_flow_run_id"]) == ("2", "1")
    assert found["mlflow.source.git.commit"] == "b"


def test_configuration_and_inputs_are_logged_once(uri: str) -> None:
    run = open_run(uri, "print-5", {})
    item = tracking.DatasetInput("tokens", "/data/tokens/manifest.json", "ab" * 32, "training")
    for _ in range(2):
        tracking.log_config(run, load_config("tiny"))
        tracking.log_inputs(run, [item])
    stored = MlflowClient(uri).get_run(run.run_id)
    assert stored.data.params["release.model_name"] == "ursa"
    assert [entry.dataset.name for entry in stored.inputs.dataset_inputs] == ["tokens"]


def test_a_picture_of_a_step_is_logged_once(uri: str) -> None:
    run = open_run(uri, "pictures", {})
    drawn = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(drawn, "PNG")
    for step in (5, 5, 9):
        tracking.log_picture_step(run, drawn.getvalue(), "loss_by_frame", step)
    found = MlflowClient(uri).list_artifacts(run.run_id, "images")
    names = [Path(item.path).name for item in found if item.path.endswith(".png")]
    assert sorted(name.split("+timestamp")[0] for name in names) == [
        "loss_by_frame+step+5",
        "loss_by_frame+step+9",
    ]


def test_unreachable_server_is_named() -> None:
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9 .*make up"):
        tracking.check_service("http://127.0.0.1:9", timeout_s=1)


def test_all_logged_models_are_found(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("pages")
    made = {client.create_logged_model(experiment_id, f"m{i}").model_id for i in range(3)}
    search = MlflowClient.search_logged_models
    of_one = functools.partialmethod(search, max_results=1)
    monkeypatch.setattr(MlflowClient, "search_logged_models", of_one)
    assert len(client.search_logged_models([experiment_id])) == 1
    assert {item.model_id for item in model_registry.logged_models(client, experiment_id)} == made


def test_registration_is_whole_and_happens_once(uri: str, tmp_path: Path) -> None:
    run = open_run(uri, "print-6", {})
    report = report_of(tmp_path / "a", b"weights a", gate_passed=True)
    version = register(run, report)
    assert (version.version, version.alias, version.is_new) == ("1", "champion", True)
    again = register(run, report)
    assert again == version.model_copy(update={"is_new": False})
    assert model_registry.find_version(uri, NAME, "ursa.run_fingerprint", "f") == again
    worse_report = report_of(tmp_path / "b", b"weights b", gate_passed=False)
    where = {"root_uri": str(tmp_path), "decided_by": "a test"}
    champion = model_registry.champion_version(uri, NAME, **where)
    assert champion is not None
    assert champion.version == "1"
    assert champion.tags["ursa.registration_key"] == report.model.content_key
    assert model_registry.champion_version(uri, "nothing", **where) is None

    worse = register(run, worse_report)
    assert (worse.version, worse.alias) == ("2", "challenger")
    client = MlflowClient(uri)
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"
    # the gates of a later run are wider
    passed = worse_report.model_copy(
        update={
            "gate_passed": True,
            "failed_gates": (),
            "fingerprint": "wider gates",
            "comparison": not_compared("1", "a test"),
        }
    )
    assert register(run, passed).alias == "champion"
    # a person rolls back: nothing promotes it again behind their back
    client.set_registered_model_alias(NAME, "champion", "1")
    register(run, passed)
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"


def test_damaged_upload_is_not_registered_and_cleaned_up_next_time(
    uri: str, tmp_path: Path
) -> None:
    run = open_run(uri, "print-7", {})
    report = report_of(tmp_path / "c", b"weights c", gate_passed=True)
    path = tmp_path / "c" / "model" / "weights.safetensors"
    path.write_bytes(b"damaged c")  # not what the manifest says
    client = MlflowClient(uri)
    before = len(client.search_model_versions(f"name = '{NAME}'"))
    with pytest.raises(RegistrationError, match=r"weights\.safetensors"):
        register(run, report)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == before
    path.write_bytes(b"weights c")
    assert register(run, report).is_new
    key = report.model.content_key
    left = client.search_logged_models(
        [run.experiment_id], filter_string=f"tags.`ursa.registration_key` = '{key}'"
    )
    assert len(left) == 1
