import pytest
import torch
from pydantic import ValidationError

from tests import media
from ursa.tokenizers.cosmos import CosmosAutoencoder, CosmosConfig
from ursa.tokenizers.visual import AutoencoderTokenizer, to_pixels

VIDEO = media.panning(17, step=3, height=16, width=24)[None]
VIDEO[:, 1:] //= 4  # a cut, so that frames differ much
SMALL = {"block_out_channels": (8, 8, 12, 12), "layers_per_block": 1, "latent_channels": 8}


def build(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CosmosAutoencoder(CosmosConfig(**{**SMALL, **changes})).eval()
        for name, parameter in network.named_parameters():
            if "attentions" in name and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)  # so that attention matters
    return network


@torch.inference_mode()
def latents(network, frames):
    return network.latents(to_pixels(frames))


def test_a_picture_is_the_first_latent_of_its_video_with_causal_attention_alone():
    causal, official = build(causal_attention=True), build()
    picture, video = (latents(causal, frames) for frames in (VIDEO[:, :1], VIDEO))
    torch.testing.assert_close(picture[:, 0], video[:, 0], rtol=0, atol=1e-5)
    picture, video = (latents(official, frames) for frames in (VIDEO[:, :1], VIDEO))
    assert (picture[:, 0] - video[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_what_a_latent_frame_sees(causal):
    network = build(causal_attention=causal)
    changed = VIDEO.copy()
    changed[:, 9:] = 255 - changed[:, 9:]
    one, other = (latents(network, frames)[:, :3] for frames in (VIDEO, changed))
    assert ((one - other).abs().max() < 1e-5) == causal


def test_a_decoded_frame_sees_the_past_alone_with_causal_attention():
    network = build(causal_attention=True)
    codes = torch.rand(1, 3, 2, 3, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    later = codes.clone()
    later[:, 2] = -later[:, 2]
    with torch.inference_mode():
        one, other = network.pixels(codes), network.pixels(later)
    torch.testing.assert_close(one[:, :, :5], other[:, :, :5], rtol=0, atol=1e-5)
    assert (one[:, :, 5:] - other[:, :, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "num_frames"),
    [
        ({"temporal_stride": 8, "spatial_stride": 8, "sample_frames": 17}, 17),
        ({"temporal_stride": 8, "spatial_stride": 16, "sample_frames": 9}, 25),
        ({"temporal_stride": 4, "spatial_stride": 16}, 9),
        ({"temporal_stride": 4, "spatial_stride": 4}, 5),
        ({"patch_size": 2, "temporal_stride": 2, "spatial_stride": 8, "sample_frames": 4}, 7),
    ],
)
def test_other_strides(changes, num_frames):
    tokenizer = AutoencoderTokenizer(build(**changes))
    frames = media.panning(num_frames, step=3, height=32, width=48)[None]
    ids = tokenizer.encode(frames)
    stride_t, stride_s = changes["temporal_stride"], changes["spatial_stride"]
    assert ids.shape == (1, 1 + (num_frames - 1) // stride_t, 32 // stride_s, 48 // stride_s)
    assert tokenizer.decode(ids).shape == frames.shape


@pytest.mark.parametrize("module", ["encoder", "decoder"])
def test_gradient_reaches_every_weight(module):
    network = build()
    if module == "encoder":
        out = network.latents(to_pixels(VIDEO))
    else:
        out = network.pixels(torch.rand(1, 5, 2, 3, 6) * 2 - 1)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    without = [
        name
        for name, parameter in getattr(network, module).named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert without == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_stride": 12}, "spatial_stride must be a power of 2"),
        ({"temporal_stride": 2}, "temporal_stride must be a power of 2 from patch_size 4"),
        ({"spatial_stride": 32}, "add blocks or change the strides"),
        ({"temporal_stride": 16, "spatial_stride": 16}, "cannot give"),
        ({"temporal_stride": 8, "spatial_stride": 4}, "cannot give"),
        ({"sample_frames": 4}, "sample_frames must be at least 1 \\+ temporal_stride = 5, got 4"),
        ({"vq_embed_dim": 8}, "vq_embed_dim"),
        ({"levels": (8, 8)}, "levels"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        CosmosConfig(**changes)
