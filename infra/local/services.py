"""Start, stop and use the embedded services: Prefect server and worker, MLflow server.

Plain processes on 127.0.0.1, each in its own session, with logs, data and pid files below one
directory of the checkout (`.ursa`, or URSA_STATE_DIR). A pid file holds the pid and the start
time of the process, so that a recycled pid is never touched. Usage: services.py up|down|run|status
"""

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = Path(os.environ.get("URSA_STATE_DIR") or ROOT / ".ursa").resolve()
BIN = Path(sys.executable).parent
POOL = "ursa"
TRAINING_VIEW = "?workflowType=machine_learning"
"""Of MLflow's pages: not the menu for language-model applications."""
DEPLOYMENT = "ursa/full-training"
RETRAINING = "ursa/scheduled-retraining"
AUTOMATIONS = ROOT / "infra" / "automations.yaml"
MARK = "URSA_SERVICES"
START_LIMIT_S = 180.0
STOP_LIMIT_S = 12.0
PROGRESS_EVERY_S = 30.0
LOG_STARTS: dict[str, int] = {}
"""Where the output of a service that this process has started begins in its log."""
NOISE = re.compile(
    r"AwaitingConcurrencySlot|Aborted submission|Worker .* submitting flow run"
    r"|^\s*non-pending state"  # the rest of the second, where a line is too long
    r"|prefect\.(flow-run\.heartbeat|artifact\.updated|artifact-collection\.)"
)
"""What is said several times a second while a run waits, and all the time while it works."""
RUN_ID = re.compile(r"UUID: ([0-9a-f-]{36})")

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # threads that wait must not spin: beside other processes spinning costs a factor of nine
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    # what infra/automations.yaml goes by; Prefect sends none more often
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "ursa",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
    "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PYTHONUNBUFFERED": "1",
}
WORKER_VARIABLES = ("URSA_", "AWS_", "MLFLOW_", "RAY_", "FSSPEC_", "OMP_", "CUDA_")


class ServiceError(Exception):
    """One line that says what is wrong and what to do."""


class Service(NamedTuple):
    """One long-lived process."""

    name: str
    port: int | None
    health: str | None
    command: tuple[str, ...]
    variable: str | None = None

    @property
    def url(self) -> str:
        """Address of the service."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid_file(self) -> Path:
        """Where pid, start time and port are kept."""
        return STATE / "run" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """Where the output goes."""
        return STATE / "logs" / f"{self.name}.log"


def say(text: str) -> None:
    """Write one line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def start_time(pid: int) -> str | None:
    """Return what tells a process from a later one with the same pid; None when it is gone."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else f"{boot}:{stat[19]}"
    if Path("/proc/self/stat").exists():
        return None
    with contextlib.suppress(psutil.Error):
        return f"{psutil.Process(pid).create_time():.1f}"
    return None


def read_pid_file(service: Service) -> dict[str, Any] | None:
    """Return the content of a pid file whose process still lives."""
    try:
        content = json.loads(service.pid_file.read_text())
        if content["start"] is not None and start_time(content["pid"]) == content["start"]:
            return dict(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def recorded_port(name: str, variable: str, default: int) -> int:
    """Return the port asked for, else the one in use by a living service, else the default."""
    asked = os.environ.get(variable)
    if asked:
        if not asked.isdigit() or not 0 < int(asked) < 65536:
            raise ServiceError(f"{variable} must be a port from 1 to 65535, got {asked!r}")
        return int(asked)
    living = read_pid_file(Service(name, None, None, ()))
    return int(living["port"]) if living and living.get("port") else default


def services() -> tuple[Service, Service, Service]:
    """Return the three services: Prefect, MLflow, worker."""
    prefect_port = recorded_port("prefect", "URSA_PREFECT_PORT", 4200)
    mlflow_port = recorded_port("mlflow", "URSA_MLFLOW_PORT", 5000)
    host = ("--host", "127.0.0.1", "--port")
    return (
        Service(
            "prefect",
            prefect_port,
            "/api/health",
            (str(BIN / "prefect"), "server", "start", *host, str(prefect_port)),
            "URSA_PREFECT_PORT",
        ),
        Service(
            "mlflow",
            mlflow_port,
            "/health",
            (
                *(str(BIN / "mlflow"), "server", *host, str(mlflow_port), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{STATE}/mlflow/mlflow.db"),
                *("--artifacts-destination", str(STATE / "mlflow" / "artifacts")),
            ),
            "URSA_MLFLOW_PORT",
        ),
        Service(
            "worker",
            None,
            None,
            (
                *(str(BIN / "prefect"), "worker", "start", "--pool", POOL, "--type", "process"),
                *("--name", "local", "--limit", "4", "--install-policy", "never"),
            ),
        ),
    )


def environment() -> dict[str, str]:
    """Return the environment of every child: quiet, and pointing at our services."""
    prefect, mlflow, _ = services()
    values = {**QUIET, **os.environ}
    values.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    values.setdefault("URSA_MLFLOW_TRACKING_URI", mlflow.url)
    values.setdefault("URSA_DATA_URI", str(STATE / "data"))
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    values.update(
        PATH=os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
        PREFECT_HOME=str(STATE / "prefect"),
        PREFECT_API_URL=f"{prefect.url}/api",
        MLFLOW_TRACKING_URI=values["URSA_MLFLOW_TRACKING_URI"],
        PYTHONPATH=os.pathsep.join(dict.fromkeys(python_path)),
        URSA_HOME=str(ROOT),
    )
    for name in ("PREFECT_PROFILE", "PREFECT_API_KEY", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"):
        values.pop(name, None)
    values[MARK] = str(STATE)
    return values


def worker_environment_hash(*services: Service) -> str:
    """Return a hash of what the worker hands to flow runs; a changed one restarts it."""
    chosen = {k: v for k, v in environment().items() if k.startswith(WORKER_VARIABLES)}
    chosen |= {service.name: service.url for service in services}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def request(
    url: str, body: Any = None, *, timeout_s: float = 10.0, method: str | None = None
) -> Any:
    """Send a GET, or a POST with a JSON body; return the decoded answer."""
    call = urllib.request.Request(  # noqa: S310  (our own http:// addresses)
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(call, timeout=timeout_s) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


def healthy(service: Service) -> bool:
    """Whether the service answers."""
    try:
        request(f"{service.url}{service.health}", timeout_s=5.0)
    except (OSError, http.client.HTTPException, ValueError):
        return False
    return True


def port_owner(port: int) -> psutil.Process | None:
    """Return the process that listens on a port, if it may be seen."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address and address.port == port:
                return psutil.Process(connection.pid) if connection.pid else None
    return None


def port_taken(port: int) -> bool:
    """Whether something holds the port on the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def is_ours(process: psutil.Process) -> bool:
    """Whether a process was started, directly or not, by the services of this checkout."""
    try:
        return bool(process.environ().get(MARK) == str(STATE))
    except psutil.Error:
        return False


def our_processes() -> list[psutil.Process]:
    """Return all processes that carry our mark, without this one and its ancestors."""
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    return [item for item in psutil.process_iter() if item.pid not in spared and is_ours(item)]


def find_lost(service: Service) -> psutil.Process | None:
    """Return a process of a service that we have started, but whose pid file is gone."""
    wanted = list(service.command[:3])
    for process in our_processes():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if wanted in (command[:3], command[1:4]):
                return process
    return None


def write_pid_file(service: Service, pid: int, **extra: str) -> None:
    """Record a started process."""
    content = {"pid": pid, "start": start_time(pid), "port": service.port, **extra}
    service.pid_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = service.pid_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(service.pid_file)


def launch(service: Service, **extra: str) -> None:
    """Start a service in its own session with its output in a log file."""
    service.log.parent.mkdir(parents=True, exist_ok=True)
    if service.log.exists() and service.log.stat().st_size > 20 << 20:
        service.log.replace(service.log.with_suffix(".log.old"))
    (STATE / "mlflow").mkdir(parents=True, exist_ok=True)
    with service.log.open("ab") as log:
        LOG_STARTS[service.name] = log.tell()
        child = subprocess.Popen(
            service.command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    write_pid_file(service, child.pid, **extra)


def make_room(service: Service) -> bool:
    """Free the port of a server that is to be started; False if ours is up on it already."""
    living = read_pid_file(service)
    if living and living.get("port") == service.port:
        return False
    if living:
        say(f"{service.name}: moving from port {living.get('port')} to {service.port}")
        stop(service)
    lost = find_lost(service)
    if lost is not None and lost.cmdline()[-len(service.command) :] == list(service.command):
        write_pid_file(service, lost.pid)
        return False
    if lost is not None:
        stop_processes([lost, *lost.children(recursive=True)])
    assert service.port is not None
    if port_taken(service.port):
        owner = port_owner(service.port)
        if owner is not None and is_ours(owner):  # started by us, pid file lost
            stop_processes([owner, *owner.children(recursive=True)])
        if port_taken(service.port):
            who = f"{owner.name()} (pid {owner.pid})" if owner else "another process"
            raise ServiceError(
                f"port {service.port} for {service.name} is used by {who}; stop it, or choose "
                f"another port: {service.variable}={service.port + 10} make up"
            )
    return True


def wait_healthy(service: Service) -> None:
    """Wait until a server answers; say why when it does not."""
    deadline = time.monotonic() + START_LIMIT_S
    begin = LOG_STARTS.get(service.name, 0)
    while not healthy(service):
        if read_pid_file(service) is None:
            service.pid_file.unlink(missing_ok=True)
            why = last_line(service.log, begin)
            raise ServiceError(
                f"{service.name} did not start: {why}; see {service.log}, and "
                f"if its data are damaged or of another version move {STATE / service.name} away"
            )
        if time.monotonic() > deadline:
            stop(service)
            raise ServiceError(
                f"{service.name} did not answer at {service.url} within {START_LIMIT_S:.0f} s; "
                f"see {service.log}, then try again"
            )
        time.sleep(0.2)


def last_line(log: Path, begin: int = 0) -> str:
    """Return the last line of a log, from a byte on, that looks like a cause."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[begin:].decode(errors="replace")
        lines = [line.strip() for line in text[-8000:].splitlines()]
        causes = [line for line in lines if re.search(r"(Error|error|Exception|in use)\b", line)]
        if causes or lines:
            return (causes or lines)[-1][:300]
    return "no output"


def stop_processes(processes: list[psutil.Process]) -> None:
    """Terminate processes, kill what is left after a while."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=STOP_LIMIT_S)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def stop(service: Service) -> bool:
    """Stop one service with all processes it has started; False when it was not up."""
    living = read_pid_file(service)
    service.pid_file.unlink(missing_ok=True)
    if living is None:
        return False
    try:
        leader = psutil.Process(living["pid"])
        family = [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return False
    stop_processes(family)
    return True


def deployment_hash() -> str:
    """Return a hash of everything that a deployment is made of."""
    digest = hashlib.sha256(f"{ROOT}\n".encode())
    names = ["prefect.yaml", "infra/automations.yaml", "ursa/config.py"]
    for name in (*names, *sorted(str(path) for path in Path("flows").glob("*.py"))):
        with contextlib.suppress(FileNotFoundError):
            digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def deployed(prefect: Service) -> bool:
    """Whether the server holds the deployments of the files as they are."""
    stamp = STATE / "run" / "deployed"
    if not stamp.exists() or stamp.read_text() != deployment_hash():
        return False
    try:
        request(f"{prefect.url}/api/deployments/name/{DEPLOYMENT}")
        request(f"{prefect.url}/api/work_pools/{POOL}")
    except urllib.error.HTTPError:
        return False
    return True


def deploy(prefect: Service) -> None:
    """Create the work pool and all deployments of prefect.yaml."""
    (STATE / "run" / "deployed").unlink(missing_ok=True)
    pool = {"name": POOL, "type": "process", "description": "Processes on this machine."}
    try:
        request(f"{prefect.url}/api/work_pools/", pool)
    except urllib.error.HTTPError as error:
        if error.code != http.client.CONFLICT:
            raise
    digest = deployment_hash()
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    keep_schedule(content, retraining(prefect))
    path = STATE / "run" / "prefect.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = (str(BIN / "prefect"), "--no-prompt", "deploy", "--all", "--prefect-file", str(path))
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    log = STATE / "logs" / "deploy.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise ServiceError(f"prefect deploy --all failed: {last_line(log)}; see {log}")
    set_automations(prefect)
    (STATE / "run" / "deployed").write_text(digest)


def set_automations(prefect: Service) -> None:
    """Create or renew the automations that need no notification block; a paused one stays so."""
    address = f"{prefect.url}/api/automations/"
    for item in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
        if any("block_document_id" in action for action in item["actions"]):
            continue
        query = {"automations": {"name": {"any_": [item["name"]]}}}
        known = request(f"{address}filter", query)
        for old in known:
            request(f"{address}{old['id']}", {**item, "enabled": old["enabled"]}, method="PUT")
        if not known:
            request(address, item)


def retraining(prefect: Service) -> dict[str, Any] | None:
    """Return the deployment of the retraining as the server has it; None if it has none."""
    try:
        return dict(request(f"{prefect.url}/api/deployments/name/{RETRAINING}"))
    except urllib.error.HTTPError as error:
        if error.code != http.client.NOT_FOUND:
            raise
        return None


def keep_schedule(content: dict[str, Any], live: dict[str, Any] | None) -> None:
    """Let what is deployed say of the schedule what somebody has switched: the file says off.

    Nothing is put back afterwards, so a kill at any moment leaves the schedule as it was. The
    retraining itself gets what `ursa schedule on` has given its schedule, as before. The schedule
    of the file has a slug; what somebody has made in Prefect is a matter of its own.
    """
    known = {item["slug"]: item for item in live["schedules"] if item["slug"]} if live else {}
    name = RETRAINING.partition("/")[2]
    (own,) = (item for item in content["deployments"] if item["name"] == name)
    for item in own["schedules"]:
        if now := known.get(item["slug"]):
            item |= {"active": now["active"], "parameters": now["parameters"]}
            own["parameters"] = {**own["parameters"], **now["parameters"]}


def flow_process_ids() -> set[str]:
    """Return the ids of all flow runs that have a living process on this machine."""
    found = set()
    for process in our_processes():
        with contextlib.suppress(psutil.Error):
            values = process.environ()
            found.add(values.get("PREFECT__FLOW_RUN_ID", ""))
            found.add(values.get("PREFECT_FLOW_RUN_ID", ""))
    return found - {""}


def active_runs(prefect: Service) -> list[dict[str, Any]]:
    """Return the flow runs of our pool that are said to be under way."""
    query = {
        "flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}},
        "work_pools": {"name": {"any_": [POOL]}},
    }
    return list(request(f"{prefect.url}/api/flow_runs/filter", query))


def settle_dead_runs(prefect: Service, *, min_age_s: float) -> list[dict[str, Any]]:
    """Mark runs without a process as crashed, so that they hold no slot; return the living."""
    living = flow_process_ids()
    alive = []
    for run in active_runs(prefect):
        if run["id"] in living or age_s(run) < min_age_s:
            alive.append(run)
            continue
        state = {"type": "CRASHED", "name": "Crashed", "message": "The flow process is gone."}
        request(
            f"{prefect.url}/api/flow_runs/{run['id']}/set_state", {"state": state, "force": True}
        )
    settle_dead_children(prefect)
    return alive


def settle_dead_children(prefect: Service) -> None:
    """Mark sub-flow runs that were left under way by a run that has ended."""
    ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    query = {
        "flow_runs": {
            "state": {"type": {"any_": ["RUNNING", "PENDING"]}},
            "parent_task_run_id": {"is_null_": False},
        }
    }
    state = {"type": "CRASHED", "name": "Crashed", "message": "The run around it has ended."}
    for run in request(f"{prefect.url}/api/flow_runs/filter", query):
        task = request(f"{prefect.url}/api/task_runs/{run['parent_task_run_id']}")
        parent = request(f"{prefect.url}/api/flow_runs/{task['flow_run_id']}")
        if parent["state"]["type"] in ended:
            change = {"state": state, "force": True}
            request(f"{prefect.url}/api/flow_runs/{run['id']}/set_state", change)


def age_s(run: dict[str, Any]) -> float:
    """Return how long a run has been in its state, seconds."""
    stamp = run["state"]["timestamp"].replace("Z", "+00:00")
    from datetime import UTC, datetime  # noqa: PLC0415

    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Let one `up` or `down` work at a time."""
    (STATE / "run").mkdir(parents=True, exist_ok=True)
    (STATE / "logs").mkdir(parents=True, exist_ok=True)
    with (STATE / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up() -> None:
    """Start what is not up yet, deploy what has changed."""
    prefect, mlflow, worker = services()
    with exclusive():
        began = time.monotonic()
        fresh = [item for item in (prefect, mlflow) if read_pid_file(item) is None]
        # nothing is started before every port is known to be free
        for service in [item for item in (prefect, mlflow) if make_room(item)]:
            launch(service)
        if fresh:
            say(f"starting {' and '.join(item.name for item in fresh)} (logs: {STATE}/logs)")
        for service in (prefect, mlflow):
            wait_healthy(service)
        if not deployed(prefect):
            deploy(prefect)
        digest = worker_environment_hash(prefect, mlflow)
        living = read_pid_file(worker)
        if living and living.get("environment") != digest:
            if settle_dead_runs(prefect, min_age_s=30):
                say("the environment has changed, but a run is under way: the worker keeps its own")
            else:
                stop(worker)
                living = None
        if living is None:
            if (lost := find_lost(worker)) is not None:
                stop_processes([lost, *lost.children(recursive=True)])
            launch(worker, environment=digest)
        if fresh:
            say(f"services are up after {time.monotonic() - began:.0f} s")
            say(f"  Prefect  {prefect.url}\n  MLflow   {mlflow.url}")
            say(f"  for the prefect command: export PREFECT_API_URL={prefect.url}/api")


def down() -> None:
    """Stop what this checkout has started, and nothing else."""
    prefect, mlflow, worker = services()
    with exclusive():
        stopped = [worker.name] if stop(worker) else []
        orphans = [item for item in our_processes() if not in_family(item, (prefect, mlflow))]
        stop_processes(orphans)
        if read_pid_file(prefect) and healthy(prefect):
            settle_dead_runs(prefect, min_age_s=0)
        stopped += [service.name for service in (mlflow, prefect) if stop(service)]
        stop_processes(our_processes())
    say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def in_family(process: psutil.Process, group: tuple[Service, ...]) -> bool:
    """Whether a process is one of the services or descends from it."""
    leaders = {living["pid"] for service in group if (living := read_pid_file(service))}
    with contextlib.suppress(psutil.Error):
        return bool(leaders & {process.pid, *(parent.pid for parent in process.parents())})
    return False


def status() -> int:
    """Say what is up; 0 when everything is."""
    missing = 0
    prefect, mlflow, worker = services()
    for service in (prefect, mlflow, worker):
        living = read_pid_file(service)
        good = living is not None and (service.health is None or healthy(service))
        missing += not good
        where = service.url if service.port else f"pool {POOL}"
        word = "up" if good else "not answering" if living else "down"
        say(f"{service.name:8} {word:14} {where}  {service.log}")
    say(f"for the prefect command: export PREFECT_API_URL={prefect.url}/api")
    with contextlib.suppress(OSError, ValueError):  # it is down, or there was no run yet
        page = f"{mlflow.url}/#/experiments/{experiment_id(mlflow.url)}/runs{TRAINING_VIEW}"
        say(f"runs in MLflow: {page}")
    return min(missing, 1)


def run(preset: str, source: str, parameters: list[str]) -> int:
    """Run the literal `prefect deployment run`, follow it and say where to look."""
    presets = sorted(path.stem for path in (ROOT / "ursa" / "presets").glob("*.yaml"))
    if preset not in presets:
        raise ServiceError(f"there is no PRESET={preset}; there are {', '.join(presets)}")
    if "://" not in source:
        folder = (ROOT / source).resolve()
        if (folder.is_dir() and not any(folder.iterdir())) or not folder.exists():
            raise ServiceError(
                f"SOURCE={source} does not exist or is empty; give a directory that holds videos, "
                "a manifest, a tar file or an s3:// prefix"
            )
        source = str(folder)
    up()
    prefect, mlflow, _ = services()
    for other in settle_dead_runs(prefect, min_age_s=30):
        say(f"run {other['name']} is under way: this one starts after it")
    command = [
        *(str(BIN / "prefect"), "deployment", "run", DEPLOYMENT, "--watch"),
        *("--param", f"preset={preset}", "--param", f"source_uri={source}", *parameters),
    ]
    say(f"$ prefect {shlex.join(command[1:])}")
    code, run_id = follow(command)
    if run_id is None:
        return code or 1
    page = f"{prefect.url}/runs/flow-run/{run_id}"
    try:
        flow_run = request(f"{prefect.url}/api/flow_runs/{run_id}")
    except OSError:
        flow_run = {"state": {"type": "RUNNING"}}
    if flow_run["state"]["type"] != "COMPLETED":
        say(why_not_completed(flow_run, page))
        return code or 1
    report(flow_run, page, mlflow)
    return 0


def why_not_completed(flow_run: dict[str, Any], page: str) -> str:
    """Return what to say of a run that has not completed, and what to do."""
    state = flow_run["state"]
    if state["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
        return (
            "\nFAILED: the services were stopped while the run was under way\n"
            "Try: `make run` again (finished work is kept)"
        )
    if state["type"] in ("CANCELLED", "CANCELLING"):
        return (
            f"\nCANCELLED: somebody has cancelled the run; nothing went wrong in it ({page})\n"
            "Try: `make run` again to go on (finished work is kept)"
        )
    from ursa.texts import printable  # noqa: PLC0415  (services start without the package)

    message = str(state.get("message") or state["name"])
    message = message.removeprefix("Flow run encountered an exception: ").splitlines()[0]
    message = printable(re.sub(r"\x1b?\[\d+m", "", message))
    return (
        f"\nFAILED: {message}\n"
        f"Try: mend that (more on {page}), then `make run` again (finished work is kept)"
    )


def split_parameters(text: str) -> list[str]:
    """Split `--param a=1 --param b={"c": 2}` at the flags only, so that JSON needs no quoting."""
    parts = re.split(r"(?:^|\s)(?:--param|-p)[\s=]+", text)
    if parts[0].strip():
        raise ServiceError(f"PARAMS must begin with --param, got {text!r}")
    values = [part.strip() for part in parts[1:]]
    quoted = re.compile(r"""^(['"])(.*)\1$""", re.DOTALL)
    return [word for value in values for word in ("--param", quoted.sub(r"\2", value))]


def follow(command: list[str]) -> tuple[int, str | None]:
    """Stream the output of the command; end when the flow run has, whatever the stream does."""
    columns = str(max(shutil.get_terminal_size((160, 24)).columns, 120))
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), "COLUMNS": columns},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    run_id: str | None = None
    assert child.stdout is not None
    watcher: subprocess.Popen[bytes] | None = None
    try:
        for line in child.stdout:
            if not NOISE.search(line):
                say(line.rstrip())
            if run_id is None and (match := RUN_ID.search(line)):
                run_id = match.group(1)
                guard = (sys.executable, __file__, "guard", run_id, str(child.pid))
                watcher = subprocess.Popen(guard, cwd=ROOT, env=environment())
        return child.wait(), run_id
    except KeyboardInterrupt:
        child.wait()
        if run_id:
            say(f"\n{leave(run_id)}")
        raise
    finally:
        if watcher is not None:
            watcher.terminate()
            watcher.wait()


def leave(run_id: str) -> str:
    """Cancel a run that nobody watches any more and that has not begun; say what becomes of it."""
    prefect, _, _ = services()
    address = f"{prefect.url}/api/flow_runs/{run_id}"
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
        if request(address)["state"]["type"] in ("SCHEDULED", "PENDING"):
            state = {"type": "CANCELLED", "message": "it was left before it began"}
            request(f"{address}/set_state", {"state": state})
            return "the run had not begun, and is cancelled"
    return f"the run goes on; stop it with: make down, or prefect flow-run cancel {run_id}"


def guard(run_id: str, pid: int) -> int:
    """Stop watching when a run has ended but its last event was lost, or its process is gone."""
    prefect, _, _ = services()
    child = psutil.Process(pid)
    ended = 0
    told, last = time.monotonic(), ""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
        last = newest_progress(prefect)  # of the run before
    while child.is_running() and ended < 4:
        time.sleep(5)
        if time.monotonic() - told >= PROGRESS_EVERY_S:
            told = time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                if (text := newest_progress(prefect)) != last:
                    say(f"  {text}")
                    last = text
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
            settle_dead_runs(prefect, min_age_s=60)
            kind = request(f"{prefect.url}/api/flow_runs/{run_id}")["state"]["type"]
            ended = ended + 1 if kind in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else 0
    with contextlib.suppress(psutil.Error):
        child.terminate()
    return 0


def newest_progress(prefect: Service) -> str:
    """Return what the run under way says of its work, such as "train-video-pretrain: step 9"."""
    query = {"artifacts": {"type": {"any_": ["progress"]}}, "sort": "UPDATED_DESC", "limit": 1}
    found = request(f"{prefect.url}/api/artifacts/filter", query)
    return f"{found[0]['key']}: {found[0]['description']}" if found else ""


def experiment_id(tracking: str) -> str:
    """Return the id of the experiment of all runs."""
    query = "api/2.0/mlflow/experiments/get-by-name?experiment_name=ursa"
    return str(request(f"{tracking}/{query}")["experiment"]["experiment_id"])


def report(flow_run: dict[str, Any], page: str, mlflow: Service) -> None:
    """Say where the results of a completed run are; the tracking server holds them as tags."""
    tracking = environment().get("URSA_MLFLOW_TRACKING_URI", mlflow.url).rstrip("/")
    try:
        experiment = experiment_id(tracking)
    except (OSError, ValueError):  # a tracking server of another kind has no such page
        say(f"\n{flow_run['state'].get('message') or flow_run['state']['name']}\n  Prefect  {page}")
        return
    query = {
        "experiment_ids": [experiment],
        "filter": f"tags.`prefect.last_flow_run_id` = '{flow_run['id']}'",
    }
    found = request(f"{tracking}/api/2.0/mlflow/runs/search", query).get("runs", [])
    runs = [{t["key"]: t["value"] for t in r["data"]["tags"]} | r["info"] for r in found]
    parents = [run for run in runs if "mlflow.parentRunId" not in run]
    if not parents:
        say(f"\n{flow_run['state'].get('message') or flow_run['state']['name']}\n  Prefect  {page}")
        return
    tags = parents[0]
    name, version = tags.get("ursa.model_name", "?"), tags.get("ursa.model_version", "?")
    say(f"\n{flow_run['state'].get('message') or flow_run['state']['name']}")
    say(f"Prefect run     {page}")
    view = TRAINING_VIEW
    say(f"MLflow run      {tracking}/#/experiments/{experiment}/runs/{tags['run_id']}{view}")
    shown = f"{tracking}/#/models/{urllib.parse.quote(name, safe='')}/versions/{version}{view}"
    say(f"Model version   {shown}")
    say(f"                models:/{name}/{version} is models:/{name}@{tags.get('ursa.alias', '?')}")
    if sample := tags.get("ursa.sample"):
        say(f"Generated clip  {sample}")
    if again := tags.get("ursa.generate_command"):
        say(f"Make it again   {BIN.relative_to(ROOT) if BIN.is_relative_to(ROOT) else BIN}/{again}")


def main() -> int:
    """Parse the command line and act."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("up", "down", "run", "status", "deploy", "guard"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--source", default="tests/data/videos")
    parser.add_argument("--parameters", default="", help="more `--param name=value`, one string")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    try:
        match arguments.command:
            case "up":
                up()
            case "down":
                down()
            case "status":
                return status()
            case "deploy":
                (STATE / "run" / "deployed").unlink(missing_ok=True)
                up()
            case "guard":
                return guard(arguments.rest[0], int(arguments.rest[1]))
            case _:
                parameters = split_parameters(arguments.parameters)
                return run(arguments.preset, arguments.source, parameters)
    except ServiceError as problem:
        sys.stderr.write(f"ERROR: {problem}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
