"""The whole run on the services of compose.yaml: PostgreSQL, S3, passwords and tokens everywhere.

As plain processes of this machine, started with the commands, variables, secrets and scripts that
the containers are given. For root, the file system is read-only to them as it is to containers.
"""

import base64
import importlib.util
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import psutil
import pytest

from tests.compose_stack import ROOT, Stack, postgres_binaries
from tests.running_services import TINY, changed

MISSING = [
    name
    for name, found in {
        "the server of PostgreSQL (initdb, postgres)": postgres_binaries(),
        "the extra `server` (psycopg, Flask-WTF)": importlib.util.find_spec("psycopg")
        and importlib.util.find_spec("flask_wtf"),
    }.items()
    if not found
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

VIDEOS = ("tree_hand.mp4", "city_night.mp4", "cardboard_box.mp4", "captions.jsonl")
HEARTBEAT_LIMIT_S = 90
"""`within` of the automation for runs without heartbeat."""


class Client:
    """Asks the services as a user would."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.prefect_user = stack.secret("prefect-auth")
        self.mlflow_user = f"ursa:{stack.secret('mlflow-password')}"
        self.mlflow_admin = f"admin:{stack.secret('mlflow-admin-password')}"

    def ask(
        self,
        service: str,
        path: str,
        body: Any = None,
        *,
        user: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Send a GET or a POST; return the decoded answer, or the status of a refusal."""
        login = base64.b64encode((user or "").encode()).decode()
        call = urllib.request.Request(
            f"{self.stack.address(service)}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Basic {login}"} if user else {}),
                **(headers or {}),
            },
        )
        try:
            with urllib.request.urlopen(call, timeout=20) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code
        return json.loads(text) if text.startswith(("{", "[", '"', "true")) else text

    def prefect(self, path: str, body: Any = None) -> Any:
        """Ask Prefect with password and, as it insists, a CSRF token."""
        headers = {}
        if body is not None:
            token = self.ask(
                "prefect-server", "/api/csrf-token?client=test", user=self.prefect_user
            )
            headers = {"Prefect-Csrf-Token": token["token"], "Prefect-Csrf-Client": "test"}
        return self.ask(
            "prefect-server", f"/api{path}", body, user=self.prefect_user, headers=headers
        )

    def flow_run(self, run_id: str) -> dict[str, Any]:
        return dict(self.prefect(f"/flow_runs/{run_id}"))

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        query = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_DESC"}
        return list(self.prefect("/flow_runs/filter", query))

    def wait(self, run_id: str, types: set[str], limit_s: float) -> dict[str, Any]:
        """Wait until a run is in a state of these types."""
        deadline = time.monotonic() + limit_s
        while (run := self.flow_run(run_id))["state"]["type"] not in types:
            assert time.monotonic() < deadline, run["state"]
            time.sleep(1)
        return run

    def versions(self) -> list[dict[str, Any]]:
        path = "/api/2.0/mlflow/model-versions/search?filter=name%3D'ursa'"
        return list(self.ask("mlflow", path, user=self.mlflow_user).get("model_versions", []))


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=3).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    stack = Stack()
    try:
        stack.start_postgres()
        stack.start_s3()
        for service in ("prefect-server", "mlflow", "ray-head"):
            stack.start(service)
        addresses = {
            "s3": stack.address("s3"),
            "prefect-server": f"{stack.address('prefect-server')}/api/health",
            "mlflow": f"{stack.address('mlflow')}/health",
        }
        for service, address in addresses.items():
            stack.wait(service, lambda address=address: answers(address))
        stack.wait("ray-head", lambda: listens(stack.port("ray-head")))
        for _ in range(2):  # the second time nothing is there twice
            assert "ready for runs" in stack.run("bootstrap", *stack.command("bootstrap")[1:])
        for name in VIDEOS:
            data = (ROOT / "tests" / "data" / "videos" / name).read_bytes()
            bucket_client(stack).put_object(Bucket="ursa", Key=f"videos/{name}", Body=data)
        stack.start("prefect-worker")
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="module")
def client(stack: Stack) -> Client:
    return Client(stack)


def bucket_client(stack: Stack) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=stack.address("s3"),
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def keys(stack: Stack, bucket: str) -> list[str]:
    pages = bucket_client(stack).get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def begin(stack: Stack, overrides: dict[str, Any], deployment: str = "full-training") -> str:
    """Start a run as a user does; return its id."""
    text = stack.run(
        "prefect-worker",
        *("prefect", "deployment", "run", f"ursa/{deployment}"),
        *("--param", f"overrides={json.dumps(overrides)}"),
    )
    found = re.search(r"UUID: ([0-9a-f-]{36})", text)
    assert found, text
    return found[1]


@pytest.fixture(scope="module")
def finished(stack: Stack, client: Client) -> dict[str, Any]:
    run = client.wait(
        begin(stack, TINY), {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}, limit_s=900
    )
    log = stack.log("prefect-worker").read_text(errors="replace")
    assert run["state"]["type"] == "COMPLETED", (run["state"], log[-5000:])
    return run


def test_bootstrap_sets_up_everything_once(client: Client) -> None:
    assert {(item["name"], item["work_pool_name"]) for item in deployments(client)} == {
        (name, "ursa") for name in ("full-training", "scheduled-retraining", "default")
    }
    sources = {item["parameters"]["source_uri"] for item in deployments(client)}
    assert sources == {"s3://ursa/videos"}
    names = [item["name"] for item in client.prefect("/automations/filter", {})]
    # nobody has made a notification block, so there is no automation that needs one
    assert sorted(names) == ["ursa-new-data", "ursa-run-without-heartbeat"]


def deployments(client: Client) -> list[dict[str, Any]]:
    return list(client.prefect("/deployments/filter", {}))


def test_whole_run(stack: Stack, client: Client, finished: dict[str, Any]) -> None:
    assert "registered ursa version 1" in finished["state"]["message"]
    (version,) = client.versions()
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert tags["ursa.source_uri"] == "s3://ursa/videos"
    steps = {key.split("/")[1] for key in keys(stack, "ursa") if key.startswith("data/")}
    assert steps >= {
        *("clips", "selections", "tokenizers", "tokens", "checkpoints", "models", "evaluations"),
    }
    artifacts = keys(stack, "mlflow")
    assert any(key.endswith(".safetensors") for key in artifacts), artifacts
    assert any(key.endswith("gallery.html") for key in artifacts)


def test_records_are_in_postgresql(stack: Stack, finished: dict[str, Any]) -> None:
    import psycopg

    def count(user: str, database: str, table: str) -> int:
        with psycopg.connect(
            host="127.0.0.1",
            port=stack.port("postgres"),
            user=user,
            password=stack.secret(f"{user}-database-password"),
            dbname=database,
        ) as connection:
            row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert row is not None
        return int(row[0])

    assert count("prefect", "prefect", "flow_run") >= 4
    assert count("mlflow", "mlflow", "runs") >= 4
    assert count("mlflow", "mlflow_auth", "users") == 2
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        count("mlflow", "prefect", "flow_run")


def test_run_again_changes_nothing(stack: Stack, client: Client, finished: dict[str, Any]) -> None:
    before = keys(stack, "ursa")
    run = client.wait(begin(stack, TINY), {"COMPLETED", "FAILED", "CRASHED"}, limit_s=180)
    assert run["state"]["name"] == "NothingChanged", run["state"]
    assert keys(stack, "ursa") == before
    assert len(client.versions()) == 1


def test_event_starts_a_retraining(stack: Stack, client: Client, finished: dict[str, Any]) -> None:
    stack.run(
        "prefect-worker",
        *("prefect", "event", "emit", "ursa.data.new", "--resource-id", "ursa.source.videos"),
    )
    deadline = time.monotonic() + 60
    while not (runs := client.runs_of("scheduled-retraining")):
        assert time.monotonic() < deadline
        time.sleep(1)
    run = client.wait(runs[0]["id"], {"COMPLETED", "FAILED", "CRASHED"}, limit_s=180)
    assert run["state"]["name"] == "NoNewData", run["state"]


def test_nobody_comes_in_without_a_password(client: Client) -> None:
    assert client.ask("prefect-server", "/api/health") is True
    assert client.ask("prefect-server", "/api/csrf-token?client=test") == 401
    assert client.ask("prefect-server", "/api/work_pools/ursa") == 401
    assert client.ask("prefect-server", "/api/work_pools/ursa", user="ursa:wrong") == 401
    search = "/api/2.0/mlflow/registered-models/search"
    assert client.ask("mlflow", "/health") == "OK"
    assert client.ask("mlflow", search) == 401
    assert client.ask("mlflow", search, user="ursa:wrong") == 401
    assert client.ask("mlflow", search, user="admin:password1234") == 401


@pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp_cors"), reason="the dashboard comes with ray[default]"
)
def test_ray_asks_for_its_token(stack: Stack, client: Client) -> None:
    def status(token: str | None) -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return client.ask("dashboard", "/api/jobs/", headers=headers)

    assert status(None) == 401
    assert status("wrong") == 403
    assert isinstance(status(stack.secret("ray-token")), list)


def test_other_pages_of_a_browser_are_refused(client: Client) -> None:
    # a password that the browser adds is not enough to change something
    assert client.ask("prefect-server", "/api/flow_runs/count", {}, user=client.prefect_user) == 403
    assert isinstance(client.prefect("/flow_runs/count", {}), int | str)
    search = "/api/2.0/mlflow/registered-models/search"
    evil = {"Host": "evil.example"}
    assert client.ask("mlflow", search, user=client.mlflow_user, headers=evil) == 403
    origin = {"Origin": "http://evil.example"}
    create = "/api/2.0/mlflow/experiments/create"
    assert (
        client.ask("mlflow", create, {"name": "x"}, user=client.mlflow_user, headers=origin) == 403
    )


def test_pipeline_is_no_administrator(client: Client) -> None:
    user = {"username": "another", "password": "long enough 12"}
    create = "/api/2.0/mlflow/users/create"
    assert client.ask("mlflow", create, user, user=client.mlflow_user) == 403
    assert client.ask("mlflow", create, user, user=client.mlflow_admin)["user"]["is_admin"] is False


def test_no_secret_is_shown(stack: Stack, client: Client, finished: dict[str, Any]) -> None:
    values = {
        path.name: path.read_text().rpartition(":")[2]
        for path in stack.secrets.iterdir()
        if path.name != "s3.json"
    }
    assert len(values) == 11
    assert all(len(value) == 48 for value in values.values())
    texts = {path.name: path.read_text(errors="replace") for path in stack.folder.glob("logs/*")}
    lines = client.prefect("/logs/filter", {"limit": 200})
    texts["flow run"] = json.dumps([lines, client.prefect("/flow_runs/filter", {})])
    for service in stack.processes:
        commands = [" ".join(process.cmdline()) for process in stack.family(service)]
        texts[f"commands of {service}"] = "\n".join(commands)
    assert len(texts) > 10
    shown = [
        (name, where) for where, text in texts.items() for name, v in values.items() if v in text
    ]
    assert shown == []


def test_services_listen_on_loopback_only(stack: Stack) -> None:
    # Ray listens on all addresses whatever it is told: its token and the network protect it
    for service in ("postgres", "s3", "prefect-server", "mlflow"):
        listening = {
            connection.laddr.ip
            for process in stack.family(service)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}, service


def test_run_of_a_lost_machine_is_marked_as_crashed(
    stack: Stack, client: Client, finished: dict[str, Any]
) -> None:
    longer = {"stages": {"image_pretrain": {"max_steps": 100_000}}}
    run_id = begin(stack, changed(longer, TINY))
    client.wait(run_id, {"RUNNING"}, limit_s=120)
    time.sleep(20)
    # worker and run are gone at once, so that nobody is left who could tell
    stack.kill("prefect-worker")
    lost = time.monotonic()
    assert client.flow_run(run_id)["state"]["type"] == "RUNNING"
    run = client.wait(run_id, {"CRASHED"}, limit_s=HEARTBEAT_LIMIT_S + 60)
    assert "No heartbeat" in run["state"]["message"]
    assert time.monotonic() - lost > HEARTBEAT_LIMIT_S - 35
    # runs that have ended before have kept their states
    assert client.flow_run(finished["id"])["state"]["type"] == "COMPLETED"
