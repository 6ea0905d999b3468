import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests import media
from ursa.errors import ConfigError
from ursa.tokenizers.ibq import ImageAutoencoder, ImageConfig
from ursa.tokenizers.visual import AutoencoderTokenizer

VIDEO = media.panning(3, step=5, height=32, width=48)[None]
SMALL = {
    "block_out_channels": (32,) * 5,
    "layers_per_block": 1,
    "latent_channels": 8,
    "num_vq_embeddings": 64,
    "vq_embed_dim": 6,
}


def build(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageAutoencoder(ImageConfig(**{**SMALL, **changes}))


@pytest.mark.parametrize("quantizer", ["VQuantizer", "LFQuantizer"])
@pytest.mark.parametrize("num_blocks", [1, 4, 5])
def test_shapes_there_and_back(quantizer, num_blocks):
    network = build(quantizer_name=quantizer, block_out_channels=(32,) * num_blocks)
    tokenizer = AutoencoderTokenizer(network)
    stride = 2 ** (num_blocks - 1)
    assert (tokenizer.temporal_stride, tokenizer.spatial_stride) == (1, stride)
    assert tokenizer.codebook.shape == (64, 6)
    ids = tokenizer.encode(VIDEO)
    assert ids.shape == (1, 3, 32 // stride, 48 // stride)
    assert 0 <= ids.min() <= ids.max() < 64
    assert tokenizer.decode(ids).shape == VIDEO.shape


def test_frames_are_coded_one_by_one():
    tokenizer = AutoencoderTokenizer(build())
    single = torch.cat([tokenizer.encode(VIDEO[:, i : i + 1]) for i in range(3)], 1)
    assert torch.equal(tokenizer.encode(VIDEO), single)
    frames = np.concatenate([tokenizer.decode(single[:, i : i + 1]) for i in range(3)], 1)
    assert np.array_equal(tokenizer.decode(single), frames)


@pytest.mark.parametrize(
    ("down", "up", "extra"),
    [(False, False, 0), (True, False, 1), (False, True, 2), (True, True, 3)],
)
def test_attention_where_it_is_configured(down, up, extra):
    keys = build(attn_down_block=down, attn_up_block=up).state_dict()
    blocks = {key.split(".to_q")[0] for key in keys if "_blocks." in key and ".to_q" in key}
    assert len(blocks) == extra
    assert any(key.startswith("encoder.down_blocks.4.attentions.0") for key in keys) == down
    assert any(key.startswith("decoder.up_blocks.0.attentions.1") for key in keys) == up


def test_lookup_free_codes_are_no_weights():
    keys = build(quantizer_name="LFQuantizer").state_dict()
    assert not [key for key in keys if key.startswith("quantizer")]
    assert "quantizer.embedding.weight" in build().state_dict()


def test_the_decoder_keeps_its_own_dtype():
    tokenizer = AutoencoderTokenizer(build(decoder_dtype="float32")).to(dtype=torch.bfloat16)
    assert tokenizer.dtype == torch.bfloat16
    assert tokenizer.network.decoder.conv_in.weight.dtype == torch.float32
    assert tokenizer.network.post_quant_conv.weight.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer.encode(VIDEO)).shape == VIDEO.shape


def test_configurations_that_cannot_be_built_are_refused():
    with pytest.raises(ValidationError, match=r"divisible by 32 each, got \(32, 40\)"):
        ImageConfig(block_out_channels=(32, 40))
    with pytest.raises(ConfigError, match="got 100 codes of 6 channels"):
        build(quantizer_name="LFQuantizer", num_vq_embeddings=100)
