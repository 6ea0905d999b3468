from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import media
from ursa.errors import ConfigError
from ursa.generation import UrsaPipeline
from ursa.model.pretrained import WEIGHTS_FILE


@pytest.fixture(scope="module")
def pipeline(exported_model):
    return UrsaPipeline.from_pretrained(exported_model.directory_uri)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sizes_come_from_training(pipeline):
    frames = pipeline("a red ball rolls", generator=seeded(), output_type="np").frames
    assert frames.shape == (1, 5, 16, 24, 3)
    assert frames.dtype == np.uint8
    pictures = pipeline("a tree", num_frames=1, height=24, width=16, generator=seeded()).frames
    assert [len(video) for video in pictures] == [1]
    assert isinstance(pictures[0][0], Image.Image)
    assert pictures[0][0].size == (16, 24)


def test_generator_decides(pipeline):
    def draw(seed):
        return pipeline("a tree", generator=seeded(seed), output_type="latent").frames

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    generator = seeded(1)
    first, second = (
        pipeline("a tree", generator=generator, output_type="latent").frames for _ in range(2)
    )
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, second)


def test_global_randomness_is_left_alone(pipeline):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    pipeline("a tree", generator=seeded(), output_type="latent")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_in_a_batch_equals_itself_alone(pipeline):
    prompts = ["a red ball rolls", "the night city", ""]
    together = pipeline(
        prompts, generator=[seeded(i) for i in range(3)], output_type="latent", guidance_scale=3.0
    ).frames
    for index, prompt in enumerate(prompts):
        alone = pipeline(
            prompt, generator=[seeded(index)], output_type="latent", guidance_scale=3.0
        ).frames
        assert torch.equal(together[index : index + 1], alone)


def test_prompt_motion_and_negative_prompt_reach_the_network(pipeline):
    def logits(**changes):
        seen = []

        def note(_module, arguments, _output):
            seen.append(arguments[0])

        handle = pipeline.transformer.register_forward_hook(note)
        try:
            pipeline("a tree", generator=seeded(), num_inference_steps=1, **changes)
        finally:
            handle.remove()
        return seen[0].tolist()

    plain = logits()
    assert len(plain) == 2  # conditional and unconditional
    assert logits(motion_score=9.0)[0] != plain[0]
    assert logits(negative_prompt="blur")[1] != plain[1]
    assert len(logits(guidance_scale=1.0)) == 1
    assert len(logits(guidance_trunc=0.0)) == 1


def test_temperature(pipeline):
    def draw(seed, temperature):
        return pipeline(
            "a tree", generator=seeded(seed), output_type="latent", temperature=temperature
        ).frames

    assert torch.equal(draw(1, None), draw(1, pipeline.defaults.temperature))
    assert not torch.equal(draw(1, 1.0), draw(1, 0.1))
    with pytest.raises(ConfigError, match="temperature must be positive, got 0"):
        draw(1, 0.0)


def test_first_frame_is_held_in_every_step(pipeline):
    image = media.texture(16, 24, seed=1, grain=1.0)
    given = pipeline.visual_tokenizer.encode(image[None, None])[:, 0]
    seen = []
    codes = pipeline(
        "a tree",
        image=image,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda step, t, now: seen.append((step, t, now)),
    ).frames
    assert torch.equal(codes[:, 0], given)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 0.0
    assert all(torch.equal(now[:, 0], given) for _, _, now in seen)
    assert torch.equal(seen[-1][2], codes)
    free = pipeline("a tree", generator=seeded(), output_type="latent").frames
    assert not torch.equal(free[:, 0], given)


def test_a_video_is_continued(pipeline):
    video = media.panning(5, step=1, height=16, width=24)
    given = pipeline.visual_tokenizer.encode(video[None])
    codes = pipeline(
        "a tree", video=video, num_frames=9, generator=seeded(), output_type="latent"
    ).frames
    assert codes.shape[1] == 3
    assert torch.equal(codes[:, :2], given)


def test_pictures_of_other_sizes_are_cropped_about_their_centre(pipeline):
    wide = np.zeros((32, 200, 3), np.uint8)
    wide[:, 76:124] = media.texture(32, 48, seed=2)
    centre = np.ascontiguousarray(wide[:, 76:124])
    held = [
        pipeline("", image=Image.fromarray(image), generator=seeded(), output_type="latent").frames
        for image in (wide, centre)
    ]
    assert torch.equal(held[0][:, 0], held[1][:, 0])


def test_save_and_load_is_exact(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    again = UrsaPipeline.from_pretrained(tmp_path / "copy")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name])
    for name, value in pipeline.visual_tokenizer.network.state_dict().items():
        assert torch.equal(value, again.visual_tokenizer.network.state_dict()[name])
    assert again.scheduler == pipeline.scheduler
    assert again.defaults == pipeline.defaults
    frames = [
        one("a red ball rolls", generator=seeded(), output_type="np").frames
        for one in (pipeline, again)
    ]
    assert np.array_equal(*frames)
    names = {path.suffix for path in Path(tmp_path).rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}


def test_a_mistyped_argument_is_named(pipeline):
    with pytest.raises(TypeError, match="guidence_scale"):
        pipeline("a tree", guidence_scale=3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 6}, "got 6; the nearest are 5 and 9"),
        ({"height": 20}, "height must be divisible by 8, got 20"),
        ({"width": 25}, "the nearest are 24 and 32"),
        ({"generator": [seeded()] * 2}, "one a prompt"),
        ({"image": np.zeros((16, 24, 3), np.uint8), "video": np.zeros((1, 16, 24, 3))}, "not both"),
        ({"video": np.zeros((9, 16, 24, 3), np.uint8)}, "ask for more frames"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipeline("a tree", **arguments)


def test_a_directory_without_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_index.json is missing"):
        UrsaPipeline.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    weights = tmp_path / "copy" / "transformer" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing or damaged"):
        UrsaPipeline.from_pretrained(tmp_path / "copy")
