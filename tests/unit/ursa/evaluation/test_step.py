import math

import pytest
from PIL import Image

from tests import factories, media
from ursa import storage
from ursa.evaluation import evaluate
from ursa.evaluation.measures import measurement_metrics
from ursa.video.decode import video_info

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
    assert {"eval/tokenizer_psnr_train", "eval/tokenizer_ssim_validation"} <= metrics.keys()
    assert measurement_metrics(report.measurements).items() <= metrics.items()
    assert {"eval/motion_adherence", "eval/i2v_later_psnr", "eval/t2v_motion"} <= metrics.keys()
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
