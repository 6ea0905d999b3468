"""What all tasks share: retries of what is transient, JSON results, one-line errors."""

import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.tasks import exponential_backoff

from ursa.errors import UrsaError
from ursa.texts import PrintableRecords

if TYPE_CHECKING:
    from pydantic import BaseModel as ConfigOverrides
else:
    from ursa.config import ConfigOverrides

__all__ = [
    "ConfigOverrides",
    "announce",
    "retry_if_transient",
    "root_flow_run_id",
    "show_library_logs",
    "step",
]

P = ParamSpec("P")
R = TypeVar("R")

ENGINE_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.flow_engine", "prefect.engine")


def retry_if_transient(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task may succeed if repeated: only for errors that say so.

    Prefect calls it with the task, its run and its state; the state alone decides.

    Args:
        state: How the attempt ended.
    """
    try:
        state.result()
    except UrsaError as error:
        return error.transient
    except Exception:  # noqa: BLE001  (the one place that looks at every error)
        return False
    return False


def step(
    *, run_name: str | None = None, retries: int = 2
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a task of a function that wraps one library call.

    Manifests decide what is done already, so Prefect caches nothing. Results are small records in
    JSON. Only transient errors are repeated, with growing and jittered delays.

    Args:
        run_name: Name of the task's runs, a template over its arguments; None is Prefect's own.
        retries: Repetitions after a transient error.

    Returns:
        A decorator.
    """
    return task(
        task_run_name=run_name,
        retries=retries,
        retry_delay_seconds=exponential_backoff(2),
        retry_jitter_factor=0.5,
        retry_condition_fn=retry_if_transient,
        persist_result=True,
        result_serializer="json",
        cache_policy=NO_CACHE,
    )


def root_flow_run_id() -> str | None:
    """Return the id of the flow run around all others of this process; None outside of one.

    Where a worker has started the process it is in the environment: Prefect's own answer asks the
    server, and fails at once while that is away.
    """
    own = runtime.flow_run.id
    if own is None:
        return None
    return os.environ.get("PREFECT__FLOW_RUN_ID") or _root_of(str(own))


@functools.cache
def _root_of(flow_run_id: str) -> str:
    return str(runtime.flow_run.root_flow_run_id or flow_run_id)


def announce(message: str, *arguments: object) -> None:
    """Log a line for the task that runs, and for the whole run that it belongs to.

    Args:
        message: Format, as in `logging`.
        *arguments: What goes into it.
    """
    try:
        logger = get_run_logger()
    except MissingContextError:  # called without an orchestrator
        logging.getLogger(__name__).info(message, *arguments)
        return
    logger.info(message, *arguments)
    root = root_flow_run_id()
    if root not in {None, str(runtime.flow_run.id)}:
        extra = {"flow_run_id": root, "flow_run_name": "run", "flow_name": "ursa"}
        logging.getLogger("prefect.flow_runs").info(message, *arguments, extra=extra)


class _OneLine(logging.Filter):
    """Drop the traceback of errors that say by themselves what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UrsaError):
            record.exc_info = None
            record.exc_text = None
        return True


_one_line = _OneLine()
_printable = PrintableRecords()


def show_library_logs() -> None:
    """Let the INFO lines of the library through, each as one printable line, errors too."""
    logging.getLogger("ursa").setLevel(logging.INFO)
    for name in ("", "prefect", "ursa", *ENGINE_LOGGERS):
        for handler in logging.getLogger(name).handlers:
            if _printable not in handler.filters:
                handler.addFilter(_printable)
    for name in ENGINE_LOGGERS:
        logger = logging.getLogger(name)
        if _one_line not in logger.filters:
            logger.addFilter(_one_line)
