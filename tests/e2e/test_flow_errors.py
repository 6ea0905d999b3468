"""What can go wrong around a run: one clear line, nothing registered; then it can be repeated."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import running_services
from tests.running_services import (
    ROOT,
    SCRIPT,
    TINY,
    Running,
    changed,
    free_port,
    run_arguments,
    versions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("tree_hand.mp4", "city_night.mp4"):
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def failure(returncode: int, output: str) -> str:
    """Return the one line of a failed run; there must be exactly one."""
    assert returncode == 1, output
    lines = [line for line in output.splitlines() if line.startswith("FAILED: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize("what", ["source", "data"])
def test_unreachable_s3_is_named(services: Running, source: Path, what: str) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    name = f"no-s3-{what}"
    overrides = changed({"release": {"model_name": name}}, TINY)
    variables = {"URSA_DATA_URI": "s3://bucket/data"} if what == "data" else {}
    began = time.monotonic()
    done = services.script(
        *run_arguments("s3://bucket/videos" if what == "source" else source, overrides),
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_ENDPOINT_URL=address,
        **variables,
    )
    line = failure(done.returncode, done.stdout)
    assert "s3://bucket/" in line
    assert "AWS_ENDPOINT_URL" in line
    assert time.monotonic() - began < 120
    assert not versions(services, name)


def test_disk_without_room_is_named(services: Running, source: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(100 << 20))
    overrides = changed({"release": {"model_name": "no-room"}}, TINY)
    done = services.script(*run_arguments(source, overrides), URSA_DATA_URI=str(small_disk / "d"))
    line = failure(done.returncode, done.stdout)
    assert "disk full" in line
    assert str(small_disk) in line
    assert not versions(services, "no-room")


def fill(folder: Path) -> None:
    """Write until nothing fits any more."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


@pytest.mark.parametrize(
    ("step", "begun", "launcher"),
    [
        ("ingestion", "clips/units/*/*.json", "ray"),
        ("tokenization", "tokens/units/*.json", "local"),
        ("training", "checkpoints/image_pretrain/*/*/COMMITTED.json", "local"),
        ("training", "checkpoints/image_pretrain/*/*/COMMITTED.json", "ray"),
        ("evaluation", "models/*/manifest.json", "local"),
    ],
    ids=[
        "ingestion-ray",
        "tokenization-local",
        "training-local",
        "training-ray",
        "evaluation-local",
    ],
)
def test_disk_that_fills_up_is_named_and_the_run_goes_on(
    services: Running,
    source: Path,
    small_disk: Path,
    tmp_path: Path,
    step: str,
    begun: str,
    launcher: str,
) -> None:
    name, data = f"full-disk-{step}-{launcher}", small_disk / "data"
    stage = {"max_steps": 60, "global_batch_size": 8}
    overrides = changed(
        {
            "tokenization": {"clips_per_shard": 1},
            "stages": {"image_pretrain": stage},
            "release": {"model_name": name},
        },
        TINY,
    )
    arguments = run_arguments(source, overrides)
    variables = {"URSA_DATA_URI": str(data), "URSA_LAUNCHER": launcher}
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        command = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            env={**services.environment, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while not list(data.glob(begun)):
        assert command.poll() is None, log.read_text()
        time.sleep(0.005)
    fill(small_disk)
    returncode = command.wait(300)
    line = failure(returncode, log.read_text())
    assert "disk full" in line
    assert str(small_disk) in line
    assert not versions(services, name)
    (small_disk / "filler").unlink()
    done = services.script(*arguments, **variables)
    assert done.returncode == 0, done.stdout
    assert len(versions(services, name)) == 1
