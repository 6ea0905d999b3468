"""What every process of a distributed training stage runs; knows neither Prefect nor Ray."""

import json
import multiprocessing.util
import os
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from tasks.metric_sink import MetricSink
from tasks.tracking import (
    PROBE_LIMIT_S,
    TrackedRun,
    check_service,
    log_stage_samples,
)
from ursa.artifacts import StageRequest
from ursa.config import StageConfig
from ursa.training.execution import Execution

PROGRESS_EVERY_S = 5.0


class StageProgress:
    """Writes the progress of a stage to its Prefect artifact over HTTP."""

    def __init__(self, artifact_url: str, max_steps: int) -> None:
        """Begin to measure the time.

        Args:
            artifact_url: Address of the artifact; with "" nothing is written.
            max_steps: Steps of the stage.
        """
        self._url = artifact_url
        self._max_steps = max_steps
        self._began = time.monotonic()
        self._last = 0.0
        self._first_step: int | None = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step; they are written at most every `PROGRESS_EVERY_S` seconds.

        Args:
            step: Steps done, from 1.
            metrics: `train/loss` in nats is shown, if it is there.

        Raises:
            OSError: If the server does not take it.
        """
        now = time.monotonic()
        if self._first_step is None:
            # what comes before the first step comes once
            self._first_step, self._began = step, now
        if not self._url or (now - self._last < PROGRESS_EVERY_S and step < self._max_steps):
            return
        self._last = now
        text = f"step {step} of {self._max_steps}"
        if steps := step - self._first_step:
            left_s = (now - self._began) / steps * (self._max_steps - step)
            text += f", {left_s:.0f} s left"
        loss = metrics.get("train/loss")
        text += "" if loss is None else f", loss {loss:.4f}"
        body = {"data": min(100.0, 100.0 * step / self._max_steps), "description": text}
        call = urllib.request.Request(  # noqa: S310  (the address of our Prefect server)
            self._url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method="PATCH",
        )
        urllib.request.urlopen(call, timeout=5).close()  # noqa: S310


class StageSamples:
    """Logs the samples that a stage has drawn, beside its progress."""

    def __init__(self, run: TrackedRun, samples_uri: str, progress: StageProgress) -> None:
        """Keep where samples are and where they go.

        Args:
            run: The run of the stage.
            samples_uri: Where its samples are.
            progress: Told of every step first.
        """
        self._run = run
        self._samples_uri = samples_uri
        self._progress = progress
        self._seen: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a step and log what is there and not logged yet.

        Args:
            step: Steps done, from 1.
            metrics: Of that step.

        Raises:
            OSError: If the progress is not taken.
            UrsaError: If the tracking server or the store does not answer.
        """
        self._progress(step, metrics)
        check_service(self._run.tracking_uri, timeout_s=PROBE_LIMIT_S)
        log_stage_samples(self._run, self._samples_uri, self._seen)


class LocalSink:
    """Sends metrics from whichever local process calls it first; survives pickling."""

    def __init__(
        self, run: TrackedRun, on_step: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        """Keep what a sink takes; it is opened by the first call.

        Args:
            run: Where metrics go.
            on_step: Takes progress and samples.
        """
        self._run = run
        self._on_step = on_step
        self._sink: MetricSink | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sink": None}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step.

        Args:
            step: Steps done, from 1.
            metrics: Values by name.
        """
        if self._sink is None:
            sink = MetricSink(self._run, on_step=self._on_step, measures_machine=True)
            self._sink = sink.__enter__()
            # child processes of multiprocessing run finalizers, not `atexit`
            multiprocessing.util.Finalize(None, self.close, exitpriority=10)
        self._sink(step, metrics)

    def close(self) -> None:
        """Send what is left, in the process that has called."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.__exit__(None, None, None)


def run_stage(arguments: dict[str, Any], is_told_to_end: Callable[[], bool]) -> None:
    """Train a stage as one rank; rank 0 sends metrics to the tracking run.

    Args:
        arguments: `request`, `execution` and `run` as JSON texts, `progress_url` of the artifact or
            "".
        is_told_to_end: Whether to save and end now.

    Raises:
        SystemExit: When told to end, after saving.
        UrsaError: What `ursa.training.stage.train_stage` raises.
    """
    from ursa.training.stage import samples_uri, train_stage  # noqa: PLC0415  (torch)

    request = StageRequest.model_validate_json(arguments["request"])
    execution = Execution.model_validate_json(arguments["execution"])
    if int(os.environ.get("RANK", "0")) != 0:
        train_stage(request, execution=execution, is_told_to_end=is_told_to_end)
        return
    run = TrackedRun.model_validate_json(arguments["run"])
    stage: StageConfig = getattr(request.config.stages, request.stage)
    progress = StageProgress(arguments["progress_url"], stage.max_steps)
    on_step = StageSamples(run, samples_uri(request), progress)
    with MetricSink(run, on_step=on_step, measures_machine=True) as sink:
        train_stage(request, execution=execution, on_metrics=sink, is_told_to_end=is_told_to_end)
