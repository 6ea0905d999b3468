"""What one foreign file costs under the limits of a preset; run as a process of its own.

`python -m tests.quarantine_cost FILE` prints a JSON object.
"""

import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from ursa.config import load_config
from ursa.video.probe import QuarantinedError, copy_foreign_file, normalise_video


def resident_bytes(name: str) -> int:
    """Return VmRSS, or VmHWM for the most so far, of this process."""
    status = Path("/proc/self/status").read_text("ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def measured(path: Path) -> dict[str, object]:
    """Take a file in; the process that forks ends with the thread that calls this."""
    config = load_config("tiny").ingestion
    with tempfile.TemporaryDirectory() as folder:
        before, start_s = resident_bytes("VmRSS"), time.monotonic()
        try:
            _, demuxer = copy_foreign_file(path, Path(folder), config)
            normalise_video(Path(folder), demuxer, config)
            reason = "ok"
        except QuarantinedError as error:
            reason = error.reason
        wall_s = time.monotonic() - start_s
    (fork_server,) = psutil.Process().children()
    times = fork_server.cpu_times()
    return {
        "reason": reason,
        "wall_s": wall_s,
        "child_cpu_s": times.children_user + times.children_system,
        "parent_bytes": resident_bytes("VmHWM") - before,
    }


def main() -> None:
    with ThreadPoolExecutor(1) as pool:
        cost = pool.submit(measured, Path(sys.argv[1])).result()
    assert not psutil.Process().children()
    # of the process that has forked and of the child, whichever was larger
    child_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    sys.stdout.write(json.dumps(cost | {"child_bytes": child_bytes}))


if __name__ == "__main__":
    main()
