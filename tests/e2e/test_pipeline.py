"""The whole pipeline on real videos, through the literal command, with Ray: small but all of it."""

import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.running_services import STAGES, Finished, committed, mlflow_runs, tags

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_run_says_where_to_look(finished: Finished) -> None:
    state = finished.flow_run["state"]
    assert state["type"] == "COMPLETED"
    assert "registered ursa version 1" in state["message"]
    for text in ("Prefect run", "MLflow run", "Model version", "Generated clip", "ursa generate"):
        assert text in finished.output
    line = next(x for x in finished.output.splitlines() if x.startswith("Generated clip"))
    assert Path(line.split()[-1]).is_file()


def test_artifacts_say_what_became_of_every_file(finished: Finished) -> None:
    artifacts = finished.services.artifacts()
    funnel = json.loads(artifacts["data-funnel"]["data"])
    broken = [row for row in funnel if row["file"].endswith("broken.mp4")]
    assert len(broken) == 1
    assert broken[0]["step"].startswith("quarantined: ")
    assert all(
        item["data"] == 100.0 for key, item in artifacts.items() if key.endswith("-progress")
    )


def test_tracking_has_a_parent_with_a_child_a_step(finished: Finished) -> None:
    services = finished.services
    parents = mlflow_runs(services, f"tags.`prefect.flow_run_id` = '{finished.flow_run['id']}'")
    by_stage = {tags(item)["ursa.stage"]: item for item in parents}
    assert set(by_stage) == {"run", "data", *STAGES, "evaluate"}
    assert {item["info"]["status"] for item in by_stage.values()} == {"FINISHED"}
    parent = by_stage["run"]["info"]["run_id"]
    for stage in ("data", *STAGES, "evaluate"):
        assert tags(by_stage[stage])["mlflow.parentRunId"] == parent
        assert by_stage[stage]["inputs"]["dataset_inputs"]
    parameters = {p["key"]: p["value"] for p in by_stage["run"]["data"]["params"]}
    assert parameters["stages.video_pretrain.max_steps"] == "4"
    for stage in STAGES:
        history = services.ask(
            f"{services.mlflow_url}/api/2.0/mlflow/metrics/get-history?metric_key=train/loss"
            f"&run_id={by_stage[stage]['info']['run_id']}"
        )
        assert [item["step"] for item in history["metrics"]] == [1, 2, 3, 4]


def test_the_run_has_a_model_card(finished: Finished) -> None:
    services = finished.services
    (run,) = mlflow_runs(services, "tags.`ursa.stage` = 'run' and tags.`ursa.alias` != ''")
    run_id = run["info"]["run_id"]
    address = f"{services.mlflow_url}/get-artifact?path=model_card.md&run_uuid={run_id}"
    with urllib.request.urlopen(address, timeout=20) as answer:
        card = answer.read().decode()
    assert card.startswith("---\nlibrary_name: ursa")
    assert "# ursa version 1" in card
    assert tags(run)["ursa.model_directory"] in card


def test_the_evaluation_is_in_mlflow(finished: Finished) -> None:
    """Metrics of drawn clips, their curves, and what another model is compared with."""
    services = finished.services
    (run,) = mlflow_runs(
        services, "tags.`ursa.stage` = 'evaluate' and tags.`ursa.gate_passed` != ''"
    )
    run_id = run["info"]["run_id"]
    metrics = {item["key"] for item in run["data"]["metrics"]}
    address = f"{services.mlflow_url}/get-artifact?path=measurements.json&run_uuid={run_id}"
    with urllib.request.urlopen(address, timeout=20) as answer:
        measured = json.load(answer)
    names = {item["metric"] for item in measured["measurements"]["measures"]}
    assert {f"eval/{name}" for name in names} <= metrics
    assert {"motion_adherence", "t2v_nearest_train_distance", "train_code_usage"} <= names
    assert measured["data_version_uri"].endswith("/000001.json")
    listed = services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path=images"
    )
    assert any("evaluation_curves" in item["path"] for item in listed["files"])


def test_the_table_of_the_evaluation_can_be_read(finished: Finished) -> None:
    """The gate first, means with their intervals, and no row for a time or a frame alone."""
    rows = json.loads(finished.services.artifacts()["eval-report"]["data"])
    names = [row["metric"] for row in rows]
    assert names[0] == "gate"
    assert {"eval/loss", "eval/i2v_loss", "eval/motion_adherence"} <= set(names)
    assert not [name for name in names if re.search(r"_t0|_frame\d", name)]


def test_stages_show_samples_at_intervals(finished: Finished) -> None:
    """Pictures under one key with the steps as a slider, and clips of stages on videos."""
    services = finished.services
    for stage in STAGES:
        (run,) = mlflow_runs(
            services, f"tags.`ursa.stage` = '{stage}' and tags.`ursa.fingerprint` != ''"
        )
        run_id = run["info"]["run_id"]

        def files(path: str, run_id: str = run_id) -> set[str]:
            listed = services.ask(
                f"{services.mlflow_url}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path={path}"
            )
            return {Path(item["path"]).name for item in listed.get("files", [])}

        pictures = {name for name in files("images") if name.startswith("samples")}
        assert {re.split(r"[+%]", name)[2] for name in pictures} == {"0", "2", "4"}
        clips = set() if stage == "image-pretrain" else {"0.mp4"}
        assert files("samples/step-00000004") == clips


def test_second_run_does_nothing(finished: Finished) -> None:
    services = finished.services
    before = committed(services)
    query = "tags.`ursa.stage` = 'run'"
    (run,) = mlflow_runs(services, query)
    assert tags(run)["ursa.is_new"] == "true"
    done = finished.run_again(URSA_LAUNCHER="ray")
    assert done.returncode == 0, done.stdout
    assert "nothing changed: version 1 is up to date" in done.stdout
    again = services.flow_run(done.stdout)
    assert again["state"]["name"] == "NothingChanged"
    assert committed(services) == before
    (after,) = mlflow_runs(services, query)
    changed = dict(tags(after).items() - tags(run).items())
    assert changed.pop("prefect.last_flow_run_id") == again["id"]
    assert again["id"] in changed.pop("prefect.last_flow_run_url")
    changed.pop("ursa.process")  # whose run it was last, for `ursa doctor`
    assert changed == {}, "the run keeps what its first flow run has noted"
    assert "MLflow run" in done.stdout


def test_only_new_ends_without_work(finished: Finished) -> None:
    """By `ursa schedule run`: the deployment that the schedule and the event start."""
    services = finished.services
    ursa = [sys.executable, "-c", "from ursa.cli import main; main()"]
    done = subprocess.run(
        [*ursa, "schedule", "run", "--json", "--source", str(finished.source)],
        env={**services.environment, "PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["has_worker"]
    address = f"{services.prefect_url}/api/flow_runs/{run['url'].rpartition('/')[2]}"
    deadline = time.monotonic() + 100
    while (state := services.ask(address)["state"])["type"] not in ("COMPLETED", "FAILED"):
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
    assert (state["name"], state["message"]) == ("NoNewData", f"no new data at {finished.source}")


def test_registered_model_generates(finished: Finished, tmp_path: Path) -> None:
    """In a process of its own, as a user of the registry would."""
    services = finished.services
    code = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ursa@challenger")
rows = [{"prompt": "a tree"}]
first = model.predict(rows, params={"seed": 3, "num_inference_steps": 2})
again = model.predict(rows, params={"seed": 3, "num_inference_steps": 2})
assert first == again
open(sys.argv[2], "w").write(first[0])
"""
    target = tmp_path / "clip.txt"
    done = subprocess.run(
        [sys.executable, "-c", code, services.mlflow_url, str(target)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert base64.b64decode(target.read_text())[4:8] == b"ftyp"


def test_stored_model_holds_no_pickle(finished: Finished) -> None:
    stored = finished.services.folder / "mlflow" / "artifacts"
    names = {path.suffix for path in stored.rglob("*") if path.is_file()}
    assert ".safetensors" in names
    assert not names & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def test_samples_are_in_the_tracking_server(finished: Finished) -> None:
    services = finished.services
    found = mlflow_runs(services, "tags.`ursa.stage` = 'evaluate'")
    run_id = found[0]["info"]["run_id"]
    listed = services.ask(
        f"{services.mlflow_url}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path=samples"
    )
    suffixes = {Path(item["path"]).suffix for item in listed["files"]}
    assert {".mp4", ".gif", ".png", ".html"} <= suffixes
