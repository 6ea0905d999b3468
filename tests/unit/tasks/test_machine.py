"""What the doctor sees of this machine: real packages, sockets, servers and disks."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from tasks import commands, machine

LISTEN = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listening(host: str, *words: str, **variables: str) -> Iterator[int]:
    """Start a process that listens and has words in its command line."""
    command = [sys.executable, "-c", LISTEN, host, *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables or None
    ) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline())
        child.kill()


def ports(port: int) -> list[machine.Finding]:
    found = machine.check_security("sqlite:///x", "sqlite:///x")
    return [item for item in found if f"port {port} " in item.text]


def test_a_service_that_others_reach_is_wrong_and_one_on_loopback_is_not() -> None:
    with listening("0.0.0.0", "mlflow") as port:
        (finding,) = ports(port)
        assert (finding.area, finding.state) == ("security", "wrong")
        assert "open to other machines on 0.0.0.0" in finding.text
    with listening("127.0.0.1", "mlflow") as port:
        assert ports(port) == []


def own_address() -> str:
    """Return an address of this machine that others reach."""
    for addresses in psutil.net_if_addrs().values():
        for item in addresses:
            if item.family == socket.AF_INET and not item.address.startswith("127."):
                return item.address
    pytest.skip("this machine has no address but the loopback one")


def test_the_command_names_a_port_that_is_open_on_an_address_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = own_address()
    with listening(address, "prefect", "server") as port:
        socket.create_connection((address, port), timeout=5).close()
        found = commands.doctor(
            tracking_uri="http://127.0.0.1:9",
            prefect_url="http://127.0.0.1:9",
            root_uri=str(tmp_path),
            fix=False,
            security=True,
        )
        (line,) = [item for item in found if f"port {port} " in item["text"]]
    assert (line["area"], line["state"]) == ("security", "wrong")
    assert f"open to other machines on {address}" in line["text"]
    assert "127.0.0.1" in line["advice"]


def test_ray_may_be_reached_if_it_demands_a_token() -> None:
    with listening("0.0.0.0", "raylet") as port:
        assert ports(port)[0].state == "wrong"
    with listening("0.0.0.0", "raylet", RAY_AUTH_MODE="token") as port:
        assert ports(port)[0].state == "note"


@pytest.mark.parametrize(
    ("variable", "value", "is_known"),
    [
        ("PREFECT_SERVER_API_AUTH_STRING", "admin:pass", True),
        ("AWS_SECRET_ACCESS_KEY", "minioadmin", True),
        ("AWS_SECRET_ACCESS_KEY", "a secret of mine", False),
    ],
)
def test_passwords_that_everybody_knows(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, is_known: bool
) -> None:
    monkeypatch.setenv(variable, value)
    texts = [item.text for item in machine.check_security("sqlite:///x", "sqlite:///x")]
    assert (f"{variable} is a value that everybody knows" in texts) == is_known
    assert not any(value in text for text in texts)


class Guarded(http.server.BaseHTTPRequestHandler):
    """Answers those alone who know the password of MLflow's documentation."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Basic YWRtaW46cGFzc3dvcmQxMjM0"
        self.send_response(200 if known else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_default_password_is_found() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    texts = [item.text for item in machine.check_security(url, "sqlite:///x")]
    assert f"MLflow at {url} takes the password of its documentation" in texts
    assert machine.check_service("mlflow", url, "/health").state == "ok"
    server.shutdown()
    server.server_close()


def test_whoever_has_the_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ANSWER_LIMIT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = machine.check_service("mlflow", f"http://127.0.0.1:{port}", "/health")
    assert finding.state == "wrong"
    assert f"the port is used by {machine.psutil.Process().name()}" in finding.text
    assert "URSA_MLFLOW_PORT" in finding.advice
    assert "make up" in machine.check_service("mlflow", "http://127.0.0.1:9", "/").advice


def test_installation_is_as_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {item.state for item in machine.check_installation()} == {"ok"}
    needs = [Requirement("numpy>=99"), Requirement("no-such-package"), Requirement("av")]
    monkeypatch.setattr(machine, "_requirements", lambda: needs)
    texts = [item.text for item in machine.check_installation() if item.state == "wrong"]
    assert any("numpy" in text and ">=99 is needed" in text for text in texts)
    assert "no-such-package is missing" in texts
    monkeypatch.setattr(machine, "MIN_FFMPEG", (99, 0))
    (old,) = [item for item in machine.check_installation() if "FFmpeg" in item.text]
    assert old.state == "wrong"


def test_room_and_store(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = list(machine.check_room(str(tmp_path)))
    assert {item.state for item in good} == {"ok"}
    new = list(machine.check_room(str(tmp_path / "new" / "root")))
    assert [item.state for item in new if item.area == "store"] == ["note"]
    assert not (tmp_path / "new").exists(), "a look makes nothing"
    (tmp_path / "file").write_text("")
    bad = list(machine.check_room(str(tmp_path / "file")))
    assert [item.area for item in bad if item.state == "wrong"] == ["store"]
    monkeypatch.setattr(machine, "MIN_FREE_BYTES", 1 << 60)
    full = [item for item in machine.check_room(str(tmp_path)) if item.state == "wrong"]
    assert {item.area for item in full} == {"disk"}


def test_checkpoints_that_were_never_finished(tmp_path: Path) -> None:
    """What has a marker, and what may be a save under way, stays."""
    stage = tmp_path / "checkpoints" / "image_pretrain" / "key"
    for name, age_s, is_whole in (
        ("step-00000010.aa", 200_000, True),
        ("step-00000020.bb", 200_000, False),
        ("step-00000030.cc", 60, False),
    ):
        files = ["state.safetensors", *(["COMMITTED.json"] if is_whole else [])]
        for file in files:
            path = stage / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0" * 100)
            os.utime(path, (time.time() - age_s,) * 2)
    (finding,) = machine.check_checkpoints(str(tmp_path), fix=False)
    assert finding.state == "note"
    assert finding.text.startswith("1 checkpoints, 0.00 GiB, were never finished")
    assert finding.text.endswith("step-00000020.bb")
    assert len(list(stage.iterdir())) == 3
    (finding,) = machine.check_checkpoints(str(tmp_path), fix=True)
    assert finding.state == "mended"
    assert {path.name for path in stage.iterdir()} == {"step-00000010.aa", "step-00000030.cc"}
    assert not [*machine.check_checkpoints(str(tmp_path), fix=True)]
    assert not [*machine.check_checkpoints(str(tmp_path / "nothing"), fix=True)]
