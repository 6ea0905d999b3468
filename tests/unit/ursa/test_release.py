import pytest
import torch

from tests import factories
from ursa import storage
from ursa.generation import UrsaPipeline
from ursa.release import export_model
from ursa.training.checkpoint import load_checkpoint
from ursa.training.stage import train_stage


def test_export_holds_the_averaged_weights_and_hashes(tiny_data, tmp_path):
    uri = str(tmp_path)
    request = factories.stage_request(tiny_data, "async_finetune", uri, max_steps=2)
    checkpoint = train_stage(request)
    model = export_model(request, checkpoint, output_uri=uri)
    pipeline = UrsaPipeline.from_pretrained(model.directory_uri)
    _, state = load_checkpoint(checkpoint.uri)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, state[f"ema.{name}"])
    folder = storage.local_path(model.directory_uri)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {name: storage.sha256_file(path) for name, path in files.items()} == model.sha256
    assert {path.suffix for path in files.values()} == {".json", ".safetensors"}
    assert pipeline.defaults.motion_score == 6.0  # the median of the measured motion
    assert (pipeline.scheduler.alpha, pipeline.scheduler.c) == (1.0, 5.0)
    assert model.checkpoint == checkpoint
    assert model.started_from_uri is None
    assert export_model(request, checkpoint, output_uri=uri) == model


@pytest.mark.parametrize("stage", ["video_pretrain", "async_finetune"])
def test_an_export_says_what_the_first_of_its_stages_began_with(
    exported_model, tiny_data, tmp_path, stage
):
    start = exported_model.directory_uri
    first = factories.stage_request(
        tiny_data,
        "video_pretrain",
        str(tmp_path),
        init_from_uri=start,
        config={"stages": {"async_finetune": {"max_steps": 1}}},
        max_steps=1,
    )
    checkpoint = train_stage(first)
    request = first
    if stage == "async_finetune":
        request = first.model_copy(update={"stage": stage, "init_from": checkpoint})
        checkpoint = train_stage(request)
    model = export_model(request, checkpoint, output_uri=str(tmp_path))
    assert model.started_from_uri == start
