import math

import numpy as np
import pytest
from PIL import Image

from tests import factories, media
from ursa import storage
from ursa.artifacts import SelectedClip
from ursa.data.clips import clip_windows
from ursa.evaluation import (
    Sample,
    draw_samples,
    evaluate,
    sample_metrics,
    stage_metrics,
    tokenizer_metrics,
    unigram_metrics,
)
from ursa.generation import UrsaPipeline
from ursa.video.decode import read_frames_at, video_info

CONFIG = factories.tiny_config()
TIMES = CONFIG.evaluation.timesteps


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for index in range(2):
        frames = media.panning(30, step=2, height=48, width=64, seed=index)
        path = media.save_video(folder / f"{index}.mp4", frames, 12.0)
        info = video_info(path)
        clips.append(
            factories.clip_of(path, caption=factories.CAPTIONS[index], info=info, index=index)
        )
    return factories.commit_selection(str(folder / "s"), clips, num_validation=1)


def test_report_measures_everything_and_shows_samples(
    exported_model, token_datasets, selection, tmp_path
):
    calls = []
    arguments = (exported_model, token_datasets, selection, CONFIG)
    options = {"output_uri": str(tmp_path), "champion": None}
    report = evaluate(*arguments, **options, on_metrics=lambda s, m: calls.append((s, m)))
    metrics = report.metrics
    assert calls == [(exported_model.checkpoint.step, metrics)]
    for t in TIMES:
        assert metrics[f"eval/untrained_loss_t{t:g}"] == pytest.approx(math.log(60), abs=0.2)
        assert 0 <= metrics[f"eval/accuracy_t{t:g}"] <= 1
    assert metrics["eval/loss"] < metrics["eval/untrained_loss"]
    assert metrics["eval/chance_accuracy"] == 1 / 60
    assert {"eval/tokenizer_psnr_train", "eval/tokenizer_psnr_validation"} <= metrics.keys()
    settings = [grid.setting for grid in report.grids]
    assert settings == ["synchronous", "per_frame", "image_to_video"]
    assert metrics["eval/i2v_accuracy"] == report.grids[2].mean_accuracy
    assert {"eval/loss_frame1", "eval/async_loss", "eval/i2v_loss_gain"} <= metrics.keys()
    assert 0 <= metrics["eval/copy_accuracy"] <= 1
    assert not [name for name in metrics if "before" in name]
    folder = storage.local_path(report.samples_uri)
    assert set(report.samples) == {
        *(f"{mode}-0.{kind}" for mode in ("t2v", "i2v") for kind in ("mp4", "gif")),
        "prompts.tsv",
        "strip.png",
    }
    assert video_info(folder / "t2v-0.mp4").num_frames == 5
    assert (folder / "prompts.tsv").read_text("utf-8").startswith(f"t2v-0\t{factories.CAPTIONS[0]}")
    with Image.open(folder / "strip.png") as picture:
        assert picture.size == (2 * (7 * 24 + 8), 2 * 2 * (16 + 4))
    assert evaluate(*arguments, **options) == report
    assert report.gate_passed == (not report.failed_gates)


def test_what_the_last_stage_changed(exported_model):
    known = {"val/i2v_accuracy": 0.5, "val/before_i2v_accuracy": 0.25, "val/loss": 1.0}
    known |= {"val/i2v_accuracy_change": 0.25, "val/i2v_accuracy_change_se": 0.1}
    checkpoint = exported_model.checkpoint.model_copy(update={"metrics": known})
    assert stage_metrics(checkpoint) == {
        "eval/before_i2v_accuracy": 0.25,
        "eval/after_i2v_accuracy": 0.5,
        "eval/i2v_accuracy_change": 0.25,
        "eval/i2v_accuracy_change_se": 0.1,
    }


def test_unigram_of_known_counts(tmp_path):
    train = factories.write_dataset(str(tmp_path / "a"), "image", "train", 8)
    from ursa.data.dataset import TokenSamples, code_counts

    samples = TokenSamples(train)
    metrics = unigram_metrics(code_counts(train), samples)
    ids = samples.batch(range(8)).visual_ids.flatten().tolist()
    counts = [ids.count(code) + 1 for code in range(60)]
    expected = -np.mean([math.log(counts[code] / sum(counts)) for code in ids])
    assert metrics["eval/unigram_loss"] == pytest.approx(expected)
    assert metrics["eval/unigram_accuracy"] == pytest.approx((max(counts) - 1) / len(ids))


def test_flicker_and_dynamics_of_known_videos():
    frozen = media.still(5, height=16, width=24)
    blinking = np.zeros((5, 16, 24, 3), np.uint8)
    blinking[1::2] = 255
    rising = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.full((16, 24, 3), 10, np.uint8)
    noise = frozen
    metrics = sample_metrics([Sample("a", "p", noise, blinking, frozen)])
    assert metrics["eval/real_temporal_flicker"] == 1.0
    assert metrics["eval/real_dynamic_degree"] == 0.0
    assert metrics["eval/generated_temporal_flicker"] == 0.0
    metrics = sample_metrics([Sample("a", "p", noise, rising, frozen)])
    assert metrics["eval/generated_temporal_flicker"] == pytest.approx(1 - 10 / 255)
    assert metrics["eval/generated_dynamic_degree"] == 1.0
    assert sample_metrics([]) == {}


def test_clips_of_one_frame_have_no_flicker():
    frame = media.still(1, height=16, width=24)
    assert sample_metrics([Sample("a", "p", frame, frame, frame)]) == {
        "eval/generated_dynamic_degree": 0.0,
        "eval/real_dynamic_degree": 0.0,
    }


def test_at_most_32_windows_of_a_split_are_reconstructed(exported_model, tmp_path):
    frames = media.panning(60, step=1, height=48, width=64)
    path = media.save_video(tmp_path / "long.mp4", frames, 12.0)
    clip = factories.clip_of(path, caption="a", info=video_info(path))
    config = factories.tiny_config({"tokenization": {"window_stride_s": 0.09}})
    windows = [indices for _, indices in clip_windows(clip, config.tokenization)]
    assert 32 < len(windows) < 64
    asked = []

    def read(path, indices, sizes):
        asked.append(indices)
        return read_frames_at(path, indices, sizes)

    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    selected = [SelectedClip(clip=clip, kept=True, reason=None, split="train")]
    found = tokenizer_metrics(pipeline, selected, config, read)
    assert list(found) == ["eval/tokenizer_psnr_train"]
    places = [windows.index(indices) for indices in asked]
    assert len(places) == 32
    assert set(np.diff(places)) == {1, 2}
    assert places[-1] >= len(windows) - 2


def test_clips_that_cannot_be_read_are_left_out(exported_model, tmp_path):
    """A failure that tokenization allowed does not end the run here."""
    config = factories.tiny_config()
    frames = media.panning(60, step=1, height=48, width=64)
    good = media.save_video(tmp_path / "good.mp4", frames, 12.0)
    info = video_info(good)
    lost = media.save_video(tmp_path / "lost.mp4", frames, 12.0)
    clips = [
        factories.clip_of(path, caption="a", info=info, index=index)
        for index, path in enumerate((good, lost))
    ]
    lost.unlink()
    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    both, alone = (
        [SelectedClip(clip=clip, kept=True, reason=None, split="train") for clip in part]
        for part in (clips, clips[1:])
    )
    assert list(tokenizer_metrics(pipeline, both, config)) == ["eval/tokenizer_psnr_train"]
    assert {sample.prompt for sample in draw_samples(pipeline, both, config)} == {"a"}
    assert tokenizer_metrics(pipeline, alone, config) == {}
    assert draw_samples(pipeline, alone, config) == []
