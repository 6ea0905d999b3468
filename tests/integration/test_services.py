"""The services script: what it starts it stops, and nothing else; what is wrong it names."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from tasks import tracking
from tests import running_services
from tests.running_services import SCRIPT, Running, free_port, run_script, service_environment

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


def marked(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("URSA_SERVICES") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_status_names_all_services(services: Running) -> None:
    done = services.script("status")
    assert done.returncode == 0, done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines()[:3]] == [
        ["prefect", "up"],
        ["mlflow", "up"],
        ["worker", "up"],
    ]


def test_status_names_the_page_of_the_runs(services: Running) -> None:
    experiment = tracking._experiment_id(MlflowClient(services.mlflow_url))
    page = f"{services.mlflow_url}/#/experiments/{experiment}/runs?{tracking.TRAINING_VIEW}"
    assert services.script("status").stdout.splitlines()[-1] == f"runs in MLflow: {page}"


def test_up_again_changes_nothing_and_is_quick(services: Running) -> None:
    services.script("up")  # another test may have started the worker with variables of its own
    before = {path.name: path.read_text() for path in (services.folder / "run").glob("*.json")}
    began = time.monotonic()
    done = services.script("up")
    assert (done.returncode, done.stdout) == (0, "")
    assert time.monotonic() - began < 15
    after = {path.name: path.read_text() for path in (services.folder / "run").glob("*.json")}
    assert after == before


def test_servers_listen_on_loopback_only(services: Running) -> None:
    ports = {int(services.environment[f"URSA_{name}_PORT"]) for name in ("PREFECT", "MLFLOW")}
    listening = {
        (item.laddr.ip, item.laddr.port)
        for item in psutil.net_connections("tcp")
        if item.status == psutil.CONN_LISTEN and item.laddr.port in ports
    }
    assert listening == {("127.0.0.1", port) for port in ports}


@pytest.mark.parametrize("variable", ["URSA_PREFECT_PORT", "URSA_MLFLOW_PORT"])
def test_port_of_another_process_is_named(tmp_path: Path, variable: str) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = service_environment(tmp_path) | {variable: str(server.server_port)}
    try:
        done = run_script("up", environment=environment)
        started = marked(tmp_path)
    finally:
        run_script("down", environment=environment)
        server.shutdown()
        server.server_close()
    assert started == []  # not even the other server
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"port {server.server_port} " in done.stderr
    assert variable in done.stderr
    assert marked(tmp_path) == []


def script() -> Any:
    """Import the script, which is in no package."""
    found = importlib.util.spec_from_file_location("services", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_run_that_is_left_before_it_begins_is_cancelled(
    services: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C does: a run that has begun goes on."""
    for name, value in services.environment.items():
        monkeypatch.setenv(name, value)
    module, api = script(), f"{services.prefect_url}/api"
    deployment = services.ask(f"{api}/deployments/name/ursa/full-training")["id"]
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    waits = {"type": "SCHEDULED", "state_details": {"scheduled_time": later}}
    made = services.ask(f"{api}/deployments/{deployment}/create_flow_run", {"state": waits})
    address = f"{api}/flow_runs/{made['id']}"
    begun = {"state": {"type": "RUNNING"}, "force": True}
    services.ask(f"{address}/set_state", begun)
    assert module.leave(made["id"]).startswith("the run goes on; stop it with: make down")
    assert services.ask(address)["state"]["type"] == "RUNNING"
    services.ask(f"{address}/set_state", {"state": waits, "force": True})
    assert module.leave(made["id"]) == "the run had not begun, and is cancelled"
    assert services.ask(address)["state"]["type"] == "CANCELLED"


@pytest.mark.parametrize(
    ("state", "begins", "holds"),
    [
        ({"type": "CANCELLED", "name": "Cancelled", "message": None}, "CANCELLED: ", "go on"),
        ({"type": "CANCELLING", "name": "Cancelling"}, "CANCELLED: ", "go on"),
        ({"type": "RUNNING"}, "FAILED: the services were stopped", "again"),
        (
            {
                "type": "FAILED",
                "name": "Failed",
                "message": "Flow run encountered an exception: DataError: no clip\nTraceback",
            },
            "FAILED: DataError: no clip",
            "mend that",
        ),
        ({"type": "CRASHED", "name": "Crashed", "message": ""}, "FAILED: Crashed", "mend that"),
    ],
)
def test_a_run_that_has_not_completed_is_told_apart(
    state: dict[str, str], begins: str, holds: str
) -> None:
    first, second = script().why_not_completed({"state": state}, "http://page").strip().splitlines()
    assert first.startswith(begins)
    assert second.startswith("Try: ")
    assert holds in second
    assert ("mend that" in second) is (state["type"] in ("FAILED", "CRASHED"))


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_source_without_files_is_named_before_anything_starts(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    environment = service_environment(tmp_path)
    done = run_script("run", "--source", str(tmp_path / name), environment=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ERROR: SOURCE={tmp_path / name} does not exist or is empty")
    assert marked(tmp_path) == []


def test_a_preset_that_is_none_is_named_before_anything_starts(tmp_path: Path) -> None:
    done = run_script("run", "--preset", "tinny", environment=service_environment(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "ERROR: there is no PRESET=tinny; there are small, tiny\n"
    assert marked(tmp_path) == []


def test_port_that_is_no_port_is_refused(tmp_path: Path) -> None:
    environment = service_environment(tmp_path) | {"URSA_MLFLOW_PORT": "http"}
    done = run_script("status", environment=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR: URSA_MLFLOW_PORT must be a port")


def test_recycled_pid_is_never_stopped(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "run").mkdir()
        for name in ("prefect", "mlflow", "worker"):
            content = {"pid": stranger.pid, "start": "another-boot:1", "port": free_port()}
            (tmp_path / "run" / f"{name}.json").write_text(json.dumps(content))
        done = run_script("down", environment=service_environment(tmp_path))
        assert (done.returncode, done.stdout) == (0, "nothing was running\n")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_broken_pid_file_counts_as_not_running(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prefect.json").write_text("{half")
    done = run_script("status", environment=service_environment(tmp_path))
    assert done.returncode == 1
    assert "prefect  down" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lost_pid_files_and_down_leave_nothing_behind(tmp_path: Path) -> None:
    environment = service_environment(tmp_path)
    try:
        assert run_script("up", environment=environment).returncode == 0
        first = {process.pid for process in marked(tmp_path)}
        assert first
        for path in (tmp_path / "run").glob("*.json"):
            path.unlink()
        done = run_script("up", environment=environment)  # adopts or replaces its own processes
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        done = run_script("down", environment=environment)
    assert done.returncode == 0
    assert marked(tmp_path) == []
    assert run_script("down", environment=environment).stdout == "nothing was running\n"
