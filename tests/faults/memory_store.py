"""An object store in memory that fails where it is told to.

It stands in for `s3fs.S3FileSystem` behind `ursa.storage._filesystem`, the one place where a client
is made. So everything of `ursa.storage` is the real thing: the deadlines, the repetition, the
reading back of a lost answer, the names of the errors. Nothing is started and nothing waits: the
clock is the store's own.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import botocore.exceptions
import pytest
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from ursa import storage, tokenization
from ursa.data import shards
from ursa.training import checkpoint

BUCKET = "memory"
ROOT = f"s3://{BUCKET}/root"

READ_FAULTS = ("crash_before", "busy_before", "timeout_before", "cut", "truncated", "outage")
LIST_FAULTS = ("crash_before", "busy_before", "timeout_before", "stale", "outage")
WRITE_FAULTS = (
    "crash_before",
    "crash_after",
    "busy_before",
    "busy_after",
    "timeout_before",
    "timeout_after",
    "outage",
)
FAULTS = {"read": READ_FAULTS, "list": LIST_FAULTS, "write": WRITE_FAULTS}
HARD_FAULTS = {
    "read": ("truncated",),
    "list": ("stale",),
    "write": ("crash_before", "crash_after", "busy_after"),
}
"""Those that no repetition inside one call makes good, and the lost answer.

A crash before a read leaves what a crash after the write before it leaves.
"""

UNWINDING_FAULTS = HARD_FAULTS | {"write": (*HARD_FAULTS["write"], "outage")}
"""With those that end a run by an error, so that what it has begun is cleaned up."""


class Crashed(BaseException):
    """The process is gone: no handler of the library may see this."""


class MemoryStore:
    """Objects by key; operation number k fails as `faults[k]` says.

    Attributes:
        objects: Content by `bucket/key`, in the order in which it was first written.
        trace: Kind of every operation so far: read, list or write. Tries during an outage, which
            lasts until `heal`, do not count.
        now_s: The clock: waiting and silence move it on.
        dead: Threads that have crashed: they reach the store no more, whatever they still run on
            the way out.
    """

    loop = None

    def __init__(
        self, objects: Mapping[str, bytes] | None = None, faults: Mapping[int, str] | None = None
    ) -> None:
        self.objects = dict(objects or {})
        self.faults = dict(faults or {})
        self.trace: list[str] = []
        self.now_s = 0.0
        self.is_out = False
        self.dead: set[int] = set()
        self.before_operation: Callable[[], None] = lambda: None

    def copy(self) -> "MemoryStore":
        """A store with the same objects and no faults."""
        return MemoryStore(self.objects)

    def heal(self) -> None:
        self.is_out = False
        self.dead.clear()

    def is_dead(self) -> bool:
        """Whether this thread has crashed."""
        return threading.get_ident() in self.dead

    # --- operations, by the names of s3fs ---------------------------------------------------------

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        with self._operation("read") as fault:
            data = self._get(path)[start:end]
            return data[: len(data) // 2] if fault == "truncated" else data

    async def _get_file(self, path: str, target: str) -> None:
        Path(target).write_bytes(await self._cat_file(path))

    async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        with self._operation("write"):
            if mode == "create" and path in self.objects:
                raise _answer(412, "PreconditionFailed", Condition="If-None-Match")
            self.objects[path] = bytes(data)

    async def _put_file(self, source: str, path: str) -> None:
        await self._pipe_file(path, Path(source).read_bytes())

    async def _info(self, path: str) -> dict[str, Any]:
        with self._operation("read"):
            return self._entry(path)

    async def _find(self, path: str, **_: bool) -> dict[str, dict[str, Any]]:
        with self._operation("list") as fault:
            keys = self._below(path)
            return {key: self._entry(key) for key in (keys[:-1] if fault == "stale" else keys)}

    async def _rm(self, path: str, **_: bool) -> None:
        with self._operation("list"):
            keys = self._below(path)
        for key in keys:  # never at once: a reader may see the half of it
            await self._rm_file(key)

    async def _rm_file(self, path: str) -> None:
        with self._operation("write"):
            self.objects.pop(path, None)

    # --- faults -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _operation(self, kind: str) -> Iterator[str]:
        if self.is_dead():
            raise Crashed
        self.before_operation()
        if self.is_out:
            self._be_silent()
        fault = self.faults.get(len(self.trace), "")
        self.trace.append(kind)
        self.now_s += 0.01
        self.is_out = fault == "outage"
        if fault == "busy_before":
            raise _answer(503, "SlowDown")
        if fault == "crash_before":
            self._crash()
        if fault in ("timeout_before", "outage"):
            self._be_silent()
        yield fault
        if fault == "crash_after":
            self._crash()
        if fault == "busy_after":
            raise _answer(503, "ServiceUnavailable")
        if fault == "timeout_after":
            self._be_silent()
        if fault == "cut":
            raise botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2)

    def _crash(self) -> NoReturn:
        self.dead.add(threading.get_ident())
        raise Crashed

    def _be_silent(self) -> None:
        self.now_s += storage.ANSWER_DEADLINE_S
        raise FSTimeoutError

    def _get(self, path: str) -> bytes:
        if path not in self.objects:
            raise _answer(404, "NoSuchKey")
        return self.objects[path]

    def _entry(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self._get(path)), "type": "file", "ETag": '"e"'}

    def _below(self, path: str) -> list[str]:
        return [key for key in self.objects if key.startswith(path.rstrip("/") + "/")]


def _answer(status: int, code: str, **more: str) -> Exception:
    """What s3fs raises for an answer."""
    error = {"Code": code, "Message": code, **more}
    response = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}
    raised: Exception = translate_boto_error(botocore.exceptions.ClientError(response, "call"))
    return raised


def _run(
    _loop: None,
    function: Callable[..., Coroutine[Any, Any, Any]],
    *arguments: Any,
    timeout: float | None = None,
    **options: Any,
) -> Any:
    """Run a coroutine that never waits, in this thread."""
    coroutine = function(*arguments, **options)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the store waited")


class _Later(NamedTuple):
    """Work that is done when its result is asked for, once."""

    result: Callable[[], Any]

    def cancel(self) -> None:
        pass


class _OneByOne:
    """A pool of no threads: operations have one order, and a crash ends all."""

    def __init__(self, _num_threads: int, **_: str) -> None:
        self.map = map

    def __enter__(self) -> "_OneByOne":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> _Later:
        return _Later(functools.partial(function, *arguments, **options))

    def shutdown(self, **_: bool) -> None:
        pass


@contextlib.contextmanager
def in_use(store: MemoryStore) -> Iterator[MemoryStore]:
    """All `s3://` URIs lead to the store, its clock is the clock, and no thread is started."""

    def sleep(seconds: float) -> None:
        store.now_s += seconds

    class AtOnce:
        """A thread that has ended when `start` returns; a crash in it ends the whole process."""

        def __init__(self, *, target: Callable[..., None], args: tuple[Any, ...], **_: Any) -> None:
            self._run = lambda: target(*args)

        def start(self) -> None:
            self._run()
            if store.is_dead():
                raise Crashed

    clock = SimpleNamespace(monotonic=lambda: store.now_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_filesystem", lambda _: store)
        for module in (storage, tokenization, shards):
            patch.setattr(module, "ThreadPoolExecutor", _OneByOne)
        patch.setattr(checkpoint, "threading", SimpleNamespace(Thread=AtOnce))
        patch.setattr("fsspec.asyn.sync", _run)
        patch.setattr("tenacity.nap.time", SimpleNamespace(sleep=sleep))
        for module in (storage, checkpoint):
            patch.setattr(module, "time", clock)
        yield store
