"""The tutorials, and every other block that needs services or a model, in a clean checkout.

The commands are the literal ones, in the order of a reader: the first model, videos of one's own,
then the other pages, at last the schedule. Only the presets of that checkout are made smaller,
so that a run is a matter of a minute, and services are on ports of their own.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.documents import PAGES, ROOT, Block, blocks
from tests.e2e.stand_ins import STAND_INS
from tests.running_services import TINY, ask, changed, free_port
from ursa.config import PRESETS, load_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

FIRST = ("first-model", "evaluation", "your-own-videos")
"""Pages in the order of a reader; evaluation wants a data root of one source."""
LAST = ("schedule-retraining", "ray-cluster", "s3")
"""What the last two leave in the registry is nowhere when their stores are gone."""
STAGE = {"max_steps": 40, "checkpoint_every": 20, "validate_every": 20, "sample_every": 20}
SMALLER = changed(
    {
        "tokenization": {"num_frames": 9, "window_stride_s": 0.25},
        "evaluation": {"max_samples": 16},
        "stages": dict.fromkeys(TINY["stages"], STAGE),
        # so small a network need not beat the unigram to become champion
        "release": {"gate_min_timestep": 1.0},
    }
)


def place(page: Path) -> int:
    """Return where a page is in the order of a reader."""
    if page.stem in LAST:
        return 99 + LAST.index(page.stem)
    return FIRST.index(page.stem) if page.stem in FIRST else len(FIRST)


SERVED = [
    [block for block in blocks(page) if block.mark in {"run: pipeline", "run: stand-ins"}]
    for page in sorted(PAGES, key=place)
]


class Checkout(NamedTuple):
    folder: Path
    environment: dict[str, str]

    def run(self, code: str, limit_s: float = 900) -> str:
        bash = shutil.which("bash")
        assert bash
        done = subprocess.run(
            [bash, "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-5000:]}"
        return done.stdout

    def state(self, run_id: str, limit_s: float = 200) -> str:
        """Return the name of the state in which a flow run has ended."""
        url = f"{self.environment['PREFECT_API_URL']}/flow_runs/{run_id}"
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            state = ask(url)["state"]
            if state["type"] not in {"SCHEDULED", "PENDING", "RUNNING"}:
                return str(state["name"])
            time.sleep(1)
        return f"still {state['name']}"

    def versions(self) -> list[dict[str, str]]:
        url = f"{self.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/model-versions/search"
        return list(ask(f"{url}?filter=name%3D'ursa'").get("model_versions", []))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """The files of a clone with the environment of this one, as after `make setup`."""
    folder = tmp_path_factory.mktemp("clone") / "ursa"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".installed":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / ".installed").touch()
    for name in PRESETS:
        preset = load_config(name, SMALLER).model_dump(mode="json")
        (folder / "ursa" / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(preset))

    own = ("URSA_", "PREFECT_", "MLFLOW_", "RAY_", "VIRTUAL_ENV")
    prefect, mlflow = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(own)},
        "PYTHONPATH": str(folder),
        "URSA_PREFECT_PORT": str(prefect),
        "URSA_MLFLOW_PORT": str(mlflow),
        "URSA_LAUNCHER": "local",
        # what the pages say to export with ports that are not the usual ones
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow}",
    }
    made = Checkout(folder, environment)
    try:
        yield made
    finally:
        made.run("make down")


def run_all(page: list[Block], checkout: Checkout) -> Iterator[str]:
    """Run the blocks of a page; yield what each prints."""
    with contextlib.ExitStack() as stack:
        swaps: dict[str, str] = {}
        unused: set[str] = set()
        if any(block.mark == "run: stand-ins" for block in page):
            swaps |= stack.enter_context(STAND_INS[page[0].page](checkout.folder))
            unused |= set(swaps)
        for block in page:
            code = block.code
            if block.mark == "run: stand-ins":
                for name, stand_in in swaps.items():
                    unused -= {name} if name in code else set()
                    code = code.replace(name, stand_in)
                if block.language == "python":
                    code = f"python - <<'END'\n{code}END\n"
                code = f"source .venv/bin/activate\n{code}"
            yield checkout.run(code)
        assert not unused, "the page names these no more"
    if swaps:  # what was exported must not reach the runs of other pages
        checkout.run("make up")


@pytest.mark.parametrize("page", filter(None, SERVED), ids=lambda page: page[0].page)
def test_every_block_of_a_page_runs(page: list[Block], checkout: Checkout) -> None:
    output = "".join(run_all(page, checkout))
    if page[0].page.endswith("first-model.md"):
        (version,) = checkout.versions()
        assert version["status"] == "READY"
        assert (checkout.folder / "bird.mp4").read_bytes()[4:8] == b"ftyp"
        assert "champion" in output
    if page[0].page.endswith("your-own-videos.md"):
        assert len(checkout.versions()) == 3
        assert "cardboard_box.mp4" in output
    if page[0].page.endswith("schedule-retraining.md"):
        # the first run, by hand, when the source was still that of the first model
        assert checkout.state(output.split("flow-run/")[1][:36]) == "NoNewData"
