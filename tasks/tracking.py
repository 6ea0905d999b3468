"""The only importer of MLflow: runs, metrics, samples, and the model registry.

One parent run per fingerprint of a run and one child run a step, found again by their tags, so
that a resumed or repeated run goes on in the same place. MLflow itself is imported when the first
call needs it (3 s). Imported on Ray's workers as well, so no Prefect here.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import quote

import psutil

from tasks import releases, spool
from tasks.processes import process_mark
from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE, EvalReport, ExportedModel, ModelVersion
from ursa.config import FrozenModel, RunConfig
from ursa.errors import ConfigError, DataError, RegistrationError, ServiceError, UrsaError

if TYPE_CHECKING:
    from mlflow.entities import RunData
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "ursa"
TRAINING_VIEW = "workflowType=machine_learning"
"""Query of a page, without which MLflow shows the menu for language-model applications."""
FLUSH_EVERY_S = 2.0
FLUSH_BYTES = 16 << 10
"""Sent in one turn beside training: 70 steps or so, 15 ms of work that a step may wait for."""
PARK_EVERY_S = 30.0
MEASURE_EVERY_S = 10.0
"""How often a sink measures its machine, as MLflow does."""
PROBE_LIMIT_S = 2.0
CLOSE_LIMIT_S = 20.0
CLOSE_PATIENCE_S = 5.0
"""When a sink is closed: how long it sends, and how long it waits for a server that is away."""
METRICS_PER_BATCH = 1000
"""What MLflow takes at most."""
FIRST_TAGS = ("prefect.", "mlflow.source.")
"""Tags that say who made a run: a finished run keeps them."""
REGISTRY_SCHEME = "models:/"
FINGERPRINT_TAG = "ursa.run_fingerprint"
"""Tag of a version by which the run that made it finds it again."""
UNFINISHED = "unfinished"
"""Stands in that tag where files were missing only for now, so that the next run looks again."""
STARTED_FROM_TAG = "ursa.started_from"
"""Tag of a version: the version that a retraining went on from."""
NOTE = "mlflow.note.content"
"""Tag with what MLflow shows as the description of a run, in Markdown."""


class TrackedRun(FrozenModel):
    """A run in the tracking server.

    Attributes:
        tracking_uri: Address of the tracking server.
        experiment_id: Experiment of the run.
        run_id: Id of the run.
        spool_uri: Where metrics and statuses wait that the server has not taken yet.
        began_ms: When it was first opened, milliseconds since 1970.
    """

    tracking_uri: str
    experiment_id: str
    run_id: str
    spool_uri: str
    began_ms: int = 0

    @property
    def url(self) -> str:
        """Page of the run."""
        return self.page("")

    def page(self, artifact_path: str) -> str:
        """Return the address of the page that shows an artifact.

        Args:
            artifact_path: Path of the artifact inside the run; nothing is the run itself.
        """
        shown = ("artifacts", *artifact_path.split("/")) if artifact_path else ()
        parts = ("experiments", self.experiment_id, "runs", self.run_id, *shown)
        return _page(self.tracking_uri, *parts)


class RegisteredVersion(NamedTuple):
    """A version in the registry.

    Attributes:
        name: Name of the registered model.
        version: Its number.
        tags: Its tags.
    """

    name: str
    version: str
    tags: dict[str, str]


class DatasetInput(NamedTuple):
    """A data set that a run has used.

    Attributes:
        name: Shown on the page of the run.
        uri: Address of its manifest.
        digest: Its fingerprint; MLflow keeps 36 characters, a tag the whole.
        context: What it was used for, such as "training".
    """

    name: str
    uri: str
    digest: str
    context: str


class StepCurves(NamedTuple):
    """What a step has logged.

    Attributes:
        name: Its tag `ursa.stage`.
        seconds: From its first start to its last end; None while it is under way.
        curves: (step, value) by metric name, in the order of the steps.
    """

    name: str
    seconds: float | None
    curves: dict[str, list[tuple[int, float]]]


def check_service(tracking_uri: str, *, timeout_s: float = 5.0) -> None:
    """Make sure that the tracking server answers.

    Args:
        tracking_uri: Address of the tracking server; only http and https are asked.
        timeout_s: How long to wait, seconds.

    Raises:
        ServiceError: With the address and what to do.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(  # noqa: S310  (http or https, checked above)
            f"{tracking_uri.rstrip('/')}/health", timeout=timeout_s
        ).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ServiceError(
            f"MLflow does not answer at {tracking_uri} ({reason}); start it with `make up`, or set "
            "URSA_MLFLOW_TRACKING_URI to a server that is up"
        ) from error


@contextlib.contextmanager
def service(tracking_uri: str) -> Iterator["MlflowClient"]:
    """Yield a client with short time limits; name the server in every error.

    Args:
        tracking_uri: Address of the tracking server.

    Yields:
        MLflow's client.

    Raises:
        ServiceError: If the server does not answer or refuses a call.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import requests  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    try:
        yield MlflowClient(tracking_uri)
    except (MlflowException, requests.RequestException) as error:
        first = str(error).splitlines()[0][:300]
        raise ServiceError(f"MLflow at {tracking_uri}: {first}") from error


def open_run(
    tracking_uri: str, name: str, run_fingerprint: str, tags: Mapping[str, str], *, spool_uri: str
) -> TrackedRun:
    """Find the parent run of a fingerprint or create it; mark it as running.

    What earlier runs could not send is sent first.

    Args:
        tracking_uri: Address of the tracking server.
        name: Shown in the list of runs.
        run_fingerprint: Decides which runs are the same.
        tags: Set on the run; new values replace old ones, but see `FIRST_TAGS`.
        spool_uri: Where metrics wait; the same place for all runs of a data root.

    Returns:
        The run.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        experiment_id = _experiment_id(client)
        send_spooled(tracking_uri, spool_uri)
        return _find_or_create(
            TrackedRun(
                tracking_uri=tracking_uri,
                experiment_id=experiment_id,
                run_id="",
                spool_uri=spool_uri,
            ),
            f"tags.`ursa.fingerprint` = '{run_fingerprint}' and tags.`ursa.stage` = 'run'",
            name,
            {"ursa.fingerprint": run_fingerprint, "ursa.stage": "run", **tags},
        )


@contextlib.contextmanager
def child_run(parent: TrackedRun, stage: str, tags: Mapping[str, str]) -> Iterator[TrackedRun]:
    """Open the child run of a step, new or taken up again, and close it with the right status.

    What earlier steps could not send is sent first.

    Args:
        parent: The run that it belongs to.
        stage: Name of the step; together with the parent it decides which runs are the same.
        tags: Set on the run; new values replace old ones, but see `FIRST_TAGS`.

    Yields:
        The run, while it is under way.

    Raises:
        ServiceError: If the server does not answer when the run is opened.
    """
    child = _open_child(parent, stage, tags)
    try:
        yield child
    except BaseException as error:
        close_run(child, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    close_run(child, "FINISHED")


def close_run(run: TrackedRun, status: str) -> None:
    """Set the final status of a run; if the server is away it waits beside the metrics.

    The work is done by then, so that it does not fail for this.

    Args:
        run: The run.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    try:
        with service(run.tracking_uri) as client:
            client.set_terminated(run.run_id, status)
    except ServiceError as error:
        file = spool.Spool(run.spool_uri, run.run_id)
        file.append(status=status)
        file.park(0)
        file.close(0)
        logger.warning("%s; the run is closed when the server is back (%s)", error, file.path)


def send_spooled(tracking_uri: str, spool_uri: str) -> None:
    """Send what earlier steps and runs could not; what cannot be sent now stays.

    Args:
        tracking_uri: Address of the tracking server.
        spool_uri: Where metrics wait.
    """
    deadline = time.monotonic() + CLOSE_LIMIT_S
    try:
        for path in spool.waiting(spool_uri):
            with contextlib.suppress(FileNotFoundError):  # its own process was faster
                _drain(tracking_uri, spool.run_of(str(path)), path, deadline)
        for uri in spool.parked(spool_uri):
            with storage.local_copy(uri) as path:
                is_sent = _drain(tracking_uri, spool.run_of(uri), path, deadline)
            if is_sent:
                storage.remove_file(uri)
    except (UrsaError, OSError) as error:
        logger.warning("metrics of earlier steps wait at %s: %s", spool_uri, error)


def _drain(tracking_uri: str, run_id: str, path: Path, deadline: float) -> bool:
    """Send all of a file, then close the run if it says so; return whether nothing is left."""
    check_service(tracking_uri, timeout_s=PROBE_LIMIT_S)
    offset, last = 0, None
    with service(tracking_uri) as client:
        try:
            stored = client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning(
                "%s: MLflow at %s has no such run; delete the file if it is gone for good",
                path,
                tracking_uri,
            )
            return False
        is_deleted = stored.info.lifecycle_stage == "deleted"
        while not is_deleted:
            entries, following = spool.read(path, offset)
            if following == offset:
                break
            _send(client, run_id, client.get_run(run_id).data, entries)
            offset, last = following, entries[-1] if entries else last
            if time.monotonic() > deadline:
                return False
        with spool.exclusively(path) as is_mine:
            if not is_mine or (path.stat().st_size > offset and not is_deleted):
                return False
            if last is not None and last.status:
                client.set_terminated(run_id, last.status, last.time_ms)
            path.unlink()
    return True


def tag_run(run: TrackedRun, tags: Mapping[str, str]) -> None:
    """Set tags of a run.

    Args:
        run: The run.
        tags: New values replace old ones.

    Raises:
        ServiceError: If the server does not answer.
    """
    from mlflow.entities import RunTag  # noqa: PLC0415

    with service(run.tracking_uri) as client:
        client.log_batch(run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def run_tags(run: TrackedRun) -> dict[str, str]:
    """Return the tags of a run.

    Args:
        run: The run.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(run.tracking_uri) as client:
        return dict(client.get_run(run.run_id).data.tags)


def log_config(run: TrackedRun, config: RunConfig) -> None:
    """Log the configuration: flattened dotted parameters and the whole as config.yaml.

    Args:
        run: The run; parameters that it has already are not logged again.
        config: Its configuration.

    Raises:
        ServiceError: If the server does not answer.
    """
    from mlflow.entities import Param  # noqa: PLC0415

    with service(run.tracking_uri) as client:
        known = client.get_run(run.run_id).data.params
        flat = _flatten(config.model_dump(mode="json"))
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            client.log_batch(run.run_id, params=new[start : start + 100])
        if new:
            client.log_dict(run.run_id, config.model_dump(mode="json"), "config.yaml")


def log_inputs(run: TrackedRun, datasets: Sequence[DatasetInput]) -> None:
    """Log the data sets that a run has used: manifest address and digest, no data is read.

    Args:
        run: The run.
        datasets: What it has used.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(run.tracking_uri) as client:
        from mlflow.data.dataset_source_registry import resolve_dataset_source  # noqa: PLC0415
        from mlflow.data.meta_dataset import MetaDataset  # noqa: PLC0415
        from mlflow.entities import DatasetInput as Input  # noqa: PLC0415
        from mlflow.entities import InputTag  # noqa: PLC0415
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT  # noqa: PLC0415

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow registers its local source twice
            sources = [resolve_dataset_source(item.uri) for item in datasets]
        client.log_inputs(
            run.run_id,
            [
                Input(
                    dataset=MetaDataset(  # type: ignore[abstract]
                        source, name=item.name, digest=item.digest[:36]
                    )._to_mlflow_entity(),
                    tags=[
                        InputTag(MLFLOW_DATASET_CONTEXT, item.context),
                        InputTag("fingerprint", item.digest),
                    ],
                )
                for item, source in zip(datasets, sources, strict=True)
            ],
        )


def log_metrics(run: TrackedRun, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Log final values at once; a value that is there already is not logged again.

    Args:
        run: The run.
        metrics: Values by name.
        step: Step that they belong to.
    """
    with MetricSink(run) as sink:
        sink(step, metrics)


def log_files(run: TrackedRun, folder_uri: str, names: Sequence[str], artifact_path: str) -> None:
    """Log files below a URI as artifacts; those that are there already are passed over.

    Args:
        run: The run.
        folder_uri: Where the files are.
        names: Their names below it; the artifact has the last part alone.
        artifact_path: Folder of the run.

    Raises:
        DataError: If a name leads out of the folder.
        ServiceError: If the server does not answer.
        FileNotFoundError: If a file is missing.
        StorageError: If the store refuses or does not answer.
    """
    with service(run.tracking_uri) as client:
        present = {
            Path(item.path).name for item in client.list_artifacts(run.run_id, artifact_path)
        }
        for name in names:
            if Path(name).name in present:
                continue
            if not storage.is_below(storage.join(folder_uri, name), folder_uri):
                raise DataError(f"{name[:200]!r} leads out of {folder_uri}")
            with (
                storage.local_copy(storage.join(folder_uri, name)) as path,
                tempfile.TemporaryDirectory() as folder,
            ):
                target = Path(folder) / Path(name).name
                target.write_bytes(path.read_bytes())
                client.log_artifact(run.run_id, str(target), artifact_path)


def log_text(run: TrackedRun, text: str, path: str) -> None:
    """Log a text as an artifact; one that is there is replaced.

    Args:
        run: The run.
        text: The content.
        path: Path of the artifact inside the run; its ending says what it is.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(run.tracking_uri) as client:
        client.log_text(run.run_id, text, path)


def log_image_step(run: TrackedRun, image_uri: str, key: str, step: int) -> None:
    """Log a picture under a key with a step, which gives a slider on the page of the run.

    Args:
        run: The run; a picture that it has of the same key and step is not logged again.
        image_uri: The picture, in any format that PIL reads.
        key: Name of the series, without "/".
        step: Step that it belongs to.

    Raises:
        ServiceError: If the server does not answer.
        FileNotFoundError: If the picture is missing.
        StorageError: If the store refuses or does not answer.
    """
    from PIL import Image  # noqa: PLC0415

    with service(run.tracking_uri) as client, storage.local_copy(image_uri) as path:
        already = [item.path for item in client.list_artifacts(run.run_id, "images")]
        # MLflow separates the parts of the name by "+", older ones by "%"
        begins = tuple(f"{key}{mark}step{mark}{step}{mark}" for mark in "+%")
        if any(Path(name).name.startswith(begins) for name in already):
            return
        with Image.open(path) as image:
            client.log_image(run.run_id, image.convert("RGB"), key=key, step=step)


def log_picture_step(run: TrackedRun, picture: bytes, key: str, step: int) -> None:
    """Log a picture that no file holds; see `log_image_step`.

    Args:
        run: The run; a picture that it has of the same key and step is not logged again.
        picture: Content of a file in any format that PIL reads.
        key: Name of the series, without "/".
        step: Step that it belongs to.

    Raises:
        ServiceError: If the server does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / key
        path.write_bytes(picture)
        log_image_step(run, str(path), key, step)


def log_stage_samples(run: TrackedRun, samples_uri: str, seen: set[str]) -> None:
    """Log samples of a stage: pictures with a slider over the steps, and clips that play.

    Args:
        run: The run of the stage.
        samples_uri: Where its samples are, a folder a step.
        seen: Folders that are logged; those that are logged now come in.

    Raises:
        ServiceError: If the server does not answer.
        StorageError: If the store refuses or does not answer.
    """
    try:
        listed = [item.uri for item in storage.list_files(samples_uri, with_etag=False)]
    except FileNotFoundError:
        return
    for picture_uri in sorted(uri for uri in listed if uri.endswith(f"/{SAMPLES_PICTURE}")):
        folder_uri = picture_uri.rpartition("/")[0]
        if folder_uri in seen:
            continue
        name = folder_uri.rpartition("/")[2]
        clips = [uri for uri in listed if uri.startswith(f"{folder_uri}/") and uri != picture_uri]
        log_image_step(run, picture_uri, "samples", int(name.rpartition("-")[2]))
        log_files(run, folder_uri, [uri.rpartition("/")[2] for uri in clips], f"samples/{name}")
        seen.add(folder_uri)


def step_curves(run: TrackedRun, keys: Sequence[str]) -> list[StepCurves]:
    """Return what the steps of a run have logged, in the order in which they began.

    Args:
        run: The parent run.
        keys: Names of metrics.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(run.tracking_uri) as client:
        children = client.search_runs(
            [run.experiment_id],
            f"tags.`mlflow.parentRunId` = '{run.run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        return [
            StepCurves(
                child.data.tags["ursa.stage"],
                None
                if child.info.end_time is None
                else (child.info.end_time - child.info.start_time) / 1000,
                {
                    key: sorted(
                        (point.step, point.value)
                        for point in client.get_metric_history(child.info.run_id, key)
                    )
                    for key in keys
                    if key in child.data.metrics
                },
            )
            for child in children
        ]


def has_artifact(run: TrackedRun, path: str) -> bool:
    """Whether a run has an artifact.

    Args:
        run: The run.
        path: Path of the artifact inside the run.

    Raises:
        ServiceError: If the server does not answer.
    """
    folder = path.rpartition("/")[0] or None
    with service(run.tracking_uri) as client:
        return any(item.path == path for item in client.list_artifacts(run.run_id, folder))


def artifact_url(run: TrackedRun, path: str) -> str:
    """Return an address at which a browser gets an artifact of a run.

    Args:
        run: The run.
        path: Path of the artifact inside the run.
    """
    return f"{run.tracking_uri}/get-artifact?path={quote(path)}&run_uuid={run.run_id}"


def version_page(tracking_uri: str, version: ModelVersion) -> str:
    """Return the address of the page of a version.

    Args:
        tracking_uri: Address of the tracking server.
        version: The version.
    """
    return _page(tracking_uri, "models", version.name, "versions", version.version)


def _page(tracking_uri: str, *parts: str) -> str:
    """Return the address of a page; names may hold spaces, parentheses, # and ?."""
    path = "/".join(quote(part, safe="") for part in parts)
    return f"{tracking_uri}/#/{path}?{TRAINING_VIEW}"


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
            _send(client, self._run.run_id, stored, entries)
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


def _send(
    client: "MlflowClient", run_id: str, stored: "RunData", entries: Sequence[spool.Entry]
) -> None:
    """Send the values of some lines whose step is after the last one that the server has."""
    from mlflow.entities import Metric  # noqa: PLC0415

    last_step = {metric.key: metric.step for metric in stored.to_proto().metrics}
    batch = []
    for entry in entries:
        for key, value in entry.metrics.items():
            if key not in last_step or entry.step > last_step[key]:
                batch.append(Metric(key, value, entry.time_ms, entry.step))
                last_step[key] = entry.step
    for start in range(0, len(batch), METRICS_PER_BATCH):
        client.log_batch(run_id, batch[start : start + METRICS_PER_BATCH], synchronous=True)


@functools.cache
def source_version() -> dict[str, str]:
    """Return the tag with the git commit of the checkout; empty outside of one."""
    root = Path(storage.__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {}
    done = subprocess.run(  # noqa: S603
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}


def find_version(tracking_uri: str, name: str, tag: str, value: str) -> ModelVersion | None:
    """Return the newest version with a tag, if it was registered as a whole.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        tag: Name of the tag.
        value: Its value.

    Returns:
        The version with its best alias, or None.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        found = _versions(client, name, tag, value)
        if not found or found[-1].tags.get("ursa.aliased") is None:
            return None
        return _version_record(client.get_model_version(name, found[-1].version), is_new=False)


def newest_version_tags(
    tracking_uri: str, name: str, *, source_uri: str | None = None
) -> dict[str, str]:
    """Return the tags of the newest version of a model; empty when there is none.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        source_uri: Only versions that were trained on this source count.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        found = [
            item
            for item in client.search_model_versions(f"name = '{name}'")
            if "ursa.aliased" in item.tags  # others were left by a run that was killed
            and source_uri in {None, item.tags.get("ursa.source_uri")}
        ]
        newest = max(found, key=lambda item: int(item.version), default=None)
        return dict(newest.tags) if newest else {}


def registered_directory(tracking_uri: str, model_uri: str) -> str:
    """Return where the model directory of a registered version is.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Returns:
        URI of the directory that the version was made from.

    Raises:
        ConfigError: If there is no such version, or it was not registered by this pipeline.
        ServiceError: If the server does not answer.
    """
    name, _, rest = model_uri.removeprefix(REGISTRY_SCHEME).partition("@")
    alias: str | None = rest
    if not rest:
        (name, _, rest), alias = name.partition("/"), None
    if not name or not rest:
        raise ConfigError(
            f"{model_uri!r} names no version; expected {REGISTRY_SCHEME}<name>@champion or "
            f"{REGISTRY_SCHEME}<name>/<version>"
        )
    with service(tracking_uri) as client:
        found = [
            item
            for item in client.search_model_versions(f"name = '{name}'")
            if (
                rest in _aliases(client, name, item.version) if alias else str(item.version) == rest
            )
        ]
    if not found:
        raise ConfigError(
            f"no model {model_uri} in the registry at {tracking_uri}; train and register one "
            "first, or give a directory"
        )
    directory = found[0].tags.get("ursa.model_directory")
    if directory is None:
        raise ConfigError(
            f"{model_uri} has no tag ursa.model_directory: this pipeline did not register it; "
            "give its directory"
        )
    return str(directory)


def champion_version(
    tracking_uri: str, name: str, *, root_uri: str, decided_by: str
) -> RegisteredVersion | None:
    """Return the version that is champion; None if there is none.

    A decision that a kill interrupted is carried out first, and a champion that was deleted gives
    way to the one before it.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        root_uri: The data root, where decisions are on record.
        decided_by: See `ursa.decisions.who`.

    Raises:
        ManifestError: If a decision that another run writes is damaged.
        ServiceError: If the server does not answer.
        StorageError: If the store refuses or does not answer.
    """
    with service(tracking_uri) as client:
        if not client.search_registered_models(f"name = '{name}'"):
            return None
        releases.settle(releases.Registry(client, name, root_uri, decided_by))
        version = releases.aliases(client, name).get(releases.CHAMPION)
    return None if version is None else registered_version(tracking_uri, name, version)


def registered_version(tracking_uri: str, name: str, version: str) -> RegisteredVersion | None:
    """Return a version; None if there is no such one.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        version: Its number.

    Raises:
        ServiceError: If the server does not answer.
    """
    with service(tracking_uri) as client:
        for item in client.search_model_versions(f"name = '{name}'"):
            if str(item.version) == version:
                return RegisteredVersion(name, version, dict(item.tags))
    return None


def trained_on(tracking_uri: str, model_uri: str) -> tuple[str | None, ...]:
    """Return the token data sets of a version and of those that it went on from, the last first.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: `models:/<name>/<version>`.

    Returns:
        Their manifests; None for a version that is gone or says nothing.

    Raises:
        ServiceError: If the server does not answer.
    """
    found: list[str | None] = []
    seen: set[str] = set()
    while model_uri and model_uri not in seen:
        seen.add(model_uri)
        name, _, number = model_uri.removeprefix(REGISTRY_SCHEME).rpartition("/")
        version = registered_version(tracking_uri, name, number)
        tags = {} if version is None else version.tags
        found.append(tags.get("ursa.tokens"))
        model_uri = tags.get(STARTED_FROM_TAG, "")
    return tuple(found)


@contextlib.contextmanager
def model_files(tracking_uri: str, name: str, version: str) -> Iterator[Path]:
    """Yield the model directory of a version, downloaded; it is removed afterwards.

    Args:
        tracking_uri: Address of the tracking server.
        name: Name of the registered model.
        version: Its number.

    Yields:
        The directory.

    Raises:
        ServiceError: If the server does not answer.
        RegistrationError: If the version holds no model directory.
    """
    model_uri = f"{REGISTRY_SCHEME}{name}/{version}"
    with storage.scratch_directory("model") as folder:
        root = _download(tracking_uri, model_uri, folder)
        found = sorted(root.glob("artifacts/*/model_index.json"))
        if not found:
            raise RegistrationError(
                f"{model_uri} holds no model directory: this pipeline did not register it, or its "
                f"files are gone; roll back with {releases.models_command(name, 'rollback')}"
            )
        yield found[0].parent


def register_version(
    run: TrackedRun,
    report: EvalReport,
    config: RunConfig,
    tags: Mapping[str, str],
    *,
    root_uri: str,
    decided_by: str,
) -> ModelVersion:
    """Register an evaluated model as a version, whole or not at all.

    A version that holds the same files already is returned as it is. Else: log the model, download
    it and compare every file, create the version with its tags, then set the aliases. What the gate
    says is put on record (`ursa.decisions`) before it is carried out.

    Args:
        run: The run that the version belongs to.
        report: The evaluation, with the model.
        config: The configuration of the run; becomes metadata of the model.
        tags: Lineage: manifest addresses and fingerprints.
        root_uri: The data root, where decisions are on record.
        decided_by: See `ursa.decisions.who`.

    Returns:
        The version, with its best alias.

    Raises:
        RegistrationError: If the stored files differ from the exported ones.
        ServiceError: If the server does not answer.
    """
    from ursa.gate import comparison_text  # noqa: PLC0415  (torch: seconds)

    name = config.release.model_name
    key = report.model.content_key
    all_tags = {
        **tags,
        "ursa.registration_key": key,
        "ursa.gate_passed": str(report.gate_passed).lower(),
        "ursa.failed_gates": "; ".join(report.failed_gates),
        "ursa.comparison": comparison_text(report.comparison) if report.comparison else "",
        "ursa.metrics": json.dumps(report.metrics),
        "ursa.evaluation": report.manifest_uri,
        "ursa.model_directory": report.model.directory_uri,
    }
    with service(run.tracking_uri) as client:
        versions = _versions(client, name, "ursa.registration_key", key)
        if not versions:
            _remove_leftovers(client, run.experiment_id, name, key)
            model = _log_model(run, report, config, all_tags)
            client.update_run(run.run_id, status="RUNNING")  # MLflow has ended it
            verify_files(run.tracking_uri, model.model_uri, report.model)
            with contextlib.suppress(Exception):
                client.create_registered_model(name)
            versions = [
                client.create_model_version(
                    name, model.model_uri, run.run_id, all_tags, model_id=model.model_id
                )
            ]
        known = versions[-1].tags
        is_new = "ursa.aliased" not in known
        registry = releases.Registry(client, name, root_uri, decided_by)
        if is_new:
            releases.finish_version(registry, str(versions[-1].version), report)
        elif known.get("ursa.gate_passed") == "false":
            # other gates may hold now; a version that passed before keeps what a person made of it
            releases.decide_by_gate(registry, str(versions[-1].version), report)
        # a version found again has the newest lineage; what the next run finds it by comes last
        for tag, value in sorted(all_tags.items(), key=lambda item: item[0] == FINGERPRINT_TAG):
            client.set_model_version_tag(name, versions[-1].version, tag, value)
        return _version_record(client.get_model_version(name, versions[-1].version), is_new=is_new)


def verify_files(tracking_uri: str, model_uri: str, model: ExportedModel) -> None:
    """Download a logged model and compare the sha256 of every exported file.

    Args:
        tracking_uri: Address of the tracking server.
        model_uri: The logged model.
        model: What was exported.

    Raises:
        RegistrationError: If a file is missing or differs.
        ServiceError: If the server does not answer.
    """
    with storage.scratch_directory("verify") as folder:
        root = _download(tracking_uri, model_uri, folder)
        for relative, expected in model.sha256.items():
            matches = [path for path in root.glob(f"artifacts/*/{relative}") if path.is_file()]
            if len(matches) != 1 or storage.sha256_file(matches[0]) != expected:
                raise RegistrationError(
                    f"{model_uri}: {relative} is missing or differs from the exported file; run "
                    "again to register the model anew"
                )


def missing_files(client: "MlflowClient", model_id: str, model: ExportedModel) -> str | None:
    """Return which exported files a logged model lacks, by name; None if it has all.

    Args:
        client: MLflow's client.
        model_id: Id of the logged model.
        model: What was exported.
    """

    def names(folder: str) -> Iterator[str]:
        for item in client.list_logged_model_artifacts(model_id, folder):
            if item.is_dir:
                yield from names(item.path)
            else:
                yield item.path

    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.get_logged_model(model_id)
        found = {path.split("/", 2)[-1] for path in names("artifacts")}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return "its logged model is gone"
    gone = sorted(set(model.sha256) - found)
    return f"{len(gone)} of its files are gone, such as {gone[0]}" if gone else None


def _versions(client: "MlflowClient", name: str, tag: str, value: str) -> list[Any]:
    found = client.search_model_versions(f"name = '{name}' and tags.`{tag}` = '{value}'")
    return sorted(found, key=lambda item: int(item.version))


def _aliases(client: "MlflowClient", name: str, version: str) -> list[str]:
    return list(client.get_model_version(name, version).aliases)


def _version_record(item: Any, *, is_new: bool) -> ModelVersion:
    aliases = list(item.aliases)
    best = next((alias for alias in ("champion", "challenger") if alias in aliases), None)
    return ModelVersion(
        name=item.name,
        version=str(item.version),
        run_id=item.run_id,
        model_uri=f"models:/{item.name}/{item.version}",
        alias=best,
        is_new=is_new,
    )


def _remove_leftovers(client: "MlflowClient", experiment_id: str, name: str, key: str) -> None:
    """Delete models that an interrupted registration has left without a version."""
    used = {logged_model_id(version) for version in client.search_model_versions()}
    for left in logged_models(client, experiment_id, f"tags.`ursa.registration_key` = '{key}'"):
        # the same weights may be on their way, or registered, under another name
        if left.name == name and left.model_id not in used:
            client.delete_logged_model(left.model_id)


def logged_models(
    client: "MlflowClient", experiment_id: str, query: str | None = None
) -> Iterator[Any]:
    """Yield all logged models of an experiment: a search returns a hundred at most.

    Args:
        client: MLflow's client.
        experiment_id: The experiment.
        query: Which ones, in MLflow's words; None yields all.
    """
    page: str | None = None
    while True:
        found = client.search_logged_models([experiment_id], query, page_token=page)
        yield from found
        page = found.token
        if not page:
            return


def logged_model_id(version: Any) -> str:
    """Return the id of the logged model that a version is of.

    Args:
        version: As a search returns it, which leaves out its own field for that.
    """
    return str(version.source or "").rpartition("/")[2]


def _log_model(
    run: TrackedRun, report: EvalReport, config: RunConfig, tags: Mapping[str, str]
) -> Any:
    import mlflow  # noqa: PLC0415

    from tasks.pyfunc_model import INPUT_EXAMPLE, pip_requirements, signature  # noqa: PLC0415

    mlflow.set_tracking_uri(run.tracking_uri)
    mlflow.set_registry_uri(run.tracking_uri)
    with (
        storage.local_directory(report.model.directory_uri) as folder,
        mlflow.start_run(run_id=run.run_id, log_system_metrics=False),
    ):
        info = mlflow.pyfunc.log_model(
            name=config.release.model_name,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(folder)},
            code_paths=[str(Path(storage.__file__).parent)],
            signature=signature(),
            input_example=INPUT_EXAMPLE,
            pip_requirements=pip_requirements(),
            metadata={"config": config.model_dump(mode="json"), "lineage": dict(tags)},
            tags=dict(tags),
        )
        mlflow.log_metrics(report.metrics, step=0, model_id=info.model_id)
    return info


def _download(tracking_uri: str, model_uri: str, folder: Path) -> Path:
    import mlflow  # noqa: PLC0415

    with service(tracking_uri):
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=model_uri, dst_path=str(folder), tracking_uri=tracking_uri
            )
        )


def _experiment_id(client: "MlflowClient") -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        with contextlib.suppress(Exception):  # somebody else may have been faster
            client.create_experiment(
                EXPERIMENT, tags={"mlflow.experimentKind": "custom_model_development"}
            )
        found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        raise ServiceError(f"MLflow at {client.tracking_uri} did not create an experiment")
    return str(found.experiment_id)


def _open_child(parent: TrackedRun, stage: str, tags: Mapping[str, str]) -> TrackedRun:
    send_spooled(parent.tracking_uri, parent.spool_uri)
    return _find_or_create(
        parent,
        f"tags.`mlflow.parentRunId` = '{parent.run_id}' and tags.`ursa.stage` = '{stage}'",
        stage,
        {"mlflow.parentRunId": parent.run_id, "ursa.stage": stage, **tags},
    )


def _find_or_create(
    beside: TrackedRun, query: str, name: str, tags: Mapping[str, str]
) -> TrackedRun:
    from mlflow.entities import RunTag  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    def find() -> list[Any]:
        return list(
            client.search_runs(
                [beside.experiment_id], query, order_by=["attributes.start_time ASC"]
            )
        )

    last = {
        tag.replace(".", ".last_", 1): value
        for tag, value in tags.items()
        if tag.startswith("prefect.")
    }
    last["ursa.process"] = process_mark()  # by which it is known whether it is still under way
    with service(beside.tracking_uri) as client:
        found = find()
        if not found:
            created = client.create_run(beside.experiment_id, tags={**tags, **last}, run_name=name)
            first, *others = find() or [created]
            for other in others:  # an answer was lost, or somebody else began at the same time
                with contextlib.suppress(MlflowException):
                    client.delete_run(other.info.run_id)
        else:
            first = found[0]
            is_finished = first.info.status == "FINISHED"
            new = {
                tag: value
                for tag, value in {**tags, **last}.items()
                if not (is_finished and tag in tags and tag.startswith(FIRST_TAGS))
            }
            client.update_run(first.info.run_id, status="RUNNING")
            client.log_batch(first.info.run_id, tags=[RunTag(*item) for item in new.items()])
        return beside.model_copy(
            update={"run_id": first.info.run_id, "began_ms": first.info.start_time}
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
