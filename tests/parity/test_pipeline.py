"""Whole calls of the pipeline against the tokens of the official one, step by step."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.parity.official_pipeline import DATA, build_pipeline

CASES = json.loads((DATA / "pipeline.json").read_text())


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline()


@pytest.fixture(scope="module")
def video():
    frames = load_file(DATA / "cosmos.safetensors")["video_uint8_tchw"]
    return frames.permute(0, 2, 3, 1)[:9, :32, :48].contiguous().numpy()


def given(case, video, pipeline):
    """The arguments of a case; numbers stand for that many frames of the video."""
    arguments = dict(case)
    if "image" in case:
        arguments["image"] = video[0]
    if "video" in case:
        arguments["video"] = video[: case["video"]]
    if "cond_latents" in case:
        arguments["cond_latents"] = pipeline.visual_tokenizer.encode(video[None])
    if "latents" in case:
        arguments["latents"] = torch.arange(24).view(1, 1, 4, 6) * 2600
    return arguments


def test_frames_are_the_official_ones(pipeline):
    expected = load_file(DATA / "pipeline.safetensors")["text_to_video.frames"].numpy()
    frames = pipeline(
        **CASES["text_to_video"],
        generator=torch.Generator().manual_seed(500),
        draw_order="official",
        hold_given=False,
    ).frames[0, ::4]
    different = frames != expected
    # a value within rounding of a whole number may fall on either side of it
    assert different.mean() < 1e-3
    assert np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_after_every_step(pipeline, video, name):
    expected = load_file(DATA / "pipeline.safetensors")[f"{name}.steps"]
    steps = []
    codes = pipeline(
        **given(CASES[name], video, pipeline),
        generator=torch.Generator().manual_seed(500),
        draw_order="official",
        hold_given=False,
        output_type="latent",
        callback_on_step_end=lambda _p, _s, _t, now: steps.append(now["latents"].clone()),
    ).frames
    assert len(steps) == len(expected)
    for step, (ours, official) in enumerate(zip(steps, expected, strict=True)):
        assert torch.equal(ours, official.long()), step
    assert torch.equal(codes, expected[-1].long())
    assert (expected[0] != expected[-1]).float().mean() > 0.5
