"""Files that an earlier release wrote are read, or refused with the reason, for ever (F20).

tests/data/make_golden.py adds a folder when the schema version changes.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from tests import factories
from tests.data.make_golden import TEXT, VISUAL
from ursa import storage
from ursa.artifacts import SCHEMA_VERSION, FailureReason, SourceVideo
from ursa.data.clips import CLIP_SCHEMA, clips_of, read_table
from ursa.data.shards import read_shard
from ursa.data.units import TokenizedUnit
from ursa.errors import SchemaVersionError, ShardFormatError
from ursa.model.transformer import build_transformer
from ursa.sources.committed import load_listing
from ursa.training.checkpoint import latest_checkpoint, restore_state
from ursa.training.optim import build_average, build_optimizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FOLDERS = sorted(GOLDEN.iterdir())
CODES = factories.CODEBOOK_SIZE


def expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text("utf-8"))


def test_there_is_a_folder_of_this_schema():
    assert f"schema-{SCHEMA_VERSION}" in {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_data_of_a_release(folder):
    clips = str(folder / expected(folder)["clips"])
    if folder.name != f"schema-{SCHEMA_VERSION}":
        with pytest.raises(SchemaVersionError, match="go back to it, or begin in an empty root"):
            storage.load_record(str(folder / "unit.json"), TokenizedUnit)
        with pytest.raises(ShardFormatError, match=re.escape("ursa.schema_version is")):
            read_table(clips, CLIP_SCHEMA, None)
        return
    record = storage.load_record(str(folder / "unit.json"), TokenizedUnit)
    shard = record.video.model_copy(update={"uri": str(folder / record.video.uri)})
    table = read_shard(shard, codebook_size=CODES)
    assert table["sample_id"].to_pylist() == expected(folder)["sample_ids"]
    assert table["visual_ids"].to_pylist() == [
        row["visual_ids"] for row in factories.token_rows("video", 4)
    ]
    (clip,) = clips_of(read_table(clips, CLIP_SCHEMA, 1))
    assert (clip.caption, clip.scores.motion_px_per_s) == ("a pond", 5.0)
    assert clip.scores.frame_hashes is None  # the table was written before this column


def test_a_listing_of_a_release_that_had_no_table_of_files():
    listing = load_listing(str(GOLDEN / "schema-3" / "listing.json"))
    assert listing is not None
    assert listing.sources == (
        SourceVideo(uri="s3://b/a.mp4", num_bytes=3, etag="e" * 32),
        SourceVideo(
            uri="s3://b/x.tar#b.mp4",
            num_bytes=4,
            etag="f" * 32,
            offset_bytes=512,
            problem=FailureReason.REFUSED,
            detail="why",
        ),
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_a_release_is_trained_on(folder):
    """Checkpoints have no schema version: names and shapes of tensors are the contract."""
    found = latest_checkpoint(str(folder / "checkpoints"), fingerprint="f" * 64)
    assert found is not None
    _, marker, state = found
    assert (marker.step, marker.num_samples_seen, marker.metrics) == (1, 4, {"train/loss": 1.0})
    stage = factories.tiny_config().stages.video_pretrain
    model = build_transformer(factories.transformer_config(hidden_size=16), seed=1)
    average, optimizer = build_average(model, stage), build_optimizer(model, stage)
    restore_state(state, model, average, optimizer)
    with torch.no_grad():
        hidden = average.module.hidden_states(TEXT, VISUAL)[0, :, :4]
    torch.testing.assert_close(hidden, torch.tensor(expected(folder)["hidden"]))
    model.hidden_states(TEXT, VISUAL).square().mean().backward()
    optimizer.step()
    average.update_parameters(model)
    steps = [float(each["step"]) for each in optimizer.state.values() if each]
    assert set(steps) == {2.0}
    assert len(steps) == len(list(model.parameters())) - 1  # the head has seen no loss
