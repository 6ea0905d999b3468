import copy

import numpy as np
import pytest
import torch

from tests import media
from ursa.errors import DataError
from ursa.tokenizers.fitted import FittedAutoencoder, FittedConfig
from ursa.tokenizers.visual import (
    AutoencoderTokenizer,
    psnr_db,
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


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 4, 16, 16, 3), np.uint8), "got 4 frames .* of frames are 1 and 5$"),
        (np.zeros((1, 0, 16, 16, 3), np.uint8), "got 0 frames .* of frames are 1$"),
        (np.zeros((1, 5, 20, 16, 3), np.uint8), "of 20x16; the nearest heights are 16 and 24$"),
        (np.zeros((1, 5, 16, 3, 3), np.uint8), "of 16x3; the nearest widths are 8$"),
        (np.zeros((1, 6, 9, 0, 3), np.uint8), "are 5 and 9; .* heights are 8 and 16; .* are 8$"),
        (np.zeros((0, 5, 16, 16, 3), np.uint8), "batch not empty, got 0"),
        (np.zeros((5, 16, 16, 3), np.uint8), "must be uint8 of shape"),
        (np.zeros((1, 5, 16, 16, 3), np.float32), "got float32"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tokenizer, frames, message):
    with pytest.raises(DataError, match=message):
        tokenizer.encode(frames)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 1, 2, 2), 60), r"id 60 is outside the codebook of 60 codes.*in 0\.\.59"),
        (torch.tensor([[[[3, -1]]]]), "id -1 is outside"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), r"got torch.int64 \(1, 2, 2\)"),
        (torch.zeros(1, 1, 2, 2), "must be integers"),
        (torch.zeros(1, 0, 2, 2, dtype=torch.int64), r"\(1, 0, 2, 2\)"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tokenizer, ids, message):
    for decode in (tokenizer.decode, tokenizer.decode_pixels):
        with pytest.raises(DataError, match=message):
            decode(ids)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_a_batch_may_be_coded_in_parts(tokenizer, batch_size):
    videos = np.concatenate([VIDEO[:, :5], VIDEO[:, 4:9], VIDEO[:, 8:]])
    ids = tokenizer.encode(videos)
    assert torch.equal(tokenizer.encode(videos, batch_size=batch_size), ids)
    whole = tokenizer.decode_pixels(ids)
    parts = tokenizer.decode_pixels(ids, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    frames = tokenizer.decode(ids, batch_size=batch_size).astype(int)
    assert np.abs(frames - tokenizer.decode(ids)).max() <= 1


def test_a_batch_size_of_zero_is_refused(tokenizer):
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        tokenizer.decode(torch.zeros(1, 1, 2, 2, dtype=torch.int64), batch_size=0)


def test_decoded_pixels_are_the_frames_unrounded(tokenizer):
    ids = tokenizer.encode(VIDEO).int()
    pixels = tokenizer.decode_pixels(ids)
    assert pixels.shape == (1, 3, 13, 24, 32)
    assert pixels.dtype == torch.float32
    assert np.array_equal(to_frames(pixels), tokenizer.decode(ids))


def test_read_only_and_reversed_frames_are_taken(tokenizer):
    frames = VIDEO[:, ::-1].copy()
    frames.flags.writeable = False
    assert torch.equal(tokenizer.encode(frames), tokenizer.encode(VIDEO[:, ::-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_give_about_the_same(network, tokenizer, dtype):
    cast = AutoencoderTokenizer(copy.deepcopy(network)).to(dtype=dtype)
    assert cast.dtype == dtype
    assert torch.equal(cast.codebook, tokenizer.codebook)
    ids = cast.encode(VIDEO)
    assert ids.dtype == torch.int64
    assert (ids == tokenizer.encode(VIDEO)).float().mean() > (
        0.7 if dtype == torch.bfloat16 else 0.99
    )
    pixels = cast.decode_pixels(ids)
    assert pixels.dtype == torch.float32
    whole = tokenizer.decode_pixels(ids)
    assert (pixels - whole).abs().mean() < 0.02 * whole.abs().mean()
    assert cast.decode(ids).dtype == np.uint8


def test_latents_that_are_not_numbers_are_refused(network):
    broken = AutoencoderTokenizer(copy.deepcopy(network))
    with torch.no_grad():
        broken.network.linear_in.bias[0] = float("nan")
    with pytest.raises(DataError, match=r"NaN latents in torch\.float32"):
        broken.encode(VIDEO)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_on_a_gpu_takes_and_gives_what_one_on_the_cpu_does(network, dtype):
    moved = AutoencoderTokenizer(copy.deepcopy(network)).to(device="cuda", dtype=dtype)
    ids = moved.encode(VIDEO)
    assert ids.device.type == "cuda"
    assert moved.decode_pixels(ids.cpu()).device.type == "cuda"
    assert moved.decode(ids.cpu()).shape == VIDEO.shape


def test_psnr():
    zeros = np.zeros((1, 1, 8, 8, 3), np.uint8)
    assert psnr_db(zeros, zeros + 255) == pytest.approx(0.0)
    assert psnr_db(zeros, zeros + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(zeros, zeros) > 100
