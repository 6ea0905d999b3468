"""Write what `tests/integration/test_upgrade.py` reads: a small root as this release writes it.

    PYTHONPATH=. python tests/data/make_golden.py

Run it when `SCHEMA_VERSION` has changed, into a new folder; older folders stay, so that what was
written once is read, or refused with the reason, for ever.
"""

import json
import shutil
from pathlib import Path

import torch

from tests import factories
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, VideoInfo
from ursa.data.clips import CLIP_SCHEMA, clip_row, put_table
from ursa.data.shards import write_shard
from ursa.data.units import TokenizedUnit
from ursa.model.transformer import build_transformer
from ursa.training.checkpoint import save_checkpoint, training_state
from ursa.training.optim import build_average, build_optimizer

FOLDER = Path(__file__).parent / "golden" / f"schema-{SCHEMA_VERSION}"
TEXT = torch.tensor([[1, 2, 3]])
VISUAL = torch.arange(12).view(1, 2, 2, 3)


def main() -> None:
    """Write the folder anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    (FOLDER / "expected.json").write_text("{}\n", "utf-8")
    rows = factories.token_rows("video", 4)
    shard = write_shard(rows, str(FOLDER / "video"), codebook_size=factories.CODEBOOK_SIZE)
    info = VideoInfo(
        width_px=320, height_px=180, fps=24.0, num_frames=24, duration_s=1.0, codec="h264"
    )
    clip = factories.clip_of(FOLDER / "expected.json", caption="a pond", info=info)
    named = {"source_uri": "file:///videos/pond.mp4", "media_uri": "file:///clips/pond.mp4"}
    rows_of_clips = [clip_row(clip.model_copy(update=named))]
    clips = put_table(str(FOLDER), "clips", CLIP_SCHEMA, rows_of_clips)
    record = TokenizedUnit(
        key="k" * 64,
        split="train",
        image=None,
        video=shard.model_copy(update={"uri": Path(shard.uri).name}),
        num_clips=2,
        num_too_short=0,
        failed=(),
    )
    storage.commit_record(str(FOLDER / "unit.json"), record)
    stage = factories.tiny_config().stages.video_pretrain
    model = build_transformer(factories.transformer_config(hidden_size=16), seed=0)
    average, optimizer = build_average(model, stage), build_optimizer(model, stage)
    model.hidden_states(TEXT, VISUAL).square().mean().backward()
    optimizer.step()
    average.update_parameters(model)
    with torch.no_grad():
        hidden = average.module.hidden_states(TEXT, VISUAL)[0, :, :4]
    save_checkpoint(
        training_state(model, average, optimizer),
        str(FOLDER / "checkpoints"),
        step=1,
        num_samples_seen=4,
        fingerprint="f" * 64,
        keep=None,
        metrics={"train/loss": 1.0},
    )
    expected = {
        "clips": Path(clips).name,
        "hidden": hidden.tolist(),
        "sample_ids": [row["sample_id"] for row in rows],
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
