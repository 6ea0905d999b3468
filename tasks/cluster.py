"""The only importer of Ray: parallel units on Ray actors, distributed training on Ray Train.

Ray is started when the first unit of work needs it and stopped by the flow. This module is
imported on Ray's workers as well, so it imports neither Prefect nor MLflow.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from tasks.settings import RuntimeSettings
from ursa import errors
from ursa.artifacts import CheckpointRef
from ursa.config import FrozenModel
from ursa.errors import ConfigError, ServiceError, TrainingError, UrsaError
from ursa.training.execution import CPU_BACKEND, GPU_BACKEND
from ursa.training.termination import Termination

logger = logging.getLogger(__name__)

Item = TypeVar("Item", bound=FrozenModel)
Result = TypeVar("Result", bound=FrozenModel)

INIT_ATTEMPTS = 3
UNIT_ROUNDS = 3
MAX_LOSSES = 3
"""How often a unit may lose the actor that works on it; then it is given up."""
ACTOR_START_S = 300.0
"""If no actor starts for so long while none works, the cluster has no room for one."""
OBJECT_STORE_BYTES = 256 << 20
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SAVE_LIMIT_S = 1800.0
"""How long the driver waits for a last checkpoint, as for any."""
_POLL_S = 1.0
_SIGNAL_POLL_S = 0.2
_ANSWER_S, _LEAVE_S = 10.0, 10.0
_actor_numbers = itertools.count()
_told_to_end = threading.Event()
"""Of this process, if it is a training worker."""


class Workers(NamedTuple):
    """What an actor of a step is called and needs."""

    name: str = "unit"
    num_cpus: int = 1
    num_gpus: float = 0.0


def map_units(
    make_unit: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    result_type: type[Result],
    settings: RuntimeSettings,
    *,
    workers: Workers = Workers(),  # noqa: B008  (immutable)
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """Apply a unit function to all items in parallel; yield the results as they come.

    An error of one unit does not stop the others: what is finished stays committed. Transient
    errors are tried again in up to `UNIT_ROUNDS` rounds, then the first error is raised. A unit
    whose actor is lost, with its node or alone, is done again on another one, so units must be
    such that doing one twice is harmless; one that loses `MAX_LOSSES` actors has failed.

    Args:
        make_unit: Called once per actor; must pickle and lead to functions of `ursa`.
        items: Records to work on.
        result_type: Type of the records that the unit returns.
        settings: Where to run.
        workers: Name and needs of the actors; `settings.num_workers` is how many there are.
        on_progress: Called with the number of items done and of all items.

    Yields:
        One result an item, unless an error is raised at the end.

    Raises:
        UrsaError: The first error of a unit that did not go away.
        ServiceError: If Ray cannot be started or reached.
    """
    num_done = 0
    todo = list(items)
    failed: list[tuple[Item, UrsaError]] = []
    for attempt in range(UNIT_ROUNDS):
        failed = []
        for index, outcome in _outcomes(make_unit, todo, settings, workers):
            result = None
            if outcome["error"]:
                failed.append((todo[index], _restore_error(outcome)))
            else:
                result = result_type.model_validate_json(outcome["result"])
                num_done += 1
            if on_progress is not None:
                on_progress(num_done, len(items))
            if result is not None:
                yield result
        if not failed or not all(error.transient for _, error in failed):
            break
        logger.warning("%d units failed in round %d: %s", len(failed), attempt + 1, failed[0][1])
        todo = [item for item, _ in failed]
    if failed:
        raise next((error for _, error in failed if not error.transient), failed[0][1])


def run_distributed(
    worker: Callable[[dict[str, Any], Callable[[], bool]], None],
    arguments: dict[str, Any],
    find: Callable[[], CheckpointRef | None],
    settings: RuntimeSettings,
) -> CheckpointRef:
    """Run a training function on `num_train_workers` processes of Ray Train.

    Our own checkpoints do the resuming, so every call starts a new Ray Train run in a scratch
    folder. A lost worker restarts the group; the stage goes on from its newest checkpoint. SIGTERM
    to this process makes the workers save and end; SIGTERM to a worker makes all save, and the
    group starts again.

    Args:
        worker: Top-level function run by every rank; gets `arguments` and a function that says
            whether to save and end with `SystemExit`.
        arguments: JSON values.
        find: Returns the committed result of the stage, if there is one.
        settings: Where to run.

    Returns:
        The committed checkpoint.

    Raises:
        UrsaError: What the workers raised.
        TrainingError: If the workers ended without a committed checkpoint.
        ServiceError: If Ray cannot be started or reached.
        SystemExit: With status 143, after SIGTERM, unless the handler of before ends otherwise.
    """
    _connect(settings)
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    gpus = settings.gpus_per_train_worker
    # Ray gives a process as many threads as it has cores
    cores = settings.cpus_per_train_worker or max(
        1, (os.cpu_count() or 1) // settings.num_train_workers
    )
    resources: dict[str, float] = {"CPU": cores, **({"GPU": gpus} if gpus else {})}
    _check_room(resources, settings)
    mailbox = _mailbox()
    with tempfile.TemporaryDirectory(prefix="ursa-train-") as scratch, Termination() as termination:
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"worker": worker, "arguments": arguments, "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=settings.num_train_workers,
                use_gpu=gpus > 0,
                resources_per_worker=resources,
            ),
            torch_config=TorchConfig(backend=GPU_BACKEND if gpus else CPU_BACKEND, timeout_s=300),
            run_config=RunConfig(
                name="stage", storage_path=scratch, failure_config=FailureConfig(max_failures=2)
            ),
        )
        failure = _fit(trainer.fit, mailbox, termination)
    refused = _read_mailbox(mailbox)
    if refused is not None:
        raise refused
    checkpoint = find()
    if checkpoint is not None:
        return checkpoint
    if failure is not None:
        raise _cause(failure) from failure
    raise TrainingError("the training workers ended without a committed checkpoint")


def _check_room(needs: dict[str, float], settings: RuntimeSettings) -> None:
    """Refuse what this machine will never have: Ray would wait for it without a word."""
    import ray  # noqa: PLC0415

    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in needs.items():
        wanted, there = each * settings.num_train_workers, found.get(name, 0)
        if wanted <= there:
            continue
        missing = (
            f"URSA_NUM_TRAIN_WORKERS {settings.num_train_workers} with "
            f"URSA_{name}S_PER_TRAIN_WORKER {each:g} needs {wanted:g} {name}s, and Ray has "
            f"{there:g}"
        )
        if settings.ray_address is None:
            raise ConfigError(f"{missing}; lower one of the two")
        logger.warning("%s; the stage waits until a node joins", missing)


def _fit(fit: Callable[[], object], mailbox: Any, termination: Termination) -> Exception | None:
    """Run Ray Train; return what it raised. After SIGTERM let the workers save, then end."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as error:  # noqa: BLE001  (Ray wraps everything; unwrapped later)
            failures.append(error)

    # in a thread, as this one must be free for signals
    fitting = threading.Thread(target=run, name="ray-train", daemon=True)
    fitting.start()
    try:
        while fitting.is_alive() and not termination.requested:
            fitting.join(_SIGNAL_POLL_S)
    except BaseException:
        mailbox.end.remote()
        raise
    if termination.requested:
        _ask(mailbox, "end")
        end_s = time.monotonic() + SAVE_LIMIT_S
        while fitting.is_alive() and _ask(mailbox, "num_at_work") and time.monotonic() < end_s:
            fitting.join(_SIGNAL_POLL_S)
        fitting.join(_LEAVE_S)  # Ray ends the process itself if it is stopped under a call
        logger.warning("SIGTERM: no training worker is left at work")
        termination.end()
    return failures[0] if failures else None


def shutdown() -> None:
    """Stop Ray if this process has started it."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        with _keep_signal_handlers():
            ray.shutdown()


def _connect(settings: RuntimeSettings) -> None:
    """Start Ray on this machine or join the cluster of the settings; once per process."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import ray  # noqa: PLC0415  (2 s; not needed when all work is done)

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"address": settings.ray_address or "local"}
    if settings.ray_address is None:
        cores = os.cpu_count() or 1
        options.update(
            # one more than needed: the helpers of Ray Train want a slot of their own
            num_cpus=max(
                cores,
                settings.num_workers * settings.decoders_per_worker,
                settings.num_train_workers,
            )
            + 1,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
    for attempt in range(1, INIT_ATTEMPTS + 1):
        try:
            with _keep_signal_handlers(), _session_of_its_own():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except Exception as error:
            logger.warning("Ray did not start (attempt %d): %s", attempt, _first_line(error))
            with contextlib.suppress(Exception):
                ray.shutdown()
            if attempt == INIT_ATTEMPTS:
                where = settings.ray_address or "this machine"
                raise ServiceError(
                    f"Ray cannot be started or reached at {where}: {_first_line(error)}; check "
                    "RAY_ADDRESS and the free memory, or set URSA_LAUNCHER=local"
                ) from error
            time.sleep(2 * attempt)
        else:
            break
    logging.getLogger("ray.train").setLevel(logging.ERROR)


@contextlib.contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Undo Ray's replacement of the SIGTERM handler, which would break cancellation."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _session_of_its_own() -> Iterator[None]:
    """Start Ray's daemons out of this process group: a signal to it is for this process to handle.

    They still end with it.
    """
    from ray._private import services  # noqa: PLC0415  (Ray has no setting for it)

    module: Any = services
    popen = module.ConsolePopen
    module.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        module.ConsolePopen = popen


def _outcomes(
    make_unit: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    settings: RuntimeSettings,
    workers: Workers,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (position of the item, outcome) as units finish."""
    if not items:
        return
    if settings.launcher == "local":
        unit = _Unit(make_unit, type(items[0]))
        for index, item in enumerate(items):
            yield index, unit.run(item.model_dump_json())
        return
    _connect(settings)
    import ray  # noqa: PLC0415  (seconds; not needed when all work is done)

    try:
        with contextlib.closing(_ActorPool(make_unit, items, settings, workers)) as pool:
            yield from pool.outcomes()
    except ray.exceptions.RayError as error:
        raise ServiceError(
            f"Ray gave up ({_first_line(error)}); run again: finished units are kept"
        ) from error


class _ActorPool:
    """Units on actors, one at a time each; lost actors are replaced, their units done again."""

    def __init__(
        self,
        make_unit: Callable[[], Callable[[Any], FrozenModel]],
        items: Sequence[FrozenModel],
        settings: RuntimeSettings,
        workers: Workers,
    ) -> None:
        import ray  # noqa: PLC0415

        self._ray = ray
        self._items = items
        self._workers = workers
        # Ray restarts nothing by itself: it would repeat for ever what kills an actor
        self._actor_class = ray.remote(
            num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, max_restarts=0, max_task_retries=0
        )(_Unit)
        self._arguments = (make_unit, type(items[0]))
        self._waiting = deque(range(len(items)))
        self._losses: Counter[int] = Counter()
        # what is awaited, from whom, and for which item; None: the actor starts
        self._pending: dict[Any, tuple[Any, int | None]] = {}
        self._max_failed_starts = MAX_LOSSES * min(settings.num_workers, len(items))
        self._failed_starts = 0
        for _ in range(min(settings.num_workers, len(items))):
            self._start_actor()

    def outcomes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (position of the item, outcome) as units finish."""
        last_sign_s = time.monotonic()
        while self._waiting or self._is_working():
            ready, _ = self._ray.wait(list(self._pending), timeout=_POLL_S)
            for future in ready:
                yield from self._settle(future)
            if ready or self._is_working():
                last_sign_s = time.monotonic()
            elif time.monotonic() - last_sign_s > ACTOR_START_S:
                raise ServiceError(
                    f"no node of the Ray cluster had room for an actor within {ACTOR_START_S:.0f} "
                    f"s, expected {self._workers.num_cpus} CPUs and {self._workers.num_gpus:g} "
                    "GPUs; add nodes, or ask for less: URSA_DECODERS_PER_WORKER, "
                    "URSA_GPUS_PER_WORKER"
                )

    def close(self) -> None:
        """End all actors."""
        for actor, _ in self._pending.values():
            self._ray.kill(actor)
        self._pending.clear()

    def _is_working(self) -> bool:
        return any(index is not None for _, index in self._pending.values())

    def _start_actor(self) -> None:
        name = f"{self._workers.name}-{next(_actor_numbers)}"
        actor: Any = self._actor_class.options(name=name).remote(*self._arguments)
        self._pending[actor.start.remote()] = (actor, None)

    def _settle(self, future: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Take in an answer or a loss, and give the actor its next unit."""
        actor, index = self._pending.pop(future)
        try:
            answer = self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)  # it may be out of reach and still work
            yield from self._replace(index, error)
            return
        if self._waiting:
            following = self._waiting.popleft()
            call = actor.run.remote(self._items[following].model_dump_json())
            self._pending[call] = (actor, following)
        else:
            self._ray.kill(actor)  # makes room for one that is to finish the work of a lost one
        if index is not None:
            yield index, answer

    def _replace(self, index: int | None, error: Exception) -> Iterator[tuple[int, dict[str, Any]]]:
        """Start another actor; put the unit of the lost one last, or give it up."""
        reason = _first_line(error)
        if index is None:
            self._failed_starts += 1
            if self._failed_starts >= self._max_failed_starts:
                raise ServiceError(
                    f"{self._failed_starts} actors of Ray did not start ({reason}); often the "
                    "memory was full: set URSA_NUM_WORKERS lower, then run again"
                ) from error
        else:
            self._losses[index] += 1
            logger.warning("%s lost an actor (%s)", self._workers.name, reason)
            if self._losses[index] >= MAX_LOSSES:
                lost = UrsaError(
                    f"the process that worked on {_describe(self._items[index])} died "
                    f"{MAX_LOSSES} times ({reason}); often the memory was full: set "
                    "URSA_NUM_WORKERS lower, then run again: finished units are kept"
                )
                yield index, {"result": "", "error": _pack_error(lost)}
            else:
                self._waiting.append(index)
        if self._waiting:
            self._start_actor()


class _Unit:
    """What runs in an actor: turns every error into an outcome, so that one cannot stop the job."""

    def __init__(
        self, make_unit: Callable[[], Callable[[Any], FrozenModel]], item_type: type[FrozenModel]
    ) -> None:
        logging.getLogger("ursa").setLevel(logging.INFO)
        self._make_unit = make_unit
        self._item_type = item_type
        self._unit: Callable[[Any], FrozenModel] | None = None

    def start(self) -> None:
        """Prepare the process of an actor; the answer says that it has started."""
        torch = sys.modules.get("torch")
        if torch is not None:
            # more actors use more cores; and sums do not depend on how many decoders there are
            torch.set_num_threads(1)

    def run(self, item: str) -> dict[str, Any]:
        """Do a unit.

        Args:
            item: JSON of the item.

        Returns:
            JSON of the result, or of the error.
        """
        try:
            if self._unit is None:  # here, so that a model that cannot be loaded is an outcome
                self._unit = self._make_unit()
            result = self._unit(self._item_type.model_validate_json(item))
        except Exception as error:  # noqa: BLE001  (raised again by the caller)
            return {"result": "", "error": _pack_error(error)}
        return {"result": result.model_dump_json(), "error": ""}


def _describe(item: FrozenModel) -> str:
    """Name an item in a message."""
    values = item.model_dump(include={"uri", "key"})
    return f"{type(item).__name__} {next(iter(values.values()), '')}".strip()


def _pack_error(error: Exception) -> str:
    known = isinstance(error, UrsaError)
    return json.dumps(
        {
            "kind": type(error).__name__,
            "message": str(error) if known else f"{type(error).__name__}: {error}",
            "trace": "" if known else traceback.format_exc()[-4000:],
        }
    )


def _restore_error(outcome: dict[str, Any]) -> UrsaError:
    packed = json.loads(outcome["error"])
    kind = getattr(errors, packed["kind"], None)
    if isinstance(kind, type) and issubclass(kind, UrsaError):
        restored: UrsaError = kind(packed["message"])
        return restored
    logger.error("a unit failed unexpectedly:\n%s", packed["trace"])
    return UrsaError(packed["message"])


def _train_loop(config: dict[str, Any]) -> None:
    """Run the worker; put an error that repeating cannot cure in the mailbox and end quietly."""
    import ray  # noqa: PLC0415

    mailbox = config["mailbox"]
    try:
        with _at_work(mailbox):
            config["worker"](config["arguments"], _told_to_end.is_set)
    except SystemExit as stop:
        if not _ask(mailbox, "is_over"):
            # Ray starts the group again, where there is room for it
            raise ServiceError("a training worker was told to end; its stage is saved") from stop
    except UrsaError as error:
        if error.transient:
            raise
        ray.get(mailbox.put.remote(json.dumps({"error": _pack_error(error)})))


@contextlib.contextmanager
def _at_work(mailbox: Any) -> Iterator[None]:
    """Note SIGTERM to this process, the end of its node, and that the driver wants the end."""
    import ray  # noqa: PLC0415
    from ray.train.v2._internal.execution.context import get_train_context  # noqa: PLC0415

    # the public `get_preemption_info` is a barrier of all workers
    preemption = get_train_context().preemption_context
    finished = threading.Event()

    def watch() -> None:
        while not (_told_to_end.is_set() or finished.wait(_POLL_S)):
            if preemption.preemption_info is not None or _ask(mailbox, "is_over"):
                _told_to_end.set()

    _ask(mailbox, "begin")
    # training runs in a thread of the actor; signals go to the one that runs its methods
    actor: Any = ray.get_runtime_context().current_actor
    ray.get(actor.__ray_call__.remote(_note_sigterm))
    threading.Thread(target=watch, name="orders", daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        _ask(mailbox, "finish")


def _ask(mailbox: Any, method: str) -> object:
    """Call the mailbox; None without an answer."""
    import ray  # noqa: PLC0415

    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(getattr(mailbox, method).remote(), timeout=_ANSWER_S)
    return None


def _note_sigterm(_actor: object) -> None:
    """Let the first SIGTERM be noted; the second ends the process, as Ray wants it."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _told_to_end.is_set() and callable(before):
            before(number, frame)
        _told_to_end.set()

    signal.signal(signal.SIGTERM, note)


def _mailbox() -> Any:
    import ray  # noqa: PLC0415

    return ray.remote(num_cpus=0)(_Mailbox).remote()


class _Mailbox:
    """Between driver and training workers: their first message, who is at work, whether to end."""

    def __init__(self) -> None:
        self._message = ""
        self._num_at_work = 0
        self._is_over = False

    def put(self, message: str) -> None:
        """Keep the message unless there is one."""
        self._message = self._message or message

    def get(self) -> str:
        """Return the message, or an empty string."""
        return self._message

    def begin(self) -> None:
        """Note that a worker trains."""
        self._num_at_work += 1

    def finish(self) -> None:
        """Note that a worker does not train any more."""
        self._num_at_work -= 1

    def num_at_work(self) -> int:
        """Return how many train; one that was lost still counts."""
        return self._num_at_work

    def end(self) -> None:
        """Let the workers end."""
        self._is_over = True

    def is_over(self) -> bool:
        """Return whether the workers shall end."""
        return self._is_over


def _read_mailbox(mailbox: Any) -> UrsaError | None:
    import ray  # noqa: PLC0415

    message = ray.get(mailbox.get.remote(), timeout=60)
    ray.kill(mailbox)
    return _restore_error(json.loads(message)) if message else None


def _cause(failure: Exception) -> UrsaError:
    """Find the error of ours that Ray has wrapped, else say the first line of Ray's."""
    waiting: list[BaseException | None] = [failure]
    first = failure
    while waiting:
        error = waiting.pop(0)
        if error is None:
            continue
        if isinstance(error, UrsaError):
            return error
        worker_failures = getattr(error, "worker_failures", None)
        if worker_failures:
            waiting.extend(worker_failures.values())
            first = next(iter(worker_failures.values()))
        waiting.extend([getattr(error, "cause", None), error.__cause__])
    return TrainingError(f"training failed: {_first_line(first)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
