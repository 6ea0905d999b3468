"""A whole run without orchestration, killed just before and after the commit of every part (F2).

The run that goes on must leave, to the byte, what an undisturbed one leaves. Kills in the middle of
parts, through Prefect and on Ray: tests/e2e/test_kills.py. Registration: test_release.py.
"""

import json
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests import running_services
from tests.faults.processes import Child
from ursa import ingestion, release, storage
from ursa.config import STAGES, RunConfig, load_config
from ursa.sources.listing import discover_videos

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

VIDEOS = running_services.ROOT / "tests" / "data" / "videos"
PARTS = {
    "clips": r"/clips/sets/[^/]+/manifest\.json$",
    "selection": r"/selections/[^/]+/manifest\.json$",
    "visual tokenizer": r"/tokenizers/visual/[^/]+/manifest\.json$",
    "tokens": r"/tokens/[^/]+/manifest\.json$",
    **{stage: rf"/checkpoints/{stage}/[^/]+/manifest\.json$" for stage in STAGES},
    "model": r"/models/[^/]+/manifest\.json$",
    "evaluation": r"/evaluations/[^/]+/manifest\.json$",
}
"""Nine, each with the record that commits it."""
CLOCKED = ("_s", "_bytes")
"""Ends of the names of metrics that differ from run to run."""
STAGE = {"max_steps": 6, "global_batch_size": 4, "checkpoint_every": 2, "validate_every": 6}


def config() -> RunConfig:
    return load_config(
        "tiny",
        running_services.changed(
            {
                "visual_tokenizer": {"max_steps": 10, "checkpoint_every": 5},
                "stages": dict.fromkeys(STAGES, STAGE),
                "evaluation": {"sampling": {"num_inference_steps": 3, "num_prompts": 1}},
            }
        ),
    )


def run_all(source: str, root: str) -> None:
    """Do what the flow does, a part after the other; what is committed is not done again."""
    import torch

    from ursa.evaluation import evaluate
    from ursa.tokenization import (
        ClipTokenizer,
        commit_tokens,
        plan_tokenization,
    )
    from ursa.training import stage
    from ursa.training.text_tokenizer import fit_text_tokenizer
    from ursa.training.visual_tokenizer import fit_visual_tokenizer

    torch.set_num_threads(1)
    settings = config()
    files = discover_videos(source)
    plan = ingestion.plan_ingestion(source, files, root, settings.ingestion)
    new = [ingestion.ingest_video(each, root, settings.ingestion) for each in plan.todo]
    clips = plan.committed or ingestion.commit_clips(
        source, (*plan.done, *new), root, plan, settings.ingestion
    )
    selection = ingestion.select_clips(clips, settings.selection, output_uri=root)
    visual = fit_visual_tokenizer(selection, settings, output_uri=root)
    text = fit_text_tokenizer(selection, settings, output_uri=root)
    units = plan_tokenization(selection, visual, settings, output_uri=root)
    datasets = units.committed
    if datasets is None:
        work = ClipTokenizer(visual, settings)
        found = (*units.done, *(work(unit) for unit in units.todo))
        datasets = commit_tokens(units, found, visual, settings, output_uri=root)
        work.close()
    checkpoint = None
    for name in STAGES:
        request = stage.StageRequest(
            stage=name,
            config=settings,
            datasets=datasets,
            visual_tokenizer=visual,
            text_tokenizer=text,
            init_from=checkpoint,
            output_uri=root,
        )
        checkpoint = stage.train_stage(request)
    model = release.export_model(request, checkpoint, output_uri=root)
    evaluate(model, datasets, selection, settings, output_uri=root, champion=None)


def die_at(part: str, when: str) -> None:
    """Kill this process just before or just after a part is committed."""
    commit = storage.commit_record

    def dying(uri, record):
        is_it = re.search(PARTS[part], uri) is not None
        if is_it and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = commit(uri, record)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    storage.commit_record = dying


def tree(root: Path) -> dict[str, bytes]:
    """All files, but for the random part in names of checkpoints and what a clock has measured.

    Checkpoints of the tokenizer's fit are left out: a kill between the commit of the tokenizer and
    their removal leaves them, and nothing reads them again.
    """
    return {
        without_nonces(str(path.relative_to(root)).encode()).decode(): plain(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.parent.parent.name != "fit"
    }


def without_nonces(data: bytes) -> bytes:
    """Take the random part out of names of folders."""
    return re.sub(rb'(step-\d{8}\.|/[0-9a-f]{32}/)[0-9a-f]{8}(?=[/"])', rb"\1", data)


def plain(path: Path) -> bytes:
    data = without_nonces(path.read_bytes())
    if path.suffix != ".json":
        return data
    content = json.loads(data)
    if "record" in content:
        # a record's hash of itself counts the random part too
        content.pop("sha256", None)
        metrics = content["record"].get("metrics", {})
        for name in [name for name in metrics if name.endswith(CLOCKED)]:
            del metrics[name]
    return json.dumps(content).encode()


def commits(root: Path) -> Counter[str]:
    """How many records there are of each part."""
    names = [str(path) for path in root.rglob("manifest.json")]
    return Counter(part for part, pattern in PARTS.items() for n in names if re.search(pattern, n))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[str, Path, dict[str, bytes]]:
    """Source, the root that all runs share in turn, and what an undisturbed run leaves there."""
    folder = tmp_path_factory.mktemp("boundaries")
    source, root = folder / "videos", folder / "data"
    source.mkdir()
    for name in ("tree_hand.mp4", "city_night.mp4"):
        shutil.copy(VIDEOS / name, source)
    killed_by, status = Child(lambda: run_all(str(source), str(root))).wait()
    assert (killed_by, status) == (0, None)
    clean = tree(root)
    assert set(commits(root).values()) == {1}
    assert len(commits(root)) == len(PARTS) == 9
    return str(source), root, clean


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", PARTS)
def test_killed_at_a_boundary(place, part, when):
    source, root, clean = place
    shutil.rmtree(root, ignore_errors=True)

    def dying() -> None:
        die_at(part, when)
        run_all(source, str(root))

    killed_by, _ = Child(dying).wait()
    assert killed_by == signal.SIGKILL
    left = commits(root)
    assert left[part] == (when == "after")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert Child(lambda: run_all(source, str(root))).wait() == (0, None)
    found = tree(root)
    assert sorted(found.keys() ^ clean.keys()) == []
    assert [name for name, data in clean.items() if found[name] != data] == []
    kept = {path: time for path, time in before.items() if path.name == "manifest.json"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
