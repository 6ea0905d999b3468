"""The code blocks of the documentation that need no services, each run as it stands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import data_roots
from tests.documents import PAGES, ROOT, Block, blocks
from ursa.artifacts import ExportedModel, TokenizerRef
from ursa.config import load_config
from ursa.data.versions import commit_version

QUICK = [
    block
    for page in PAGES
    for block in blocks(page)
    if not block.mark and block.language in {"bash", "python", "json"}
]
OWN = ("URSA_", "PREFECT_", "MLFLOW_", "RAY_", "AWS_")


@pytest.fixture(scope="module")
def checkout(exported_model: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a data root of two versions, and what the pages say that one has.

    A tiny model stands where a page has downloaded the official one, in the same layout.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in {".git", ".ursa", ".venv", "build"}:
            (folder / path.name).symlink_to(path)
    (folder / ".ursa").mkdir()
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    root = data_roots.write_data_root(folder / ".ursa")
    text = TokenizerRef(
        manifest_uri="/gone.json",
        directory_uri="/gone",
        kind="text",
        vocab_size=8,
        metrics={},
        fingerprint="text",
    )
    commit_version(
        root.uri, root.config, root.selection, (text, text), root.datasets, code={"version": "0"}
    )
    (folder / "URSA-1.7B-FSQ320").symlink_to(exported_model.directory_uri)
    layers = {f"layers.{i}.{part}": torch.ones(2, 2) for i in (0, 2) for part in ("weight", "bias")}
    torch.save(layers, folder / "sa_0_4_vit_l_14_linear.pth")
    return folder


@pytest.mark.parametrize("block", QUICK, ids=lambda block: block.name)
def test_block_runs(block: Block, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "python":
        monkeypatch.chdir(checkout)
        exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})
    elif block.language == "json":
        load_config("tiny", json.loads(block.code))
    else:
        run(block.code, checkout)


def run(code: str, folder: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
    path = os.pathsep.join([str(folder / ".venv" / "bin"), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**inherited, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_a_block_that_fails_is_seen(checkout: Path) -> None:
    with pytest.raises(AssertionError, match="no transformer at gone"):
        run("ursa plan --model gone && true", checkout)
