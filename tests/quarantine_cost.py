"""What one foreign file costs under the limits of a preset; run as a process of its own.

`python -m tests.quarantine_cost FILE` prints a JSON object.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from ursa.config import load_config
from ursa.video.probe import QuarantinedError, copy_foreign_file, normalise_video


def resident_bytes(name: str) -> int:
    """Return VmRSS, or VmHWM for the most so far, of this process."""
    status = Path("/proc/self/status").read_text("ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def main() -> None:
    config = load_config("tiny").ingestion
    with tempfile.TemporaryDirectory() as folder:
        before, start_s = resident_bytes("VmRSS"), time.monotonic()
        try:
            _, demuxer = copy_foreign_file(Path(sys.argv[1]), Path(folder), config)
            normalise_video(Path(folder), demuxer, config)
            reason = "ok"
        except QuarantinedError as error:
            reason = error.reason
        wall_s = time.monotonic() - start_s
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "reason": reason,
        "wall_s": wall_s,
        "child_cpu_s": child.ru_utime + child.ru_stime,
        "child_bytes": child.ru_maxrss << 10,
        "parent_bytes": resident_bytes("VmHWM") - before,
    }
    sys.stdout.write(json.dumps(cost))


if __name__ == "__main__":
    main()
