"""Tracking that cannot stop training: a real MLflow server that goes away, loses answers, dies."""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tasks import metric_sink, spool, tracking
from tasks.metric_sink import MetricSink
from tasks.stage_worker import LocalSink, StageProgress
from tasks.tracking import TrackedRun
from tests.flaky_proxy import FlakyProxy
from tests.running_services import ROOT, free_port
from ursa.artifacts import StageRequest
from ursa.training.stage import find_stage, launch_local

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # MLflow warns about its own imports
]
KEYS = ("train/loss", "train/accuracy", "train/grad_norm", "train/lr", "train/step_s")


class Server(NamedTuple):
    """An MLflow server of its own, which a test may kill and start again."""

    folder: Path
    port: int
    processes: list["subprocess.Popen[bytes]"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "mlflow"), "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "log.txt").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()
                time.sleep(0.2)
            else:
                return

    def kill(self) -> None:
        while self.processes:
            process = self.processes.pop()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("mlflow"), free_port(), [])
    found.start()
    before = mlflow.get_tracking_uri()
    try:
        found.wait()
        yield found
    finally:
        found.kill()
        mlflow.set_tracking_uri(before)


@pytest.fixture
def proxy(server: Server) -> Iterator[FlakyProxy]:
    with FlakyProxy(server.port) as between:
        yield between


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits, so that outages of seconds are long ones."""
    monkeypatch.setattr(metric_sink, "FLUSH_EVERY_S", 0.1)
    monkeypatch.setattr(metric_sink, "CLOSE_PATIENCE_S", 0.3)
    for module in (metric_sink, tracking):
        monkeypatch.setattr(module, "PROBE_LIMIT_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


names = itertools.count()


def new_run(url: str, folder: Path) -> TrackedRun:
    name = f"outage-{next(names)}"
    return tracking.open_run(url, name, name, {}, spool_uri=str(folder / "spool"))


def values(step: int) -> dict[str, float]:
    return {key: float(step) / (number + 1) for number, key in enumerate(KEYS)}


def stored(server: Server, run: TrackedRun, key: str) -> list[tuple[int, float]]:
    found = MlflowClient(server.url).get_metric_history(run.run_id, key)
    return sorted((item.step, item.value) for item in found)


def expected(last: int, key: str) -> list[tuple[int, float]]:
    return [(step, values(step)[key]) for step in range(1, last + 1)]


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def files(run: TrackedRun) -> list[str]:
    return [path.name for path in spool.waiting(run.spool_uri)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["refuse", "silent"])
def test_outage_in_the_middle_leaves_no_gap(
    server: Server, proxy: FlakyProxy, tmp_path: Path, how: str
) -> None:
    run = new_run(proxy.url, tmp_path)
    with MetricSink(run) as sink:
        for step in range(1, 301):
            if step == 100:
                proxy.cut(how)
            if step == 200:
                proxy.cut("pass")
            sink(step, values(step))
            time.sleep(0.01)
    for key in KEYS:
        assert stored(server, run, key) == expected(300, key)
    assert files(run) == []


@pytest.mark.usefixtures("quick")
def test_lost_answers_double_nothing(server: Server, proxy: FlakyProxy, tmp_path: Path) -> None:
    run = new_run(proxy.url, tmp_path)
    proxy.losing = b"/runs/log-batch"
    with MetricSink(run) as sink:
        for step in range(1, 301):
            proxy.mode = "lose" if step // 50 % 2 else "pass"
            sink(step, values(step))
            time.sleep(0.01)
        proxy.mode = "pass"
    assert proxy.num_lost > 1
    for key in KEYS:
        assert stored(server, run, key) == expected(300, key)


@pytest.mark.usefixtures("quick")
def test_what_is_left_at_the_end_is_sent_by_the_next_step(
    server: Server, proxy: FlakyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = new_run(proxy.url, tmp_path)
    began = time.monotonic()
    with tracking.child_run(parent, "image-pretrain", {}) as run, MetricSink(run) as sink:
        proxy.cut("refuse")
        for step in range(1, 1001):
            sink(step, values(step))
    assert time.monotonic() - began < 5, "a server that is away was waited for"
    assert files(run) == [f"{run.run_id}.jsonl"]
    assert f"has not taken all metrics of run {run.run_id}" in caplog.text
    assert "is closed when the server is back" in caplog.text
    proxy.cut("pass")
    assert MlflowClient(server.url).get_run(run.run_id).info.status == "RUNNING"
    with tracking.child_run(parent, "video-pretrain", {}):
        pass
    for key in KEYS:
        assert stored(server, run, key) == expected(1000, key)
    assert MlflowClient(server.url).get_run(run.run_id).info.status == "FINISHED"
    assert files(run) == []


@pytest.mark.usefixtures("quick")
def test_another_machine_sends_what_waits_in_the_bucket(
    server: Server,
    proxy: FlakyProxy,
    s3_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "first machine"))
    parent = new_run(proxy.url, tmp_path).model_copy(update={"spool_uri": f"{s3_prefix}/spool"})
    with tracking.child_run(parent, "image-pretrain", {}) as run, MetricSink(run) as sink:
        for step in range(1, 11):
            sink(step, values(step))
        wait_until(lambda: len(stored(server, run, KEYS[0])) == 10)
        proxy.cut("refuse")
        for step in range(11, 101):
            sink(step, values(step))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "second machine"))
    assert files(run) == []
    assert spool.parked(run.spool_uri)
    proxy.cut("pass")
    with tracking.child_run(parent, "video-pretrain", {}):
        pass
    for key in KEYS:
        assert stored(server, run, key) == expected(100, key)
    assert MlflowClient(server.url).get_run(run.run_id).info.status == "FINISHED"
    assert spool.parked(run.spool_uri) == []


@pytest.mark.usefixtures("quick")
def test_resume_after_a_kill_in_an_outage_goes_on_where_the_curve_ends(
    server: Server, proxy: FlakyProxy, tmp_path: Path
) -> None:
    run = new_run(proxy.url, tmp_path)
    with MetricSink(run) as sink:
        for step in range(1, 51):
            sink(step, values(step))
    proxy.cut("refuse")
    code = """
import os, signal, sys
from tasks.stage_worker import LocalSink, StageProgress
from tasks.metric_sink import MetricSink
from tasks.tracking import TrackedRun
sink = MetricSink(TrackedRun.model_validate_json(sys.argv[1])).__enter__()
for step in range(51, 121):
    sink(step, {key: step / (i + 1) for i, key in enumerate(sys.argv[2].split())})
os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = [run.model_dump_json(), " ".join(KEYS)]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    proxy.cut("pass")
    with MetricSink(run) as sink:  # from the checkpoint of step 100
        for step in range(101, 151):
            sink(step, {**values(step), "train/step_s": -1.0 if step <= 120 else step / 5})
    for key in KEYS:
        assert stored(server, run, key) == expected(150, key)


@pytest.mark.usefixtures("quick")
def test_kill_right_after_sending_doubles_nothing(
    server: Server, proxy: FlakyProxy, tmp_path: Path
) -> None:
    run = new_run(proxy.url, tmp_path)
    file = spool.Spool(run.spool_uri, run.run_id)
    for step in range(1, 101):
        file.append(step=step, metrics=values(step))
    entries, _ = spool.read(file.path, 0)
    client = MlflowClient(proxy.url)
    known = client.get_run(run.run_id).data
    tracking.send_values(client, run.run_id, known, entries)  # then a kill
    with MetricSink(run) as sink:
        for step in range(61, 121):
            sink(step, values(step))
    for key in KEYS:
        assert stored(server, run, key) == expected(120, key)
    file.close(file.num_bytes())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("place", ["one data root", "two data roots"])
def test_two_trainings_of_one_run_leave_one_curve(
    server: Server, tmp_path: Path, place: str
) -> None:
    run = new_run(server.url, tmp_path)
    other = run.model_copy(update={"spool_uri": str(tmp_path / "other")})
    with MetricSink(run) as first, MetricSink(run if place == "one data root" else other) as second:
        for step in range(1, 201):
            first(step, values(step))
            if step > 20:
                second(step - 20, values(step - 20))
            time.sleep(0.01)
        for step in range(181, 261):
            second(step, values(step))
    # the one that has come last was the only one to send; the next step sends what is left
    tracking.send_spooled(server.url, run.spool_uri)
    tracking.send_spooled(server.url, other.spool_uri)
    for key in KEYS:
        assert stored(server, run, key) == expected(260, key)
    assert files(run) == files(other) == []


@pytest.mark.usefixtures("quick")
def test_lost_answers_to_creation_leave_one_run(
    proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = new_run(proxy.url, tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the client asks again by itself
    proxy.losing, proxy.mode = b"/runs/create", "lose"

    def mend() -> None:
        wait_until(lambda: proxy.num_lost > 1)
        proxy.mode = "pass"

    mending = threading.Thread(target=mend)
    mending.start()
    with tracking.child_run(parent, "data", {}) as run:
        mending.join()
    found = MlflowClient(proxy.url).search_runs(
        [parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert [item.info.run_id for item in found] == [run.run_id]


@pytest.mark.usefixtures("quick")
def test_metrics_of_a_deleted_run_are_thrown_away_and_of_an_unknown_one_are_kept(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(server.url, tmp_path)
    for run_id in (run.run_id, "f" * 32):
        file = spool.Spool(run.spool_uri, run_id)
        file.append(step=1, metrics=values(1))
        file.close(0)
    MlflowClient(server.url).delete_run(run.run_id)
    last = new_run(server.url, tmp_path)
    assert files(last) == [f"{'f' * 32}.jsonl"]
    assert "has no such run" in caplog.text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_not_stopped_and_its_curve_is_whole(
    server: Server,
    proxy: FlakyProxy,
    tmp_path: Path,
    make_request: Callable[..., StageRequest],
    num_workers: int,
) -> None:
    # the server is gone after the first quarter of one stage, and at the end of it
    changes = {"max_steps": 40, "checkpoint_every": 10, "validate_every": 20, "log_every": 1}
    request = make_request("image_pretrain", **changes)
    parent = new_run(proxy.url, tmp_path)
    with tracking.child_run(parent, "image-pretrain", {}) as run:
        sink = LocalSink(run, StageProgress("", 40))
        if num_workers == 2:  # the sink is in a process of its own
            proxy.cut("refuse")

        def on_metrics(step: int, metrics: Mapping[str, float]) -> None:
            if step == 10:
                proxy.cut("refuse")
            sink(step, metrics)

        checkpoint = launch_local(
            request, num_workers=num_workers, on_metrics=on_metrics if num_workers == 1 else sink
        )
        sink.close()
    assert checkpoint.step == 40
    assert checkpoint == find_stage(request)
    proxy.cut("pass")
    with tracking.child_run(parent, "video-pretrain", {}):
        pass
    curve = stored(server, run, "train/loss")
    assert [step for step, _ in curve] == list(range(1, 41))
    assert curve[-1][1] == checkpoint.metrics["train/loss"]
    assert [step for step, _ in stored(server, run, "val/loss")] == [20, 40]
    assert MlflowClient(server.url).get_run(run.run_id).info.status == "FINISHED"


def nothing(*_: object) -> None:
    """Do nothing."""


def train(
    sink: Callable[[int, dict[str, float]], None], steps: range, at: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    """Return seconds of every step and of every call of the sink; a step is a wait of 20 ms."""
    step_s, call_s = [], []
    for step in steps:
        at(step)
        began = time.perf_counter()
        time.sleep(0.02)
        before = time.perf_counter()
        sink(step, values(step))
        ended = time.perf_counter()
        step_s.append(ended - began)
        call_s.append(ended - before)
    return step_s, call_s


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_server_killed_and_started_again_in_the_middle_of_training(
    server: Server, tmp_path: Path
) -> None:
    run = new_run(server.url, tmp_path)
    undisturbed, _ = train(nothing, range(300), nothing)

    def disturb(step: int) -> None:
        if step == 200:
            server.kill()
        if step == 800:
            server.start()

    with MetricSink(run) as sink:
        step_s, call_s = train(sink, range(1, 1501), disturb)
        server.wait()
    print(  # noqa: T201  (figures of the run)
        f"\nstep: median {1e3 * statistics.median(step_s):.2f} ms with a sink, "
        f"{1e3 * statistics.median(undisturbed):.2f} ms without; slowest {1e3 * max(step_s):.1f} "
        f"and {1e3 * max(undisturbed):.1f} ms; sink: median {1e6 * statistics.median(call_s):.0f}"
        f" us, slowest {1e3 * max(call_s):.2f} ms"
    )
    assert max(call_s) < 0.05
    assert sum(call_s) < 0.01 * sum(step_s)
    assert statistics.median(step_s) < 1.01 * statistics.median(undisturbed) + 1e-4
    for key in KEYS:
        assert stored(server, run, key) == expected(1500, key)
    assert files(run) == []
