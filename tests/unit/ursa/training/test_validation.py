import io

import numpy as np
import pytest
import torch
from PIL import Image

from ursa.artifacts import CheckpointRef, LossGrid
from ursa.data.addresses import address_seed
from ursa.data.dataset import TokenSamples
from ursa.diffusion.loss import posterior_loss
from ursa.training import stage as stage_module
from ursa.training.distributed import Group
from ursa.training.stage import train_stage
from ursa.training.validation import (
    change_metrics,
    copy_accuracy,
    gain_metrics,
    grid_metrics,
    measure_grid,
    picture,
    settings_of,
)

TIMES = (0.0, 0.3, 0.6, 0.9)


@pytest.fixture
def measured(make_request):
    """Return a function that measures a fresh network, and what it was shown on the way."""
    request = make_request()
    trainer = stage_module._build_trainer(request, Group(0, 1))
    samples = TokenSamples(request.datasets.video_validation)
    forward, shown = trainer.model.hidden_states, []

    def note(text_ids, x_t):
        shown.append(x_t.clone())
        return forward(text_ids, x_t)

    trainer.model.hidden_states = note

    def measure(setting="synchronous", *, timesteps=TIMES, batch_size=6, precision=torch.float32):
        shown.clear()
        grid = measure_grid(
            trainer.model,
            trainer.path,
            trainer.text_tokenizer,
            samples,
            timesteps=timesteps,
            batch_size=batch_size,
            max_prompt_length=trainer.max_prompt_length,
            seed=7,
            setting=setting,
            precision=precision,
        )
        return grid, list(shown)

    measure.trainer, measure.samples = trainer, samples
    yield measure
    trainer.close()


def test_half_precision_sees_the_same_tokens_and_stays_near(measured):
    grid, shown = measured()
    half, shown_half = measured(precision=torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(shown, shown_half, strict=True))
    assert half.loss_by_time == pytest.approx(grid.loss_by_time, rel=0.01)
    assert half.loss_by_time != grid.loss_by_time


def test_a_cell_is_the_mean_over_the_tokens_of_its_frame(measured):
    grid, shown = measured()
    trainer, batch = measured.trainer, measured.samples.batch(range(6))
    text = trainer.text_tokenizer.encode(batch.captions, max_length=trainer.max_prompt_length)
    for row, x_t in enumerate(shown):
        with torch.no_grad():
            logits = trainer.model.lm_head(trainer.model.hidden_states(text, x_t))
        expected = posterior_loss(logits, batch.visual_ids.flatten(1))
        by_frame = expected.token_loss.view(6, 2, 6)
        right = (logits.argmax(-1) == batch.visual_ids.flatten(1)).view(6, 2, 6)
        assert grid.loss[row] == pytest.approx(by_frame.mean((0, 2)).tolist(), rel=1e-5)
        assert grid.accuracy[row] == pytest.approx(right.float().mean((0, 2)).tolist())
        assert grid.loss_by_time[row] == pytest.approx(float(expected.loss), rel=1e-6)
        assert grid.accuracy_by_time[row] == pytest.approx(float(expected.accuracy))


def test_the_noise_is_addressed_by_time_and_name(measured):
    _, (x_t,) = measured(timesteps=[0.3])
    batch = measured.samples.batch(range(6))
    for place, name in enumerate(batch.sample_ids):
        generator = torch.Generator().manual_seed(address_seed(7, "validation", "0.3", name))
        uniform = torch.rand(2, 2, 3, dtype=torch.float64, generator=generator)
        clean = batch.visual_ids[place]
        assert torch.equal(x_t[place], measured.trainer.path.sample(clean, 0.3, uniform=uniform))


@pytest.mark.parametrize("setting", ["synchronous", "per_frame", "image_to_video"])
def test_the_division_into_batches_changes_nothing(measured, setting):
    whole, parts = measured(setting)[0], measured(setting, batch_size=4)[0]
    for name in ("loss", "accuracy", "loss_by_time", "accuracy_by_time"):
        one, other = np.array(getattr(parts, name)), np.array(getattr(whole, name))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_image_to_video_gives_the_first_frame_and_measures_the_others(measured):
    _, alone = measured()
    grid, shown = measured("image_to_video")
    clean = measured.samples.batch(range(6)).visual_ids
    for given, before in zip(shown, alone, strict=True):
        assert torch.equal(given[:, 0], clean[:, 0])
        assert torch.equal(given[:, 1:], before[:, 1:])
    assert not torch.equal(alone[0][:, 0], clean[:, 0])
    assert grid.first_frame == 1
    assert np.shape(grid.loss) == (len(TIMES), 1)
    assert [row[0] for row in grid.loss] == pytest.approx(grid.loss_by_time)


def test_per_frame_times_show_the_same_noisy_frames_in_other_company(measured):
    _, alone = measured()
    grid, shown = measured("per_frame")
    offsets = set()
    for sample in range(6):
        for frame in range(2):
            # which of the times the frame is at, row by row
            places = [
                [torch.equal(x_t[sample, frame], old[sample, frame]) for old in alone].index(True)
                for x_t in shown
            ]
            assert places == [(places[0] + row) % len(TIMES) for row in range(len(TIMES))]
            offsets.add(places[0])
    assert len(offsets) > 1
    assert grid.loss_by_time == pytest.approx([np.mean(row) for row in grid.loss])


def grid_of(setting, loss, accuracy, first_frame=0):
    return LossGrid(
        setting=setting,
        timesteps=(0.0, 0.5),
        loss_by_time=np.mean(loss, axis=1).tolist(),
        accuracy_by_time=np.mean(accuracy, axis=1).tolist(),
        first_frame=first_frame,
        loss=loss,
        accuracy=accuracy,
        sample_loss=[np.mean(loss) + 1, np.mean(loss) - 1],
        sample_accuracy=[np.mean(accuracy)] * 2,
    )


ALONE = grid_of("synchronous", [[9.0, 4.0], [7.0, 2.0]], [[0.9, 0.1], [0.8, 0.3]])
GIVEN = grid_of("image_to_video", [[3.5], [1.0]], [[0.3], [0.4]], first_frame=1)


def test_the_gain_compares_the_same_frames():
    gain = gain_metrics(GIVEN, ALONE, "val/i2v_")
    assert gain == pytest.approx({"val/i2v_loss_gain": 0.75, "val/i2v_accuracy_gain": 0.15})


def test_only_equal_grids_are_compared_sample_by_sample():
    now = GIVEN.model_copy(
        update={
            "loss_by_time": (3.0, 0.5),
            "sample_loss": (2.75, 0.75),
            "sample_accuracy": (0.55, 0.25),
            "accuracy_by_time": (0.4, 0.4),
        }
    )
    before = [GIVEN, ALONE.model_copy(update={"sample_loss": (1.0,)})]
    assert change_metrics([ALONE, now], before, "val/") == pytest.approx(
        {
            "val/before_i2v_loss": 2.25,
            "val/i2v_loss_change": -0.5,
            "val/i2v_loss_change_se": 0.0,
            "val/before_i2v_accuracy": 0.35,
            "val/i2v_accuracy_change": 0.05,
            "val/i2v_accuracy_change_se": 0.15,
        }
    )
    one = ALONE.model_copy(update={"sample_loss": (1.0,), "sample_accuracy": (1.0,)})
    assert set(change_metrics([one], [one], "")) == {
        f"{name}{kind}{end}"
        for kind in ("loss", "accuracy")
        for name, end in (("before_", ""), ("", "_change"))
    }


@pytest.mark.parametrize("setting", ["synchronous", "per_frame", "image_to_video"])
def test_samples_have_the_mean_of_the_grid(measured, setting):
    grid, _ = measured(setting, batch_size=4)
    assert len(set(grid.sample_loss)) == 6
    assert np.mean(grid.sample_loss) == pytest.approx(grid.mean_loss, rel=1e-6)
    assert np.mean(grid.sample_accuracy) == pytest.approx(grid.mean_accuracy)


def test_metrics_by_time_and_frame():
    assert grid_metrics(ALONE, "val/", by_frame=True) == pytest.approx(
        {
            "val/loss": 5.5,
            "val/accuracy": 0.525,
            "val/loss_t0": 6.5,
            "val/loss_t0.5": 4.5,
            "val/accuracy_t0": 0.5,
            "val/accuracy_t0.5": 0.55,
            "val/loss_frame0": 8.0,
            "val/loss_frame1": 3.0,
        }
    )
    assert "val/i2v_loss_frame1" in grid_metrics(GIVEN, "val/i2v_", by_frame=True)


def test_copying_is_counted_on_the_later_frames(measured):
    ids = measured.samples.batch(range(6)).visual_ids
    expected = float((ids[:, 1] == ids[:, 0]).float().mean())
    assert 0 < expected < 1
    assert copy_accuracy(measured.samples, batch_size=4) == pytest.approx(expected)


def test_the_picture_shows_a_map_a_grid():
    with Image.open(io.BytesIO(picture([ALONE, GIVEN]))) as two:
        with Image.open(io.BytesIO(picture([ALONE]))) as one:
            assert two.width > one.width
        # the largest and the smallest value have the two ends of the scale of colours
        colours = {colour for _, colour in two.convert("RGB").getcolors(2**24)}
    assert (253, 231, 36) in colours
    assert len(colours) > 20


def test_the_end_of_a_stage_is_measured_in_every_setting(make_request):
    first = train_stage(make_request("video_pretrain", ema_decay=0.0))
    assert [grid.setting for grid in first.grids] == ["synchronous", "per_frame", "image_to_video"]
    metrics = first.metrics
    assert metrics["val/loss"] == first.grids[0].mean_loss
    assert metrics["val/i2v_accuracy"] == first.grids[2].mean_accuracy
    assert metrics["val/async_loss"] == first.grids[1].mean_loss
    # without averaging the raw weights are the average
    assert metrics["val/raw_loss"] == metrics["val/loss"]
    assert CheckpointRef.model_validate_json(first.model_dump_json()) == first
    assert not [name for name in metrics if "before" in name or name.endswith(("_s", "_bytes"))]

    second = train_stage(make_request("async_finetune", init_from=first))
    assert second.metrics["val/raw_loss"] != second.metrics["val/loss"]
    for name in ("loss", "accuracy", "i2v_accuracy", "i2v_loss", "async_loss"):
        assert second.metrics[f"val/before_{name}"] == metrics[f"val/{name}"]
    assert second.metrics["val/i2v_loss"] != metrics["val/i2v_loss"]


def test_images_are_not_compared_with_videos(make_request):
    parent = train_stage(make_request("image_pretrain", max_steps=1))
    child = train_stage(make_request("video_pretrain", max_steps=1, init_from=parent))
    assert not [name for name in child.metrics if "before" in name]


def test_images_have_one_setting(make_request):
    request = make_request("image_pretrain", max_steps=2)
    assert settings_of(TokenSamples(request.datasets.image_validation)) == ("synchronous",)
    checkpoint = train_stage(request)
    assert [grid.setting for grid in checkpoint.grids] == ["synchronous"]
    assert {"val/accuracy", "val/loss_frame0", "val/raw_loss"} <= checkpoint.metrics.keys()
    assert not [name for name in checkpoint.metrics if "i2v" in name or "async" in name]


def test_the_curve_has_the_losses_of_the_grid(make_request):
    checkpoint = train_stage(make_request(max_steps=2))
    curve, grid = dict(checkpoint.loss_curve), checkpoint.grids[0]
    assert len(curve) == 15
    assert [curve[t] for t in grid.timesteps] == list(grid.loss_by_time)
