"""Training on a GPU: the curve of a CPU, checkpoints that either can go on from, samples."""

from pathlib import Path

import pytest
import torch

from tests import factories, media
from ursa import storage
from ursa.config import STAGES
from ursa.data.shards import read_shard
from ursa.errors import ConfigError
from ursa.evaluation import features
from ursa.evaluation.drawn import Draw, draw_clips
from ursa.evaluation.held_out import held_out_metrics
from ursa.tokenization import ClipTokenizer, plan_tokenization
from ursa.training.execution import Execution
from ursa.training.samples import step_folder
from ursa.training.stage import samples_uri, train_stage
from ursa.training.trained import trained_pipeline
from ursa.video.decode import video_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

GPU, CPU = Execution(device="cuda"), Execution()
SETTINGS = {"max_steps": 12, "checkpoint_every": 4, "log_every": 1, "precision": "float32"}


class StopError(Exception):
    """Ends a stage as a crash would, once."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> factories.TinyData:
    return factories.write_tiny_data(str(tmp_path_factory.mktemp("data")))


def train(
    data, folder: Path, execution: Execution, *, stop_at: int = 0, stage=STAGES[1], **changes
):
    """Train a stage; return its loss at every step and the checkpoint, None if it was stopped."""
    request = factories.stage_request(data, stage, str(folder), **(SETTINGS | changes))
    losses: dict[int, float] = {}

    def note(step, metrics) -> None:
        losses[step] = metrics["train/loss"]
        if step == stop_at:
            raise StopError

    try:
        return losses, train_stage(request, execution=execution, on_metrics=note)
    except StopError:
        return losses, None


def assert_near(found: dict[int, float], expected: dict[int, float], relative: float) -> None:
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=relative), step


def test_the_curve_is_that_of_the_cpu(data, tmp_path):
    expected, cpu = train(data, tmp_path / "cpu", CPU)
    found, gpu = train(data, tmp_path / "gpu", GPU)
    assert_near(found, expected, 1e-4)
    assert len(found) == SETTINGS["max_steps"]
    assert gpu.metrics["val/loss"] == pytest.approx(cpu.metrics["val/loss"], rel=1e-4)


@pytest.mark.parametrize("devices", [(GPU, GPU), (GPU, CPU), (CPU, GPU)])
def test_a_stage_goes_on_from_a_checkpoint_of_either(data, tmp_path, devices):
    expected, _ = train(data, tmp_path / "whole", devices[0])
    _, stopped = train(data, tmp_path / "parts", devices[0], stop_at=6)
    assert stopped is None
    rest, _ = train(data, tmp_path / "parts", devices[1])
    assert min(rest) == 5
    assert_near(rest, expected, 1e-4)


def test_half_precision_stays_near(data, tmp_path):
    expected, _ = train(data, tmp_path / "cpu", CPU)
    found, gpu = train(data, tmp_path / "gpu", GPU, precision="bfloat16")
    assert_near(found, expected, 0.02)
    assert gpu.metrics["val/loss"] < found[1]


def test_samples_are_drawn_there(data, tmp_path):
    changes = SETTINGS | {"sample_every": 6}
    request = factories.stage_request(data, STAGES[1], str(tmp_path), **changes)
    train_stage(request, execution=GPU)
    for step in (6, 12):
        folder = step_folder(samples_uri(request), step)
        names = [item.uri.rsplit("/", 1)[1] for item in storage.list_files(folder)]
        assert {"samples.png", "0.mp4"} <= set(names)


def test_an_evaluation_is_that_of_the_cpu(data, tmp_path):
    """Losses are of the same noisy tokens; draws differ where two codes are about as likely."""
    request = factories.stage_request(data, STAGES[1], str(tmp_path), **SETTINGS)
    pipeline = trained_pipeline(request, train_stage(request))
    found = [
        held_out_metrics(pipeline.to(device), data.datasets, request.config)[0]
        for device in ("cpu", "cuda")
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        tolerance = 0.01 if "accuracy" in name else 1e-4
        assert value == pytest.approx(found[0][name], abs=tolerance), name
    draws = [Draw(caption, seed) for seed, caption in enumerate(factories.CAPTIONS)]
    drawn = [draw_clips(pipeline.to(device), draws, request.config) for device in ("cpu", "cuda")]
    assert (drawn[0].codes == drawn[1].codes).float().mean() > 0.9
    assert features.latents(pipeline.visual_tokenizer, list(drawn[1].frames)).shape[0] == len(draws)


def test_tokens_are_those_of_the_cpu(tmp_path):
    """A clip goes through children that decode; a latent at the edge of a code may round over."""
    frames = media.panning(36, step=2, height=48, width=64, seed=0)
    path = media.save_video(tmp_path / "clip.mp4", frames, 12.0)
    clip = factories.clip_of(path, caption="a pan", info=video_info(path))
    reference = factories.write_visual_tokenizer(str(tmp_path))
    config = factories.tiny_config()
    selection = factories.commit_selection(str(tmp_path / "selection"), [clip], num_validation=0)
    found = []
    for device in ("cpu", "cuda"):
        plan = plan_tokenization(selection, reference, config, output_uri=str(tmp_path / device))
        tokenizer = ClipTokenizer(reference, config, device=device)
        units = [tokenizer(unit) for unit in plan.todo]
        tokenizer.close()
        found.append(
            [
                ids
                for unit in units
                if unit.video
                for ids in read_shard(unit.video, codebook_size=factories.CODEBOOK_SIZE)[
                    "visual_ids"
                ].to_pylist()
            ]
        )
    assert len(found[0]) == len(found[1]) > 0
    assert (torch.tensor(found[0]) == torch.tensor(found[1])).float().mean() > 0.999


def test_adapters_are_trained_and_merged_there(data, tmp_path):
    pytest.importorskip("peft")
    _, parent = train(data, tmp_path / "parent", GPU)
    request = factories.stage_request(
        data, STAGES[2], str(tmp_path / "lora"), init_from=parent, lora={}, **SETTINGS
    )
    found = train_stage(request, execution=GPU)
    assert found.merged_uri is not None
    assert found.metrics["val/loss"] < parent.metrics["val/loss"] + 0.5


def test_a_gpu_that_is_not_there_is_named(monkeypatch, data, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="URSA_GPUS_PER_TRAIN_WORKER"):
        train(data, tmp_path, GPU)
