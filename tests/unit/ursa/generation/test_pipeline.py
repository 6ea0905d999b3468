import contextlib
import copy
import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import media
from ursa.diffusion.timesteps import inference_times
from ursa.errors import ConfigError, DataError
from ursa.generation import UrsaPipeline
from ursa.generation.arguments import parse_size
from ursa.generation.conditions import given_codes
from ursa.model.pretrained import WEIGHTS_FILE
from ursa.tokenizers.ibq import ImageAutoencoder, ImageConfig
from ursa.tokenizers.visual import AutoencoderTokenizer


@pytest.fixture(scope="module")
def pipeline(exported_model):
    return UrsaPipeline.from_pretrained(exported_model.directory_uri)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def forwards(pipeline):
    """Yield a list that gets the ids of every forward of the network, shape (B, L) each."""
    seen = []
    handle = pipeline.transformer.model.embed_tokens.register_forward_hook(
        lambda _module, arguments, _output: seen.append(arguments[0])
    )
    try:
        yield seen
    finally:
        handle.remove()


def test_sizes_come_from_training(pipeline):
    frames = pipeline("a red ball rolls", generator=seeded(), output_type="np").frames
    assert frames.shape == (1, 5, 16, 24, 3)
    assert frames.dtype == np.uint8
    pictures = pipeline("a tree", num_frames=1, height=24, width=16, generator=seeded()).frames
    assert [type(picture) for picture in pictures] == [Image.Image]
    assert pictures[0].size == (16, 24)


def test_outputs(pipeline):
    def frames(kind, **changes):
        return pipeline("a tree", generator=seeded(), output_type=kind, **changes).frames

    codes = frames("latent")
    pixels = frames("pt")
    assert pixels.shape == (1, 3, 5, 16, 24)
    assert torch.equal(pixels, pipeline.visual_tokenizer.decode_pixels(codes))
    video = frames("np")
    assert np.array_equal(video, pipeline.visual_tokenizer.decode(codes))
    # a clip is an array under "pil" too, as in the official pipeline
    assert np.array_equal(frames("pil"), video)
    (only,) = pipeline("a tree", generator=seeded(), output_type="latent", return_dict=False)
    assert torch.equal(only, codes)
    with pytest.raises(ConfigError, match="output_type must be pil, np, pt or latent, got 'jpg'"):
        frames("jpg")


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
    def prompts(**changes):
        with forwards(pipeline) as seen:
            pipeline("a tree", generator=seeded(), num_inference_steps=1, **changes)
        return seen[0][:, : pipeline.defaults.max_prompt_length].tolist()

    plain = prompts()
    assert len(plain) == 2  # conditional and unconditional
    assert prompts(motion_score=9.0)[0] != plain[0]
    assert prompts(negative_prompt="blur")[1] != plain[1]
    assert len(prompts(guidance_scale=1.0)) == 1
    assert len(prompts(guidance_trunc=0.0)) == 1


def test_temperature(pipeline):
    def draw(seed, temperature):
        return pipeline(
            "a tree", generator=seeded(seed), output_type="latent", temperature=temperature
        ).frames

    assert torch.equal(draw(1, None), draw(1, pipeline.defaults.temperature))
    assert not torch.equal(draw(1, 1.0), draw(1, 0.1))
    with pytest.raises(ConfigError, match="temperature must be 0, or at least 1e-06"):
        draw(1, -1.0)
    assert torch.equal(draw(1, 0.0), draw(1, 0.0))


def test_first_frame_is_held_in_every_step(pipeline):
    image = media.texture(16, 24, seed=1, grain=1.0)
    given = pipeline.visual_tokenizer.encode(image[None, None])[:, 0]
    seen = []
    codes = pipeline(
        "a tree",
        image=image,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda _pipe, step, t, now: seen.append((step, t, now["latents"])),
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
    files = sorted(
        path.relative_to(tmp_path / "copy").as_posix()
        for path in Path(tmp_path).rglob("*")
        if path.is_file()
    )
    assert files == [
        "generation_config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "scheduler/scheduler_model.pth",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    ]
    stored = torch.load(tmp_path / "copy" / "scheduler" / "scheduler_model.pth", weights_only=True)
    assert list(stored) == ["path.emb"]
    assert torch.equal(stored["path.emb"], pipeline.codebook)
    again.save_pretrained(tmp_path / "third", codebook_file=False)
    assert not list((tmp_path / "third").rglob("*.pth"))
    for name in files:
        if not name.endswith(".pth"):
            first, third = (tmp_path / folder / name for folder in ("copy", "third"))
            assert first.read_bytes() == third.read_bytes()


def test_directories_of_the_official_code(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text()) | {"shift": 3.0, "_diffusers_version": "0.36.0"}
    scheduler.write_text(json.dumps(values))
    again = UrsaPipeline.from_pretrained(tmp_path)
    assert (again.defaults.height, again.defaults.width, again.defaults.num_frames) == (320, 512, 1)
    assert again.scheduler.shift == 3.0
    seen = []
    again(
        "a tree",
        latents_shape=(2, 2, 3),
        num_inference_steps=2,
        callback_on_step_end=lambda _p, _s, t, _v: seen.append(t),
    )
    assert seen == [0.0, pytest.approx(1 - 3 * 0.5 / 2)]
    # without alpha the path is the mixture path
    scheduler.write_text(json.dumps({"alpha": None, "c": None, "shift": 1.0}))
    mixture = UrsaPipeline.from_pretrained(tmp_path)
    video = media.panning(5, step=1, height=16, width=24)
    options = {"height": 16, "width": 24, "num_frames": 9, "output_type": "latent"}
    codes = mixture("a", video=video, cond_noise_scale=0.5, generator=seeded(), **options).frames
    assert codes.shape == (1, 3, 2, 3)


def test_files_that_do_not_fit_together_are_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_model.pth"
    torch.save({"path.emb": torch.zeros(7, 3)}, path)
    with pytest.raises(
        ConfigError, match=r"predicts 60 codes, scheduler/scheduler_model.pth has 7"
    ):
        UrsaPipeline.from_pretrained(tmp_path)
    torch.save({"path.emb": Path("a")}, path)  # more than a tensor is never loaded
    with pytest.raises(ConfigError, match=r"must hold one tensor .path.emb. and nothing else"):
        UrsaPipeline.from_pretrained(tmp_path)
    for stored, message in (
        (torch.zeros(7, 3), "must hold one tensor"),
        ({"path.emb": [1.0]}, "must be floats of shape .V, D., got list"),
        ({"path.emb": torch.zeros(60, 3).long()}, "got torch.int64"),
    ):
        torch.save(stored, path)
        with pytest.raises(ConfigError, match=message):
            UrsaPipeline.from_pretrained(tmp_path)
    path.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="must hold one tensor"):
        UrsaPipeline.from_pretrained(tmp_path)
    path.unlink()
    for text, message in (
        ('{"alpha": 1.0}', "alpha and c go together"),
        ("[1]", "expected an object, got list"),
        ('{"alpha": 1.0, "c": 5.0, "eps": 0.5}', "eps must be 1e-05"),
    ):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            UrsaPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index.json is not JSON"):
        UrsaPipeline.from_pretrained(tmp_path)


def test_a_mistyped_argument_is_named(pipeline):
    with pytest.raises(TypeError, match="'guidence_scale'; did you mean 'guidance_scale'"):
        pipeline("a tree", guidence_scale=3.0)
    with pytest.raises(TypeError, match="no argument 'zzz'; it takes prompt, negative_prompt"):
        pipeline("a tree", zzz=3.0)
    with pytest.raises(ConfigError, match="a prompt is needed"):
        pipeline()


def test_every_name_of_the_official_call_is_known():
    official = {
        *("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps"),
        *("guidance_scale", "guidance_trunc", "flow_shift", "image", "video"),
        *("num_images_per_prompt", "generator", "latents", "latents_shape", "cond_latents"),
        *("cond_indices", "cond_noise_scale", "prompt_ids", "negative_prompt_ids"),
        *("output_type", "max_prompt_length", "vae_batch_size"),
    }
    diffusers = {
        *("num_videos_per_prompt", "return_dict", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "max_sequence_length"),
    }
    known = inspect.signature(UrsaPipeline.__call__).parameters
    assert official | diffusers <= set(known)


def codes_of(pipeline, frames):
    return pipeline.visual_tokenizer.encode(frames[None])


def test_given_latent_frames_are_held_to_the_bit(pipeline):
    video = media.panning(9, step=1, height=16, width=24)
    given = codes_of(pipeline, video)
    for indices in ([0], [1], [2], [0, 2], [0, 1, 2]):
        kept = given.clone()
        codes = pipeline(
            "a tree",
            cond_latents=given,
            cond_indices=indices,
            num_frames=9,
            generator=seeded(),
            output_type="latent",
        ).frames
        assert torch.equal(given, kept)
        for frame in range(3):
            assert torch.equal(codes[:, frame], given[:, frame]) == (frame in indices)
    free = pipeline(
        "a tree",
        cond_latents=given,
        num_frames=9,
        hold_given=False,
        generator=seeded(),
        output_type="latent",
    ).frames
    assert not torch.equal(free, given)


def test_from_a_first_to_a_last_frame(pipeline):
    first, last = (media.texture(16, 24, seed=seed, grain=1.0) for seed in (1, 2))
    codes = pipeline(
        "a tree",
        image=first,
        last_image=Image.fromarray(last),
        num_frames=9,
        generator=seeded(),
        output_type="latent",
    ).frames
    assert torch.equal(codes[:, :1], codes_of(pipeline, first[None]))
    still = codes_of(pipeline, np.repeat(last[None], 9, 0))
    assert torch.equal(codes[:, -1:], still[:, -1:])


def test_noised_frames_wait_until_their_time(pipeline):
    video = media.panning(5, step=1, height=16, width=24)
    given = codes_of(pipeline, video)
    seen = []
    pipeline(
        "a tree",
        video=video,
        num_frames=9,
        cond_noise_scale=0.4,
        num_inference_steps=10,
        flow_shift=1.0,
        generator=seeded(),
        callback_on_step_end=lambda _p, _s, t, now: seen.append((t, now["latents"])),
    )
    start = seen[0][1][:, :2]
    changed = (start != given).float().mean()
    assert 0 < changed < 1  # noised, but not to nothing
    early = [codes for t, codes in seen if t < 0.5]
    assert all(torch.equal(codes[:, :2], start) for codes in early)
    assert not torch.equal(seen[-1][1][:, :2], start)


def test_the_shift_of_a_call_is_that_of_its_steps(pipeline):
    """In the official code naming flow_shift raises."""

    def times(**options):
        seen = []
        pipeline(
            "a tree",
            num_inference_steps=4,
            callback_on_step_end=lambda _p, _s, t, _v: seen.append(t),
            **options,
        )
        return seen

    assert times(flow_shift=3.0) == pytest.approx(inference_times(4, 3.0).tolist())
    assert times() == pytest.approx(inference_times(4, pipeline.scheduler.shift).tolist())


def test_an_image_tokenizer_takes_given_frames(pipeline):
    """In the official code an image fails with the two-dimensional tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ImageAutoencoder(
            ImageConfig(
                block_out_channels=(32,) * 4,
                layers_per_block=1,
                latent_channels=8,
                num_vq_embeddings=60,
                vq_embed_dim=6,
            )
        )
    images = UrsaPipeline(
        transformer=pipeline.transformer,
        scheduler=pipeline.scheduler,
        visual_tokenizer=AutoencoderTokenizer(network),
        text_tokenizer=pipeline.text_tokenizer,
        defaults=pipeline.defaults,
    )
    picture = media.texture(16, 24, seed=1, grain=1.0)
    given = images.visual_tokenizer.encode(picture[None, None])
    options = {"generator": seeded(), "output_type": "latent"}
    codes = images("a tree", image=picture, num_frames=3, **options).frames
    assert codes.shape == (1, 3, 2, 3)
    assert torch.equal(codes[:, :1], given)
    # alone, and noised: another picture like it
    near = images("a tree", image=picture, num_frames=1, cond_noise_scale=0.5, **options).frames
    assert near.shape == given.shape
    assert not torch.equal(near, given)


def test_several_videos_of_several_prompts(pipeline):
    prompts = ["a red ball rolls", "the night city"]
    images = [media.texture(16, 24, seed=seed) for seed in (1, 2)]
    generators = [seeded(i) for i in range(4)]
    codes = pipeline(
        prompts,
        image=images,
        num_images_per_prompt=2,
        generator=generators,
        output_type="latent",
    ).frames
    assert len(codes) == 4
    for index in range(4):
        alone = pipeline(
            prompts[index // 2],
            image=images[index // 2],
            generator=[seeded(index)],
            output_type="latent",
        ).frames
        assert torch.equal(codes[index : index + 1], alone)


def test_nothing_that_is_passed_is_changed(pipeline):
    latents = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    conditions = torch.ones(1, 1, 2, 3, dtype=torch.int64)
    pipeline("a tree", latents=latents, cond_latents=conditions, generator=seeded())
    assert not latents.any()
    assert (conditions == 1).all()
    generator = seeded(3)
    pipeline("a tree", generator=generator)
    before = generator.get_state()
    for order in ("per_token", "official"):  # no call keeps the generator of an earlier one
        pipeline("a tree", draw_order=order)
    assert torch.equal(generator.get_state(), before)


def test_callbacks_change_and_stop(pipeline):
    steps = []

    def change(pipe, step, t, values):
        steps.append(step)
        pipe.interrupt = step == 1
        return {"latents": torch.zeros_like(values["latents"])}

    codes = pipeline("a tree", callback_on_step_end=change, output_type="latent").frames
    assert steps == [0, 1]
    assert not codes.any()
    assert pipeline("a tree", generator=seeded(), output_type="latent").frames.any()


def test_prompt_ids_stand_for_prompts(pipeline):
    length = pipeline.defaults.max_prompt_length
    ids = pipeline.text_tokenizer.encode(["a red ball rolls"], max_length=length)
    texts, numbers = (
        pipeline(generator=seeded(), output_type="latent", **arguments).frames
        for arguments in ({"prompt": "a red ball rolls"}, {"prompt_ids": ids})
    )
    assert torch.equal(texts, numbers)


def test_the_official_order_of_draws_is_another_with_the_same_start(pipeline):
    codes = [
        pipeline(
            "a tree",
            generator=seeded(5),
            draw_order="official",
            num_inference_steps=1,
            output_type="latent",
        ).frames
        for _ in range(2)
    ]
    assert torch.equal(*codes)
    generator = seeded(5)
    torch.randint(len(pipeline.codebook), (1, 2, 2, 3), generator=generator)  # the start
    start = torch.randint(len(pipeline.codebook), (1, 2, 2, 3), generator=seeded(5))
    text, negative = (
        pipeline.text_tokenizer.encode([t], max_length=pipeline.defaults.max_prompt_length)
        for t in ("a tree", "")
    )
    both = pipeline.transformer(torch.cat([text, negative]), torch.cat([start, start]))
    logits = both[1:] + pipeline.defaults.guidance_scale * (both[:1] - both[1:])
    expected = torch.multinomial(torch.softmax(logits[0], -1), 1, generator=generator)
    assert torch.equal(codes[0].flatten(), expected.flatten())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 6}, "got 6; the nearest are 5 and 9"),
        ({"height": 20}, "height must be divisible by 8, got 20"),
        ({"width": 25}, "the nearest are 24 and 32"),
        ({"generator": [seeded()] * 2}, "one a video"),
        (
            {"image": np.zeros((16, 24, 3), np.uint8), "video": np.zeros((1, 16, 24, 3))},
            "one of image, video and cond_latents, got image, video",
        ),
        ({"image": np.zeros((16, 24, 3))}, "uint8 of shape .*got float64"),
        ({"video": np.zeros((16, 24, 3), np.uint8)}, "video must be uint8 of shape"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1; got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
        ({"num_frames": 5.0}, "num_frames must be a whole number, got 5.0"),
        ({"flow_shift": 0.0}, "flow_shift must be positive"),
        ({"flow_shift": float("inf")}, "flow_shift must be positive and finite"),
        ({"guidance_scale": float("inf")}, r"guidance_scale must be in \[0, 1000\]"),
        ({"temperature": float("nan")}, "temperature must be 0, or at least 1e-06 and finite"),
        ({"temperature": 1e-320}, "temperature must be 0, or at least 1e-06 and finite"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, "an image must be"),
        ({"video": "clip.mp4"}, "video must be frames, got 'clip.mp4'; read the file first"),
        ({"prompt_ids": torch.zeros(4).long()}, r"prompt_ids must have shape \(prompts, L\)"),
        ({"prompt_ids": torch.zeros(0, 4).long()}, r"prompt_ids must have shape \(prompts, L\)"),
        ({"latents": np.zeros((1, 2, 2, 3))}, "latents must be a tensor of codes, got numpy"),
        ({"cond_latents": [[1]]}, "cond_latents must be a tensor of codes, got builtins.list"),
        ({"motion_score": float("nan")}, "motion_score must be at least 0, px/s, got nan"),
        ({"motion_score": -5.0}, "motion_score must be at least 0, px/s, got -5.0"),
        ({"solver": "heun"}, "solver must be exact, euler or euler_beta; got heun"),
        ({"draw_order": "mine"}, "draw_order must be per_token or official"),
        ({"cond_noise_scale": 1.5}, r"cond_noise_scale must be in \[0, 1\]; got 1.5"),
        ({"negative_prompt": ["a", "b"]}, r"one a prompt \(1\), got 2"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1"),
        (
            {"latents": torch.zeros(1, 2, 2, 2).long()},
            r"latents must be codes of shape \(1, 2, 2, 3",
        ),
        ({"latents_shape": (1, 2, 3, 4)}, "latents_shape must be"),
        ({"cond_indices": [0]}, "cond_indices choose frames"),
        ({"cond_latents": torch.zeros(1, 2, 9, 9).long()}, "cond_latents must be codes of shape"),
        (
            {"cond_latents": torch.zeros(1, 2, 2, 3).long(), "cond_indices": [2]},
            r"cond_indices must be latent frames of cond_latents, 0\.\.1, got 2",
        ),
        (
            {"last_image": np.zeros((16, 24, 3), np.uint8), "num_frames": 1},
            "last_image needs a clip",
        ),
        ({"draw_order": "official", "generator": [seeded()]}, "one generator for all"),
        ({"video": np.zeros((9, 16, 24, 3), np.uint8)}, "ask for more frames"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipeline("a tree", **arguments)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
def test_given_codes_are_integers(dtype):
    codes = torch.zeros(1, 1, 2, 3, dtype=dtype)
    with pytest.raises(ConfigError, match=rf"cond_latents must be .*, integers, got {dtype}"):
        given_codes(codes, None, num_videos=1, shape=(2, 2, 3))


def test_a_directory_without_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model_index.json is missing"):
        UrsaPipeline.from_pretrained(tmp_path)
    for name in ("nowhere", "./no/where", "a b/c:d"):
        with pytest.raises(ConfigError, match="there is no such directory"):
            UrsaPipeline.from_pretrained(name)


def test_weights_that_do_not_fit_are_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    weights = tmp_path / "copy" / "transformer" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing or damaged"):
        UrsaPipeline.from_pretrained(tmp_path / "copy")


def test_clocks_say_when_steps_start(pipeline):
    def times(**options):
        seen = []
        pipeline(
            "a tree",
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=lambda _pipe, _step, t, _state: seen.append(t) or {},
            **options,
        )
        return seen

    own = [0.0, 0.5, 0.9]
    assert times(clock=own) == own
    even = inference_times(6, 1.0).tolist()
    assert times(clock="official", num_inference_steps=6, flow_shift=1.0) == even
    # this model's schedule is the paper's, under which distances fall early
    linear = times(clock="linear", num_inference_steps=6)
    assert all(one < other for one, other in zip(linear[1:], even[1:], strict=True))
    # an untrained network has lost nothing before the end
    entropy = times(clock="entropy", num_inference_steps=6)
    assert entropy == sorted(entropy)
    assert entropy[1] > 0.5


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 0.5}, {"temperature": 0.2}, {"solver": "exact"}]
)
def test_the_official_order_takes_what_the_official_code_does(pipeline, options):
    with pytest.raises(ConfigError, match="draws as the official code does"):
        pipeline("a tree", draw_order="official", **options)


def test_the_official_order_has_the_official_clock(pipeline):
    call = {"draw_order": "official", "output_type": "latent", "num_inference_steps": 4}
    expected = pipeline("a tree", generator=seeded(), **call).frames
    other = copy.copy(pipeline)
    other.defaults = pipeline.defaults.model_copy(update={"clock": "entropy", "solver": "exact"})
    assert torch.equal(other("a tree", generator=seeded(), **call).frames, expected)


def test_clocks_that_do_not_fit_are_named(pipeline):
    for clock, steps, message in (
        ([0.0, 0.5], 3, "clock has 2 times for 3 num_inference_steps"),
        ([0.1, 0.5], None, "must rise from 0 to below 1"),
        ("moon", None, "clock must be official, linear, entropy or times; got moon"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline("a tree", clock=clock, num_inference_steps=steps)
    bare = copy.copy(pipeline)
    bare.defaults = pipeline.defaults.model_copy(update={"loss_curve": ()})
    with pytest.raises(ConfigError, match="which this model does not bring"):
        bare("a tree", clock="entropy")


@pytest.mark.parametrize(("solver", "count"), [("euler", 93), ("exact", 95), ("euler_beta", 95)])
def test_forwards_that_change_nothing_are_not_run(pipeline, solver, count):
    def ids(**options):
        with forwards(pipeline) as seen:
            pipeline(
                "a tree", generator=seeded(), num_inference_steps=50, guidance_scale=3.0, **options
            )
        return sum(len(each) for each in seen)

    # of 100 for 50 steps: at t = 0 nothing moves, from guidance_trunc on one branch is enough
    assert ids(solver=solver, flow_shift=1.0, guidance_trunc=0.9) == count
    assert ids(draw_order="official", flow_shift=1.0) == 100


def test_exact_steps_of_a_video_do_not_depend_on_its_neighbours(pipeline):
    prompts = ["a red ball rolls", "the night city"]
    options = {"solver": "exact", "output_type": "latent", "num_inference_steps": 5}
    together = pipeline(prompts, generator=[seeded(1), seeded(2)], **options).frames
    for index, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=[seeded(index + 1)], **options).frames
        assert torch.equal(together[index : index + 1], alone)
    euler = pipeline(prompts[0], generator=[seeded(1)], **{**options, "solver": "euler"}).frames
    assert not torch.equal(euler, together[:1])


def test_the_calls_of_the_official_examples_work(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = UrsaPipeline.from_pretrained(
        tmp_path, torch_dtype=torch.float32, trust_remote_code=True
    ).to(device="cpu", dtype=torch.float32)
    # pipe(**locals()) of a script hands over the names of its module
    names = {"__name__": "__main__", "os": inspect, "pipe": again, "prompt": "a tree"}
    expected = again("a tree", generator=seeded(), output_type="latent").frames
    codes = again(**names, generator=seeded(), output_type="latent").frames
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [(7, 7), ("7", 7), ("7B", 7), ("20kb", 20_000), ("1.5 MB", 1_500_000), ("5GB", 5 * 10**9)],
)
def test_a_shard_size_in_bytes(size, num_bytes):
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", ["5 apples", "", 0, "5G", "5KMB", "inf", "nan"])
def test_a_shard_size_that_is_none_is_refused(pipeline, tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size must be"):
        pipeline.save_pretrained(tmp_path, max_shard_size=size)
    with pytest.raises(ConfigError, match="leave safe_serialization out"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)


def test_guidance_up_to_one_is_off(pipeline):
    def draw(scale):
        return pipeline(
            "a tree", guidance_scale=scale, generator=seeded(), output_type="latent"
        ).frames

    assert torch.equal(draw(0.0), draw(1.0))
    assert torch.equal(draw(0.5), draw(1.0))
    assert not torch.equal(draw(3.0), draw(1.0))


def test_the_last_of_given_latents_may_be_the_last_of_the_clip(pipeline):
    given = codes_of(pipeline, media.panning(5, step=1, height=16, width=24))
    codes = pipeline(
        "a tree",
        cond_latents=given,
        cond_indices=[-1],
        num_frames=17,
        generator=seeded(),
        output_type="latent",
    ).frames
    assert torch.equal(codes[:, -1], given[:, -1])


def test_videos_come_as_arrays_tensors_or_lists(pipeline):
    one, other = (media.panning(5, step=step, height=16, width=24) for step in (1, 2))

    def first(prompts, video):
        return pipeline(
            prompts, video=video, num_frames=9, generator=seeded(), output_type="latent"
        ).frames[:, :2]

    expected = torch.cat([codes_of(pipeline, one), codes_of(pipeline, other)])
    pictures = [[Image.fromarray(frame) for frame in clip] for clip in (one, other)]
    for videos in ([one, other], pictures, torch.from_numpy(np.stack([one, other]))):
        assert torch.equal(first(["a", "b"], videos), expected)
    assert torch.equal(first("a", torch.from_numpy(one)), expected[:1])
    with pytest.raises(ConfigError, match="must have one shape, got"):
        first("a", [one, other[:1]])
    with pytest.raises(ConfigError, match="must have one shape, got none"):
        first("a", [])
    with pytest.raises(ConfigError, match="2 conditions are given for 4 prompts and 4 videos"):
        first(["a", "b", "c", "d"], [one, other])
    with pytest.raises(ConfigError, match="image is an empty list"):
        pipeline("a", image=[])


@pytest.mark.parametrize("name", ["latents", "cond_latents", "prompt_ids"])
def test_ids_out_of_range_are_named(pipeline, name):
    shape = (1, 6) if name == "prompt_ids" else (1, 2, 2, 3)
    with pytest.raises(DataError, match=f"{name} must be ids in"):
        pipeline("a tree", **{name: torch.full(shape, 10**6)})


def test_results_may_be_changed(pipeline):
    for kind in ("latent", "pt"):
        frames = pipeline("a tree", generator=seeded(), output_type=kind).frames
        frames[:] = 3


def test_two_calls_at_once_do_not_stop_each_other(pipeline):
    seen = {"a": [], "b": []}
    barrier = threading.Barrier(2)

    def run(name):
        def after(pipe, step, _t, _now):
            seen[name].append(step)
            if step == 0:
                barrier.wait(timeout=30)
            if name == "a" and step == 2:
                pipe.interrupt = True

        pipeline("a tree", num_inference_steps=20, callback_on_step_end=after)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, seen))
    assert seen == {"a": [0, 1, 2], "b": list(range(20))}


def test_saving_over_another_model_leaves_nothing_of_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, codebook_file=False)
    assert not list(tmp_path.rglob("*.pth"))
    UrsaPipeline.from_pretrained(tmp_path)
