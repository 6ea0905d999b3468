"""A real Prefect server and worker: deployments, refused parameters, errors of one line."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks import schedules
from tasks.doctor import check_flow_runs
from tests import running_services
from tests.running_services import ROOT, Running
from ursa.errors import ConfigError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "data" / "videos" / "tree_hand.mp4", folder)
    return folder


def submit(services: Running, *parameters: str) -> subprocess.CompletedProcess[str]:
    """Run the literal command without watching."""
    return subprocess.run(
        [
            *(str(Path(sys.executable).parent / "prefect"), "deployment", "run"),
            "ursa/full-training",
            *(word for parameter in parameters for word in ("--param", parameter)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PREFECT_API_URL": f"{services.prefect_url}/api",
            "PREFECT_HOME": str(services.folder / "prefect"),
            "COLUMNS": "300",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def registered(services: Running) -> list[str]:
    found = services.ask(f"{services.mlflow_url}/api/2.0/mlflow/model-versions/search")
    return [item["version"] for item in found.get("model_versions", [])]


def test_all_deployments_are_there(services: Running) -> None:
    found = services.ask(f"{services.prefect_url}/api/deployments/filter", {})
    flows = {
        item["id"]: item["name"]
        for item in services.ask(f"{services.prefect_url}/api/flows/filter", {})
    }
    names = {f"{flows[item['flow_id']]}/{item['name']}": item for item in found}
    assert set(names) == {
        "ursa/full-training",
        "ursa/scheduled-retraining",
        "ursa-data-preparation/default",
        "ursa-staged-training/default",
        "ursa-model-release/default",
    }
    assert all(item["enforce_parameter_schema"] for item in found)
    scheduled = names["ursa/scheduled-retraining"]
    assert scheduled["parameters"]["only_new"] is True
    assert [schedule["active"] for schedule in scheduled["schedules"]] == [False]
    assert scheduled["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("sorce_uri=/videos", "sorce_uri"),
        ("preset=tinny", "tinny"),
        ("only_new=perhaps", "only_new"),
        ('overrides={"stages": {"video_pretrain": {"max_stepz": 5}}}', "max_stepz"),
        ('overrides={"sead": 1}', "sead"),
    ],
)
def test_wrong_parameter_is_refused_at_submission(
    services: Running, parameter: str, named: str
) -> None:
    done = submit(services, parameter)
    assert done.returncode == 1
    assert named in done.stdout + done.stderr
    assert "UUID" not in done.stdout


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a failed run; there must be exactly one."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED: ")]
    assert len(lines) == 1, done.stdout
    assert "Traceback" not in done.stdout
    return lines[0]


def test_wrong_source_is_named(services: Running, source: Path, tmp_path: Path) -> None:
    # `make run` looks at SOURCE itself; here the flow gets one that is not there
    before = registered(services)
    wrong = f"--parameters=--param source_uri={tmp_path / 'nothing'}"
    done = services.script("run", "--source", str(source), wrong)
    assert str(tmp_path / "nothing") in failure(done)
    assert services.flow_run(done.stdout)["state"]["type"] == "FAILED"
    assert registered(services) == before


def test_source_without_videos_is_named(services: Running, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("no video")
    done = services.script("run", "--source", str(tmp_path / "texts"))
    assert "1 files, but none that may be a video" in failure(done)


def test_value_out_of_range_is_named(services: Running, source: Path) -> None:
    parameters = '--param overrides={"tokenization": {"num_frames": 6}}'
    done = services.script("run", "--source", str(source), f"--parameters={parameters}")
    assert "num_frames" in failure(done)


def test_unreachable_tracking_server_is_named(services: Running, source: Path) -> None:
    done = services.script(
        "run", "--source", str(source), URSA_MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    line = failure(done)
    assert "http://127.0.0.1:9" in line
    assert "make up" in line


def test_data_directory_that_cannot_be_written_is_named(
    services: Running, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = services.script(
        "run", "--source", str(source), URSA_DATA_URI=str(tmp_path / "file" / "data")
    )
    assert str(tmp_path / "file") in failure(done)


def test_doctor_finds_and_ends_a_run_without_a_process(services: Running) -> None:
    api = f"{services.prefect_url}/api"
    deployment = services.ask(f"{api}/deployments/name/ursa/full-training")
    left = services.ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    state = {"type": "RUNNING", "name": "Running"}
    services.ask(f"{api}/flow_runs/{left['id']}/set_state", {"state": state, "force": True})
    told = [
        [item.state for item in check_flow_runs(services.prefect_url, {}, fix=fix, min_age_s=age)]
        for fix, age in ((False, 3600.0), (False, 0.0), (True, 0.0), (False, 0.0))
    ]
    assert told == [["ok"], ["wrong"], ["mended"], ["ok"]]
    after = services.ask(f"{api}/flow_runs/{left['id']}")
    assert after["state"]["type"] == "CRASHED"
    done = subprocess.run(
        [sys.executable, "-c", "from ursa.cli import main; main()", "doctor", "--json"],
        env={
            **services.environment,
            "PREFECT_API_URL": api,
            "MLFLOW_TRACKING_URI": services.mlflow_url,
            "URSA_DATA_URI": str(services.folder / "data"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    wrong = [item for item in json.loads(done.stdout) if item["state"] == "wrong"]
    assert (done.returncode, wrong) == (0, []), done.stderr


def test_a_run_behind_a_forwarded_port_is_left_alone(services: Running) -> None:
    """As of a container, or a cluster: the address is a loopback one, the process elsewhere."""
    api = f"{services.prefect_url}/api"
    deployment = services.ask(f"{api}/deployments/name/ursa/full-training")
    run = services.ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    state = {"type": "RUNNING", "name": "Running"}
    services.ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    try:
        with forwarded(services.prefect_url) as address:
            for marks, why in ((None, ", as MLflow cannot be read"), ({}, "")):
                found = check_flow_runs(address, marks, fix=True, min_age_s=0.0)
                (told,) = [item for item in found if run["id"] in item.text]
                assert told.state == "note"
                assert told.text.endswith(f"is not known here{why}, so it is left alone")
        after = services.ask(f"{api}/flow_runs/{run['id']}")
        assert after["state"]["type"] == "RUNNING"
    finally:
        state = {"type": "CRASHED", "name": "Crashed"}
        services.ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


@contextlib.contextmanager
def forwarded(url: str) -> Iterator[str]:
    """Yield another loopback address of a server, as `kubectl port-forward` gives."""
    target = urllib.parse.urlsplit(url)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((target.hostname or "", target.port or 0)) as there:
                ends = {self.request: there, there: self.request}
                while True:
                    for end in select.select(list(ends), [], [])[0]:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        ends[end].sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def schedule(services: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ursa.cli import main; main()", "schedule", *arguments],
        cwd=services.folder,
        env={**services.environment, "PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def retraining(services: Running) -> dict[str, Any]:
    api = f"{services.prefect_url}/api"
    return dict(services.ask(f"{api}/deployments/name/ursa/scheduled-retraining"))


def zombie_automation(services: Running) -> tuple[dict[str, Any], str]:
    """Return the automation that looks for runs without heartbeat, and its address."""
    address = f"{services.prefect_url}/api/automations"
    query = {"automations": {"name": {"any_": ["ursa-run-without-heartbeat"]}}}
    (found,) = services.ask(f"{address}/filter", query)
    return found, f"{address}/{found['id']}"


@pytest.mark.slow
def test_schedule_and_automation_stay_on_or_off_when_deployed_again(
    services: Running, deployment: dict[str, Any]
) -> None:
    assert not deployment["schedules"][0]["active"]
    (services.folder / "clips").mkdir(exist_ok=True)
    assert schedule(services, "show").stdout.startswith("off: cron 0 3 * * 1 UTC\n")
    options = ("--source", "clips", "--set", "retraining.max_steps=2")
    done = schedule(services, "on", *options, "--json")
    assert done.returncode == 0, done.stderr
    found, source = json.loads(done.stdout), str(services.folder / "clips")
    assert found["active"]
    given = {"source_uri": source, "overrides": {"retraining": {"max_steps": 2}}}
    wanted = {"preset": "tiny", "only_new": True, **given}
    assert found["parameters"] == found["event_parameters"] == wanted

    automation, address = zombie_automation(services)
    assert automation["enabled"]
    httpx.patch(address, json={"enabled": False}).raise_for_status()
    deployed = services.script("deploy")
    assert deployed.returncode == 0, deployed.stdout
    after, _ = zombie_automation(services)
    assert (after["id"], after["enabled"]) == (automation["id"], False), "somebody has paused it"
    httpx.patch(address, json={"enabled": True}).raise_for_status()
    kept = retraining(services)
    assert kept["parameters"] == wanted, "what the event starts"
    assert (kept["schedules"][0]["active"], kept["schedules"][0]["parameters"]) == (True, given)

    restored = deploy_by_bootstrap(services)
    assert (restored["parameters"], restored["schedules"][0]["active"]) == (wanted, True)

    done = schedule(services, "off")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("off: ")
    assert not retraining(services)["schedules"][0]["active"]


def deploy_by_bootstrap(services: Running) -> dict[str, Any]:
    """Deploy as in a deployment past one machine; return what the retraining is then."""
    code = "from infra.bootstrap import deploy, deployments; deploy(deployments(None, None))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**services.environment, "PREFECT_API_URL": f"{services.prefect_url}/api"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return retraining(services)


KILLED = """
import os, runpy, signal, subprocess, sys
run = subprocess.run
def killed(command, *arguments, **options):
    done = run(command, *arguments, **options)
    if "deploy" in command:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
subprocess.run = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script, and kills it as soon as `prefect deploy` is done."""


@pytest.mark.slow
@pytest.mark.parametrize("script", [["infra/local/services.py", "deploy"], ["infra/bootstrap.py"]])
def test_a_kill_while_deploying_leaves_the_schedule_on(
    services: Running, deployment: dict[str, Any], script: list[str], tmp_path: Path
) -> None:
    assert schedule(services, "on", "--source", str(tmp_path), "--preset", "small").returncode == 0
    before = retraining(services)
    server = {"PREFECT_API_URL": f"{services.prefect_url}/api", "URSA_HOME": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *script],
        cwd=ROOT,
        env={**services.environment, **server},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    after = retraining(services)
    assert after["updated"] > before["updated"]
    names = ("id", "active", "parameters", "schedule")
    assert [{name: item[name] for name in names} for item in after["schedules"]] == [
        {name: item[name] for name in names} for item in before["schedules"]
    ]
    assert after["schedules"][0]["active"]
    assert after["parameters"] == before["parameters"]
    assert after["parameters"]["source_uri"] == str(tmp_path)
    deployed = services.script("up")
    assert deployed.returncode == 0, deployed.stdout
    assert retraining(services)["schedules"][0]["active"]


@pytest.fixture
def deployment(services: Running) -> Iterator[dict[str, Any]]:
    """The deployment; afterwards it is as it was, for what else runs on these services."""
    before = retraining(services)
    yield before
    address = f"{services.prefect_url}/api/deployments/{before['id']}"
    services.ask(address, {"parameters": before["parameters"]}, "PATCH")
    (weekly,) = before["schedules"]
    change = {"active": False, "parameters": weekly["parameters"]}
    services.ask(f"{address}/schedules/{weekly['id']}", change, "PATCH")


def test_event_and_run_use_what_the_schedule_was_given(
    services: Running, deployment: dict[str, Any], tmp_path: Path
) -> None:
    api = f"{services.prefect_url}/api"
    done = schedule(services, "on", "--source", str(tmp_path), "--preset", "small")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"     {tmp_path} with preset small; " in done.stdout
    assert done.stdout.count("\n") == 2
    # what the server starts for the event and `ursa schedule run` has the deployment's parameters
    started = services.ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    assert (started["parameters"]["source_uri"], started["parameters"]["preset"]) == (
        str(tmp_path),
        "small",
    )
    services.ask(f"{api}/flow_runs/{started['id']}", method="DELETE")

    # somebody edits the schedule in Prefect: that is said, and mended by `on`
    (weekly,) = deployment["schedules"]
    address = f"{api}/deployments/{deployment['id']}/schedules/{weekly['id']}"
    services.ask(address, {"parameters": {"preset": "tiny"}}, "PATCH")
    shown = schedule(services, "show").stdout
    assert f"     {tmp_path} with preset tiny; " in shown
    assert f"but the event and `ursa schedule run`: {tmp_path} with preset small; " in shown
    assert "but the event" not in schedule(services, "on").stdout
    assert retraining(services)["parameters"]["preset"] == "tiny"

    # changed values are those of the last call that names some, and none with a preset alone
    for options, overrides in (
        (("--set", "seed=3"), {"seed": 3}),
        ((), {"seed": 3}),
        (("--set", "retraining.max_steps=2"), {"retraining": {"max_steps": 2}}),
        (("--preset", "tiny"), None),
    ):
        done = schedule(services, "on", *options)
        assert done.returncode == 0, done.stderr
        assert retraining(services)["parameters"]["overrides"] == overrides
    assert f"     {tmp_path} with preset tiny; " in done.stdout


def test_only_runs_of_the_schedule_are_its_next_ones(
    services: Running, deployment: dict[str, Any]
) -> None:
    """One by hand or of the event may wait: for a worker, or for its time."""
    api = f"{services.prefect_url}/api"
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    body = {"state": later}
    waiting = services.ask(f"{api}/deployments/{deployment['id']}/create_flow_run", body)
    try:
        assert schedule(services, "off").stdout.splitlines()[0] == "off: cron 0 3 * * 1 UTC"
        schedule(services, "on")
        deadline = time.monotonic() + 100
        while (due := json.loads(schedule(services, "show", "--json").stdout)["next"]) is None:
            assert time.monotonic() < deadline, "the server has planned no run"
            time.sleep(2)
        assert due.partition("T")[0] < "2099"
    finally:
        services.ask(f"{api}/flow_runs/{waiting['id']}", method="DELETE")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["on", "--source", "gone"], "--source gone does not exist (/"),
        (["run", "--source", "gone"], "--source gone does not exist (/"),
        (["on", "--source", "ftp://host/x"], "--source 'ftp://host/x' is no source; give a"),
        (["on", "--source", "https://a:b@host/x"], "the address in argument 4 holds a user name"),
        (["on", "--preset", "tinny"], "preset must be one of tiny, small, got 'tinny'"),
        (["run", "--preset", "tinny"], "preset must be one of tiny, small, got 'tinny'"),
        (["on", "--set", "retraining.max_stepz=2"], "max_stepz: "),
        (
            ["on", "--set", "retraining.max_steps=-2"],
            "retraining.max_steps: Input should be greater",
        ),
    ],
)
def test_what_every_run_would_refuse_is_refused_at_once(
    services: Running,
    deployment: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    runs = {"deployments": {"id": {"any_": [deployment["id"]]}}}
    before = services.ask(f"{services.prefect_url}/api/flow_runs/count", runs)
    done = schedule(services, *options)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Prefect at" not in line
    after = retraining(services)
    assert after["parameters"] == deployment["parameters"]
    assert after["schedules"][0]["active"] == deployment["schedules"][0]["active"]
    assert services.ask(f"{services.prefect_url}/api/flow_runs/count", runs) == before


def test_a_source_that_only_workers_see_is_taken_with_a_warning(
    services: Running, deployment: dict[str, Any]
) -> None:
    done = schedule(services, "on", "--source", "file:///on/the/workers", "--json")
    assert done.returncode == 0, done.stderr
    warning = "warning: /on/the/workers is not on this machine; workers must find it\n"
    assert done.stderr == warning
    assert retraining(services)["parameters"]["source_uri"] == "/on/the/workers"


def test_a_mistake_about_the_schedule_is_one_line(services: Running) -> None:
    for url, words in (
        (f"http://127.0.0.1:{running_services.free_port()}", "no Prefect server answers at"),
        (services.mlflow_url, "Prefect at"),  # a server of another kind
    ):
        done = schedule(services._replace(prefect_url=url), "off")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {words}"), line
        assert url in line


def test_a_server_without_the_deployment_says_how_to_make_it(
    services: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "DEPLOYMENT", "ursa/gone")
    with pytest.raises(ConfigError, match=r"no deployment ursa/gone; make it with `make deploy`"):
        schedules.switch(services.prefect_url, active=True, parameters={})
