import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import factories, media, tiny_models
from ursa.artifacts import Clip, SelectedClip
from ursa.evaluation.drawn import Draw, draw_clips, measure_drawn, rank_correlation
from ursa.evaluation.tokenizer import measure_code_usage, measure_tokenizer
from ursa.generation import UrsaPipeline
from ursa.video.decode import video_info

CONFIG = factories.tiny_config()


@pytest.fixture(scope="module")
def pipeline(exported_model):
    found = UrsaPipeline.from_pretrained(exported_model.directory_uri)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for index in range(3):
        frames = media.panning(30, step=1 + index, height=48, width=64, seed=index)
        path = media.save_video(folder / f"{index}.mp4", frames, 12.0)
        info = video_info(path)
        caption = factories.CAPTIONS[index % 2]
        found.append(factories.clip_of(path, caption=caption, info=info, index=index))
    return found


def documented() -> set[str]:
    """Names in the first column of the table of metrics."""
    text = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text("utf-8")
    section = text.partition("## Metrics")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def selected(clips, splits):
    return [
        SelectedClip(clip=clip, kept=True, reason=None, split=split)
        for clip, split in zip(clips, splits, strict=True)
    ]


def test_all_that_is_documented_is_measured_the_same_each_time(pipeline, clips, token_datasets):
    chosen = selected(clips, ("train", "train", "validation"))
    found = measure_drawn(pipeline, chosen, CONFIG)
    tokenizer = measure_tokenizer(pipeline, chosen, CONFIG)
    usage = measure_code_usage(token_datasets.video_train)
    names = {item.metric for part in (found, tokenizer, usage) for item in part.measures}
    general = {re.sub(r"^(steps)\d+_", r"\1<N>_", name) for name in names}
    general = {re.sub(r"^(asked)\d+_", r"\1<score>_", name) for name in general}
    assert general == documented()
    assert all(np.isfinite(item.value) for item in found.measures)
    groups = {group.name: group for group in found.cases}
    without_interval = {item.metric for item in found.measures if item.cases is None}
    assert without_interval == {"t2v_frechet_statistics"}
    assert {item.cases for item in found.measures} - {None} == set(groups)
    assert len(groups["held_out"].cases) == 3
    assert len(groups["t2v"].cases) == 4
    values = {item.metric: item.value for item in found.measures}
    # what is given is kept
    assert values["i2v_first_token_accuracy"] == 1.0
    assert found == measure_drawn(pipeline, chosen, CONFIG)


def test_without_held_out_clips_only_prompts_are_drawn(pipeline, clips):
    found = measure_drawn(pipeline, selected(clips, ("train",) * 3), CONFIG)
    prefixes = {item.metric.partition("_")[0] for item in found.measures}
    assert prefixes == {"t2v", "steps1", "asked2", "asked32", "motion", "real"}
    assert "t2v_nearest_train_ratio" not in {item.metric for item in found.measures}


def test_codes_or_a_network_may_be_the_features(pipeline, clips, tmp_path):
    network = {"model": str(tiny_models.write_clip(tmp_path / "clip"))}
    for name, features in (("latents", "latents"), ("network", network)):
        changes = {"num_windows": 0, "asked_motion": [], "fewer_steps": [], "features": features}
        config = factories.tiny_config({"evaluation": {"clips": changes}})
        found = measure_drawn(pipeline, selected(clips, ("train",) * 3), config)
        assert f"t2v_frechet_{name}" in {item.metric for item in found.measures}


def test_clips_of_one_frame_are_not_measured(pipeline, clips):
    config = factories.tiny_config({"tokenization": {"num_frames": 1}})
    assert measure_drawn(pipeline, selected(clips, ("train",) * 3), config).measures == ()


def test_a_clip_does_not_depend_on_those_beside_it(pipeline):
    draws = [Draw(factories.CAPTIONS[number % 2], number) for number in range(5)]
    together = draw_clips(pipeline, draws, CONFIG)
    alone = draw_clips(pipeline, draws[4:], CONFIG)
    assert torch.equal(together.codes[4:], alone.codes)
    np.testing.assert_array_equal(together.frames[4:], alone.frames)
    asked = draw_clips(pipeline, draws, CONFIG, motion=32.0)
    assert not torch.equal(asked.codes, together.codes)


def test_rank_correlation_of_known_orders():
    assert rank_correlation(np.array([1.0, 5.0, 9.0])) == pytest.approx(1)
    assert rank_correlation(np.array([9.0, 5.0, 1.0])) == pytest.approx(-1)
    assert rank_correlation(np.array([1.0, 9.0, 5.0])) == pytest.approx(0.5)
    assert rank_correlation(np.array([4.0, 4.0, 4.0])) == 0.0
