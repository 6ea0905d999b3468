"""Metrics of a run on their way to MLflow, beside a training that must not notice.

Used on Ray's workers as well, so no Prefect here.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import psutil

from tasks import spool
from tasks.tracking import (
    CLOSE_LIMIT_S,
    PROBE_LIMIT_S,
    TrackedRun,
    check_service,
    send_values,
    service,
)
from ursa.errors import ServiceError

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 2.0
FLUSH_BYTES = 16 << 10
"""Sent in one turn beside training: 70 steps or so, 15 ms of work that a step may wait for."""
PARK_EVERY_S = 30.0
MEASURE_EVERY_S = 10.0
"""How often a sink measures its machine, as MLflow does."""
CLOSE_PATIENCE_S = 5.0
"""How long a sink that is closed waits for a server that is away."""


def log_metrics(run: TrackedRun, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Log final values at once; a value that is there already is not logged again.

    Args:
        run: The run.
        metrics: Values by name.
        step: Step that they belong to.
    """
    with MetricSink(run) as sink:
        sink(step, metrics)


class MetricSink:
    """Takes metrics of a run and sends them from a background thread; never raises.

    Values go to the spool of the run first, so that neither a server that is away nor a kill loses
    one: what is in the spool is sent by this sink, by the next one of the same run, or by the next
    step or run (`send_spooled`). Taking a value is a write to a local file and waits for nothing.

    One value per key and step: before each batch the thread asks the server for the last step of
    each key and sends only later ones. So nothing is sent twice after a resume, a kill or a lost
    answer. Processes that train the same at once leave one curve: those with one spool send the
    same lines, and of several spools the last to come sends (tag `ursa.writer`), the others keep
    theirs. A step must not be smaller than the one before it.
    """

    def __init__(
        self,
        run: TrackedRun,
        *,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
        measures_machine: bool = False,
    ) -> None:
        """Keep the settings; file and thread begin with the context.

        Args:
            run: Where metrics go.
            on_step: Called in the thread with the newest step and its metrics before values are
                sent; what it raises is passed over.
            measures_machine: Whether it adds MLflow's own `system/` metrics of this machine, once
                and every `MEASURE_EVERY_S` seconds; their step is seconds since the run began.
        """
        self._run = run
        self._on_step = on_step
        self._newest: tuple[int, dict[str, float]] | None = None
        self._writer = f"{socket.gethostname()}:{run.spool_uri}"
        self._has_claimed = False
        self._offset = 0
        self._parked_bytes = 0
        self._next_park = 0.0
        self._measures_machine = measures_machine
        self._monitors: list[Any] = []  # of MLflow, whose methods have no types
        self._next_measure = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metric-sink", daemon=True)

    def __enter__(self) -> Self:
        # here and not in the thread: an import beside the first steps would slow them down
        from mlflow.entities import Metric  # noqa: F401, PLC0415
        from mlflow.tracking import MlflowClient  # noqa: F401, PLC0415

        if self._measures_machine:
            self._monitors = _monitors()
        self._spool = spool.Spool(self._run.spool_uri, self._run.run_id)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(CLOSE_LIMIT_S + CLOSE_PATIENCE_S)
        if not self._spool.close(self._offset):
            logger.warning(
                "MLflow at %s has not taken all metrics of run %s; the next step or run sends "
                "them from %s",
                self._run.tracking_uri,
                self._run.run_id,
                self._spool.path,
            )

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take metrics of a step; returns at once.

        Args:
            step: Step number.
            metrics: Values by name.
        """
        self._spool.append(step=step, metrics=metrics)
        self._newest = (step, dict(metrics))

    def _work(self) -> None:
        closed_at = 0.0
        psutil.cpu_percent()  # the next call in this thread returns the share since this one
        while True:
            is_closing = self._closing.wait(FLUSH_EVERY_S)
            closed_at = closed_at or (time.monotonic() if is_closing else 0.0)
            self._report_step()
            self._measure()
            try:
                # one small part a turn while training goes on, so that no step notices
                is_all = self._send_part(spool.READ_BYTES if is_closing else FLUSH_BYTES)
                if is_closing and (is_all or time.monotonic() > closed_at + CLOSE_LIMIT_S):
                    break
            except Exception as error:  # noqa: BLE001  (training must not notice)
                logger.debug("metrics could not be sent yet: %s", error)
                if is_closing:
                    if time.monotonic() > closed_at + CLOSE_PATIENCE_S:
                        break
                    time.sleep(FLUSH_EVERY_S)
                self._park()
        if self._offset < self._spool.num_bytes():
            self._next_park = 0.0
            self._park()

    def _park(self) -> None:
        size = self._spool.num_bytes()
        if time.monotonic() >= self._next_park and size > self._parked_bytes:
            self._next_park = time.monotonic() + PARK_EVERY_S
            self._parked_bytes = size
            self._spool.park(self._offset)

    def _report_step(self) -> None:
        newest, self._newest = self._newest, None
        if self._on_step is not None and newest is not None:
            try:
                self._on_step(*newest)
            except Exception as error:  # noqa: BLE001  (progress is a courtesy)
                logger.debug("progress could not be reported: %s", error)

    def _measure(self) -> None:
        if time.monotonic() < self._next_measure or not self._monitors:
            return
        self._next_measure = time.monotonic() + MEASURE_EVERY_S
        metrics: dict[str, float] = {}
        try:
            for monitor in self._monitors:
                monitor.collect_metrics()
                metrics |= {f"system/{key}": v for key, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        except Exception as error:  # noqa: BLE001  (a driver that is reset)
            logger.debug("the machine could not be measured: %s", error)
        age_ms = int(time.time() * 1000) - self._run.began_ms
        self._spool.append(step=max(0, age_ms // 1000), metrics=metrics)

    def _send_part(self, num_bytes: int) -> bool:
        """Send the next lines of the spool; return whether nothing is left."""
        entries, following = spool.read(self._spool.path, self._offset, num_bytes)
        if following == self._offset:
            return True
        # MLflow's client waits for a server that is away, through all of its repetitions
        check_service(self._run.tracking_uri, timeout_s=PROBE_LIMIT_S)
        with service(self._run.tracking_uri) as client:
            stored = client.get_run(self._run.run_id).data
            if stored.tags.get("ursa.writer") != self._writer:
                if self._has_claimed:
                    raise ServiceError(
                        f"{stored.tags.get('ursa.writer')} sends metrics of this run"
                    )
                self._has_claimed = True
                client.set_tag(self._run.run_id, "ursa.writer", self._writer)
                return False  # what the one before is sending arrives until the next turn
            send_values(client, self._run.run_id, stored, entries)
        self._offset = following
        return self._offset >= self._spool.num_bytes()


def _monitors() -> list[Any]:
    """Return what MLflow measures of a machine; of GPUs where `nvidia-ml-py` is installed."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor  # noqa: PLC0415
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor  # noqa: PLC0415
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor  # noqa: PLC0415
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor  # noqa: PLC0415

    found: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            found.append(kind())
        except Exception as error:  # noqa: BLE001  (no package, driver or GPU; no network)
            logger.debug("%s: %s", kind.__name__, error)
    return found
