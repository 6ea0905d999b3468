"""A directory full of hostile files among two good clips: the run completes and names them all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from tests import media, running_services
from tests.running_services import ROOT, TINY, Running, changed, run_arguments, versions
from ursa.storage import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GOOD = ("tree_hand.mp4", "city_night.mp4")
NAME = "bad-directory"


def write_bad_files(folder: Path, secret: Path) -> dict[str, str]:
    """Fill a folder with files that must be refused; return the reason by printable name."""
    good = (folder / GOOD[0]).read_bytes()
    moov = good.index(b"moov")
    contents = {
        "empty.mp4": (b"", "empty_file"),
        "truncated.mp4": (good[: moov if moov > 200 else 40_000], "unreadable"),
        "text.mp4": (b"this is no video\n" * 50, "not_a_video"),
        "page.mp4": (b"<!DOCTYPE html><html><body>404</body></html>", "not_a_video"),
        "hls.mp4": (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
            "not_a_video",
        ),
        "concat.mp4": (f"ffconcat version 1.0\nfile '{secret}'\n".encode(), "not_a_video"),
        "new\nline.mp4": (b"\0" * 5000, "not_a_video"),
        " leading and trailing .mp4": (b"GIF89a", "unreadable"),
        "semi;colon|pipe$(touch pwned)`id`.mp4": (b"\xff\xd8\xff\xe0" + bytes(100), "not_a_video"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    with open(os.fsencode(folder) + b"/latin1_\xe9.mp4", "wb") as file:  # noqa: PTH123
        file.write(b"%PDF-1.7 no video either")
    media.save_sound(folder / "sound.mp4")
    media.save_video(folder / "one_frame.mp4", media.panning(1, step=1))
    media.save_video(folder / "tiny.mp4", np.zeros((48, 16, 16, 3), np.uint8))
    os.mkfifo(folder / "pipe.mp4")
    (folder / "directory.mp4").mkdir()
    (folder / "directory.mp4" / "inside.mp4").write_bytes(b"<?xml version='1.0'?><MPD/>")
    return {name: reason for name, (_, reason) in contents.items()} | {
        "latin1_%E9.mp4": "not_a_video",
        "sound.mp4": "no_video_stream",
        "one_frame.mp4": "too_short",
        "tiny.mp4": "resolution_too_low",
        "pipe.mp4": "not_regular_file",
        "directory.mp4/inside.mp4": "not_a_video",
    }


@pytest.fixture(scope="module")
def services() -> Running:
    return running_services.start()


def test_run_completes_and_names_every_bad_file(services: Running, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for name in GOOD:
        shutil.copy(ROOT / "tests" / "data" / "videos" / name, source)
    secret = shutil.copy(source / GOOD[1], tmp_path / "secret.mp4")
    expected = write_bad_files(source, Path(secret))
    data = tmp_path / "data"
    overrides: dict[str, Any] = changed({"release": {"model_name": NAME}}, TINY)
    done = services.script(*run_arguments(source, overrides), URSA_DATA_URI=str(data))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert len(versions(services, NAME)) == 1
    assert not list(tmp_path.rglob("pwned"))

    funnel = json.loads(services.artifacts()["data-funnel"]["data"])
    named = {row["file"]: row for row in funnel if row["file"]}
    prefix = f"{source.as_uri()}/"
    wanted = {
        (source / name).as_uri() if "%" not in name else prefix + name: f"quarantined: {reason}"
        for name, reason in expected.items()
    }
    assert {uri: row["step"] for uri, row in named.items()} == wanted
    assert all(row["detail"] for row in named.values())
    (failures,) = data.glob("clips/sets/*/failures*.parquet")
    rows = pyarrow.parquet.read_table(failures).to_pylist()
    assert {row["source_uri"] for row in rows} == set(wanted)
    assert {f"quarantined: {row['reason']}" for row in rows} == set(wanted.values())

    sources = {
        sha256
        for shard in data.glob("tokens/shards/video-*")
        for sha256 in pyarrow.parquet.read_table(shard)["source_sha256"].to_pylist()
    }
    assert sources == {sha256_file(source / name) for name in GOOD}
