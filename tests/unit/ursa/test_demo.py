import copy
import sys

import gradio
import numpy as np
import pytest
import torch

from ursa.demo import Preview, draw_with_previews, open_page, preview_steps
from ursa.errors import ConfigError
from ursa.generation import UrsaPipeline


@pytest.fixture(scope="module")
def pipeline(exported_model):
    pipeline = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, num_steps, **options):
    generator = torch.Generator().manual_seed(3)
    return draw_with_previews(
        pipeline, num_steps=num_steps, prompt="a tree", generator=generator, **options
    )


@pytest.mark.parametrize("num_steps", [1, 3, 8, 25, 100])
def test_previews_are_few_and_the_last_step_is_one(num_steps):
    steps = sorted(preview_steps(num_steps))
    assert len(steps) == min(num_steps, 8)
    assert steps[-1] == num_steps
    assert steps[0] >= 1


def test_the_clip_is_that_of_the_pipeline_and_the_last_preview_is_of_it(pipeline):
    *previews, clip = draw(pipeline, 20)
    generator = torch.Generator().manual_seed(3)
    alone = pipeline("a tree", num_inference_steps=20, generator=generator, output_type="np").frames
    assert np.array_equal(clip, alone[0])
    assert [preview.step for preview in previews] == sorted(preview_steps(20))
    assert all(preview.strip.shape == (16, 4 * 24, 3) for preview in previews)
    shown = np.concatenate([clip[0], clip[1], clip[3], clip[4]], axis=1)
    assert np.array_equal(previews[-1].strip, shown)
    assert not np.array_equal(previews[0].strip, shown)


def test_whoever_stops_reading_stops_the_sampler(pipeline):
    steps = []
    norm = pipeline.transformer.model.norm
    forward = norm.register_forward_hook(lambda *_: steps.append(1))
    items = draw(pipeline, 400)
    try:
        assert isinstance(next(items), Preview)
        items.close()
    finally:
        forward.remove()
    assert 50 <= len(steps) < 400


def test_errors_come_out_of_the_thread(pipeline):
    with pytest.raises(ConfigError, match="num_frames must be 1 \\+ 4k"):
        list(draw(pipeline, 3, num_frames=2))


def test_an_error_is_shown_as_text_and_limits_hold(pipeline, tmp_path):
    """The page takes messages for HTML."""

    class Failing(UrsaPipeline):
        def __call__(self, *_arguments, **_options):
            raise ConfigError("<img src=x onerror=alert(1)>\x1b[31m")

    failing = copy.copy(pipeline)
    failing.__class__ = Failing
    for shown, prompt, expected in (
        (failing, "a tree", r"&lt;img src=x onerror=alert(1)&gt;\x1b[31m"),
        (pipeline, "x" * 20_000, "prompt must have at most 10,000 characters, got 20,000"),
    ):
        page = open_page(shown, tmp_path)
        (draw_clip,) = [item.fn for item in page.fns.values() if item.api_name == "generate"]
        with pytest.raises(gradio.Error) as error:
            list(draw_clip(prompt, None, 9.0, 5, 2, 7.0, 0))
        assert error.value.message == expected


def test_without_gradio_the_extra_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'ursa-pipeline\[demo\]'"):
        open_page(pipeline, tmp_path)
