"""Whether the process that began something is still there."""

import functools
import socket

import psutil

_SAME_S = 2.0
"""Start times are computed from the boot time, which a corrected clock moves a little."""


@functools.cache
def process_mark() -> str:
    """Return what tells this process from all others: `<host>:<pid>:<start, seconds since 1970>`.

    Asked again after a fork it is that of the parent.
    """
    process = psutil.Process()
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"


def process_lives(mark: str | None) -> bool | None:
    """Return whether a process is still there; None if that cannot be known here.

    Args:
        mark: What `process_mark` returned in it; None if nobody wrote it down.
    """
    if mark is None:
        return None
    host, pid, start = mark.rsplit(":", 2)
    if host != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(pid))
        is_same = abs(process.create_time() - float(start)) < _SAME_S
        return is_same and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None


def flow_run_ids() -> set[str]:
    """Return the ids of the flow runs that have a process on this machine."""
    found = set()
    for process in psutil.process_iter():
        try:
            values = process.environ()
        except psutil.Error:  # gone, or another user's
            continue
        found |= {values.get("PREFECT__FLOW_RUN_ID"), values.get("PREFECT_FLOW_RUN_ID")}
    return {item for item in found if item}
