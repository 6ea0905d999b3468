"""Directories of files whose outcome is known: each file is found once, with the outcome it has.

`labels.jsonl` of such a directory has a row for every file below it: `path`, in a `file://` URI's
spelling where a name is not UTF-8, and `result`: `ok`, a `FailureReason`, `left_out` for what is
not even listed, or several with `|` between. `URSA_ASSETS` names another directory to check too.
"""

import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ursa.config import load_config
from ursa.data.clips import read_clips
from ursa.ingestion import commit_clips, ingest_video, plan_ingestion
from ursa.sources.listing import discover_videos
from ursa.storage import local_path

FOLDERS = [Path(__file__).parents[1] / "data" / "foreign"]
if "URSA_ASSETS" in os.environ:
    FOLDERS.append(Path(os.environ["URSA_ASSETS"]).absolute())


def files_below(folder: Path) -> set[Path]:
    """All files, links and pipes; links are not followed."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder) for path in paths}


def labels_of(folder: Path) -> dict[Path, set[str]]:
    rows = [json.loads(line) for line in (folder / "labels.jsonl").open(encoding="utf-8")]
    labels = {Path(row["path"]): set(row["result"].split("|")) for row in rows}
    assert len(labels) == len(rows), "a file has two labels"
    return {
        path
        if os.path.lexists(folder / path)
        else local_path(f"{folder.as_uri()}/{path}").relative_to(folder): label
        for path, label in labels.items()
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_appears_once_with_its_result(folder, tmp_path):
    labels = labels_of(folder)
    assert set(labels) == files_below(folder), "a file without label, or a label without file"
    changes = {"max_failed_fraction": 1, "min_clip_s": 0.9}
    config = load_config("tiny").ingestion.model_copy(update=changes)
    output = str(tmp_path / "data")
    sources = discover_videos(str(folder))
    plan = plan_ingestion(str(folder), sources, output, config)
    with ThreadPoolExecutor(2) as pool:
        videos = [*plan.done, *pool.map(lambda one: ingest_video(one, output, config), plan.todo)]
    clips = commit_clips(str(folder), videos, output, plan, config)

    results = {
        local_path(video.source.uri).relative_to(folder): str(video.failure or "ok")
        for video in videos
    }
    assert len(results) == len(videos) == clips.num_videos
    listed = {path for path, label in labels.items() if label != {"left_out"}}
    assert set(results) == listed
    wrong = {
        str(path): f"{result}, expected {' or '.join(sorted(labels[path]))}"
        for path, result in results.items()
        if result not in labels[path]
    }
    counts = Counter(results.values())
    sys.stdout.write(f"{folder.name}: {len(results)} files, {dict(counts)}, wrong: {wrong}\n")
    assert wrong == {}
    assert clips.failures == {reason: n for reason, n in counts.items() if reason != "ok"}
    good = {path for path, result in results.items() if result == "ok"}
    assert {local_path(clip.source_uri).relative_to(folder) for clip in read_clips(clips)} == good
