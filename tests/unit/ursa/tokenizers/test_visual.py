import json

import numpy as np
import pytest
import torch

from tests import media
from ursa.errors import ConfigError, DataError
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.visual import (
    AutoencoderTokenizer,
    load_visual_tokenizer,
    psnr_db,
    save_visual_tokenizer,
    to_frames,
    to_pixels,
)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FittedAutoencoder(
            FittedConfig(levels=(5, 4, 3), hidden_channels=8, num_residual_blocks=2)
        )
        for parameter in network.parameters():
            # every branch takes part, also those that start at zero
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture(scope="module")
def tokenizer(network):
    return AutoencoderTokenizer(network)


VIDEO = media.panning(13, step=3, height=24, width=32)[None]


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13])
def test_shapes_there_and_back(tokenizer, num_frames):
    ids = tokenizer.encode(VIDEO[:, :num_frames])
    assert ids.shape == (1, 1 + (num_frames - 1) // 4, 3, 4)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < len(tokenizer.codebook) == 60
    frames = tokenizer.decode(ids)
    assert frames.shape == VIDEO[:, :num_frames].shape
    assert frames.dtype == np.uint8


def test_latent_frames_see_the_past_alone(network, tokenizer):
    changed = VIDEO.copy()
    changed[:, 9:] = 255 - changed[:, 9:]
    with torch.inference_mode():
        one, other = (network.latents(to_pixels(video)) for video in (VIDEO, changed))
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 3], other[:, 3], atol=1e-3)


def test_first_latent_frame_of_a_video_is_its_first_picture(network, tokenizer):
    with torch.inference_mode():
        picture, video = (network.latents(to_pixels(v)) for v in (VIDEO[:, :1], VIDEO))
    torch.testing.assert_close(picture[:, 0], video[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(tokenizer.encode(VIDEO[:, :1])[:, 0], tokenizer.encode(VIDEO)[:, 0])


def test_a_decoded_frame_sees_the_past_alone(network):
    ids = torch.randint(60, (1, 3, 3, 4), generator=torch.Generator().manual_seed(0))
    later = ids.clone()
    later[:, 2] = (later[:, 2] + 7) % 60
    with torch.inference_mode():
        one, other = (network.pixels(network.quantizer.decode(codes)) for codes in (ids, later))
    torch.testing.assert_close(one[:, :, :5], other[:, :, :5], rtol=0, atol=1e-5)
    assert not torch.allclose(one[:, :, 5:], other[:, :, 5:], atol=1e-3)


def test_a_video_does_not_see_its_neighbours_in_the_batch(tokenizer):
    other = media.still(13, height=24, width=32)[None]
    together = tokenizer.encode(np.concatenate([VIDEO, other]))
    assert torch.equal(together, torch.cat([tokenizer.encode(VIDEO), tokenizer.encode(other)]))


def test_gradient_reaches_every_weight(network):
    pixels = to_pixels(VIDEO[:, :5])
    network.zero_grad()
    (network(pixels) - pixels).square().mean().backward()
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert without == []


def test_pixels_are_a_round_trip():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
    pixels = to_pixels(frames)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    assert np.array_equal(to_frames(pixels), frames)
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_save_and_load_is_exact(network, tokenizer, tmp_path):
    save_visual_tokenizer(network, tmp_path / "t")
    again = load_visual_tokenizer(tmp_path / "t")
    assert torch.equal(again.encode(VIDEO), tokenizer.encode(VIDEO))
    assert again.network.config == network.config
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        load_visual_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    with pytest.raises(ConfigError, match="must be 'FittedAutoencoder', got 'Other'"):
        load_visual_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 4, 16, 16, 3), np.uint8), "got 4 frames"),
        (np.zeros((1, 5, 20, 16, 3), np.uint8), "of 20x16"),
        (np.zeros((5, 16, 16, 3), np.uint8), "must be uint8 of shape"),
        (np.zeros((1, 5, 16, 16, 3), np.float32), "got float32"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tokenizer, frames, message):
    with pytest.raises(DataError, match=message):
        tokenizer.encode(frames)


def test_psnr():
    zeros = np.zeros((1, 1, 8, 8, 3), np.uint8)
    assert psnr_db(zeros, zeros + 255) == pytest.approx(0.0)
    assert psnr_db(zeros, zeros + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(zeros, zeros) > 100
