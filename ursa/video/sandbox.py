"""What the child processes that decode may do: no credentials, no network, bounded resources.

The parent starts a child with `child_environment`; the first thing a child does is `limit_process`.
"""

import ctypes
import math
import os
import resource
import signal
import sys
from pathlib import Path

import ursa

_MAX_OPEN_FILES = 64
_DETAIL_CHARACTERS = 500
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
# all that the child may know of the environment: no credentials, no service addresses
_PASSED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "TZ")


def child_environment() -> dict[str, str]:
    """Return the environment of a child, in which this package can be imported."""
    environment = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
    package_parent = str(Path(ursa.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_parent, inherited)))
    # one thread each, and few memory arenas: threads reserve address space, which is limited
    return environment | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def child_command(module: str) -> list[str]:
    """Return the command that runs a module as a child.

    Args:
        module: Dotted name of a module with a `__main__` part.
    """
    # -P: the folder in which the child works is no place to import from
    return [sys.executable, "-P", "-m", module]


def limit_process(*, memory_bytes: int, written_bytes: int, cpu_s: int | None = None) -> None:
    """Bound what this process can do, for good; what the platform lacks is left out.

    Args:
        memory_bytes: Address space.
        written_bytes: Greatest file that may be written.
        cpu_s: Processor time, seconds, up to which `move_cpu_limit` can go; None does not bound it.
    """
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, written_bytes),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        if value is None:
            continue
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # noqa: PLW2901
        resource.setrlimit(kind, (value, value))
    die_with_parent()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Let this process be killed when the thread that has started it ends, where that is known."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def move_cpu_limit(cpu_s: float) -> None:
    """End this process (SIGXCPU) when it has used so much processor time, if it is bounded at all.

    Args:
        cpu_s: Processor time since the process began, seconds; what `limit_process` set stays the
            most.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (min(math.ceil(cpu_s), hard), hard))


def last_words(stderr: bytes) -> str:
    """Return the last line that a child wrote to its standard error.

    Args:
        stderr: The end of what it wrote.
    """
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:_DETAIL_CHARACTERS] if lines else "nothing"
