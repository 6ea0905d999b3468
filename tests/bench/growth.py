"""Peak of memory of the data steps by the number of clips.

    python tests/bench/growth.py                # 1,000 and 10,000 clips: a minute
    python tests/bench/growth.py 10000 100000
    python tests/bench/growth.py --library      # without what a flow has imported

Ten clips a file, none of which was ever decoded: files and their units are made up. Each number of
clips has a process of its own, which lists the source, reads the units, commits and selects the
clips. What it imports is loaded before: what the process of a flow has (Prefect, MLflow), or the
library alone; pandas too, which pyarrow loads for its first list.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import many_clips
from ursa import ingestion
from ursa.sources.listing import discover_videos

CLIPS_A_FILE = 10
STEPS = ("commit", "select")


def peak_mb() -> float:
    """Return the most memory this process has held, MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1000 if found else 0.0


def measure(folder: Path, *, is_flow: bool) -> dict[str, float]:
    """Commit and select the clips of a folder; return the peak so far after each step, MB."""
    source, data = str(folder / "videos"), str(folder / "data")
    if is_flow:
        importlib.import_module("flows.full_training")
        importlib.import_module("tasks.tracking")
    # after the library, which chooses the memory that it takes
    importlib.import_module("pyarrow").array([""])
    found = {"imports": peak_mb()}
    sources = discover_videos(source)
    plan = ingestion.plan_ingestion(source, sources, data, many_clips.config())
    clips = plan.committed or ingestion.commit_clips(
        source, plan.done, data, plan, many_clips.config()
    )
    found["commit"] = peak_mb()
    del sources, plan
    ingestion.select_clips(clips, many_clips.CONFIG.selection, output_uri=data)
    found["select"] = peak_mb()
    return found


def in_fresh_process(num_clips: int, *, is_flow: bool = True) -> dict[str, float]:
    """Make the clips up and measure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_files = num_clips // CLIPS_A_FILE
        many_clips.write_videos(
            folder / "videos", f"{folder}/data", num_files, clips_a_file=CLIPS_A_FILE
        )
        place = "flow" if is_flow else "library"
        command = [sys.executable, "-m", "tests.bench.growth", "--one", str(folder), place]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(few: int, many: int, *, is_flow: bool) -> None:
    """Print a Markdown table."""
    small, large = (in_fresh_process(number, is_flow=is_flow) for number in (few, many))
    print(f"| peak, MB | {few:,} clips | {many:,} clips | ratio | ratio over the imports |")
    print("|---|---|---|---|---|")
    for step in STEPS:
        over = (large[step] - large["imports"]) / (small[step] - small["imports"])
        cells = f"{small[step]:.0f} | {large[step]:.0f} | **{large[step] / small[step]:.2f}**"
        print(f"| after {step} | {cells} | {over:.2f} |")
    print(f"\nThe imports alone take {small['imports']:.0f} MB.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Path(sys.argv[2]), is_flow=sys.argv[3] == "flow")))
    else:
        numbers = [int(item) for item in sys.argv[1:] if item != "--library"] or [1000, 10_000]
        main(*numbers, is_flow="--library" not in sys.argv)
