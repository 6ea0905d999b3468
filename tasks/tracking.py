"""Runs in MLflow, with what they show: parameters, tags, inputs, files, samples.

One parent run per fingerprint of a run and one child run a step, found again by their tags, so
that a resumed or repeated run goes on in the same place. MLflow itself is imported when the first
call needs it (3 s), here and in `tasks.metric_sink` and `tasks.model_registry`, and nowhere else.
Imported on Ray's workers as well, so no Prefect here.
"""

import contextlib
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from tasks import spool
from tasks.processes import process_mark
from ursa import storage
from ursa.artifacts import SAMPLES_PICTURE, ModelVersion
from ursa.config import FrozenModel, RunConfig
from ursa.errors import DataError, ServiceError, UrsaError

if TYPE_CHECKING:
    from mlflow.entities import RunData
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "ursa"
TRAINING_VIEW = "workflowType=machine_learning"
"""Query of a page, without which MLflow shows the menu for language-model applications."""
PROBE_LIMIT_S = 2.0
"""How long a server may take to say that it is there."""
CLOSE_LIMIT_S = 20.0
"""How long values are sent that have waited."""
METRICS_PER_BATCH = 1000
"""What MLflow takes at most."""
FIRST_TAGS = ("prefect.", "mlflow.source.")
"""Tags that say who made a run: a finished run keeps them."""
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
            send_values(client, run_id, client.get_run(run_id).data, entries)
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


def send_values(
    client: "MlflowClient", run_id: str, stored: "RunData", entries: Sequence[spool.Entry]
) -> None:
    """Send the values of some lines whose step is after the last one that the server has.

    Args:
        client: MLflow's client.
        run_id: The run.
        stored: What the server has of it.
        entries: Lines of a spool.
    """
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
