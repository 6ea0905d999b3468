"""Processes forked from a warm parent: the same protocols, in processes that are really killed."""

import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tests.faults.memory_store import MemoryStore
from tests.faults.protocols import Scenario
from ursa import storage

_FILE_EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Child:
    """A fork that runs a function; its result, if it lives to return one, comes through a pipe."""

    def __init__(self, function: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            status = 1
            try:
                answer = pickle.dumps(function())
                with os.fdopen(writer, "wb") as file:
                    file.write(answer)
                status = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        self._reader = reader

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, Any]:
        """Return the number of the signal that ended it, or 0 and its result."""
        with os.fdopen(self._reader, "rb") as file:
            data = file.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status), None
        assert os.WEXITSTATUS(status) == 0, "the child failed, see its traceback"
        return 0, pickle.loads(data)


def die_at_operation(number: int, root: str) -> None:
    """End this process by SIGKILL before it touches a file below a directory for the n-th time."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and root in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_byte(number: int) -> None:
    """Let the kernel end this process in the middle of a write, at that byte of any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))


def snapshot(root_uri: str) -> MemoryStore:
    """All that is published below a place; files that were being written do not count."""
    try:
        files = storage.list_files(root_uri, with_etag=False)
    except FileNotFoundError:
        return MemoryStore()
    return MemoryStore(
        {
            item.uri.removeprefix("s3://").removeprefix("file://"): storage.read_bytes(item.uri)
            for item in files
            if not item.uri.endswith(".tmp")
        }
    )


def problems_after_kill(scenario: Scenario, root_uri: str) -> list[str]:
    """What is wrong right after a kill, and after another run has ended well."""
    found = scenario.interrupted(snapshot(root_uri))
    scenario.run()
    return found + scenario.problems(snapshot(root_uri))
