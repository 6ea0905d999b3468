import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import media
from ursa.tokenizers.cosmos import CosmosAutoencoder, CosmosConfig, tile_slices
from ursa.tokenizers.visual import AutoencoderTokenizer


@functools.cache
def build(sample_frames):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CosmosConfig(
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            latent_channels=4,
            sample_frames=sample_frames,
        )
        return AutoencoderTokenizer(CosmosAutoencoder(config))


@given(st.integers(1, 300), st.integers(2, 40))
def test_tiles_cover_all_frames_and_share_one_with_their_neighbour(length, size):
    tiles = tile_slices(length, size)
    kept = [i for part in tiles for i in range(part.start + (part.start > 0), part.stop)]
    assert kept == list(range(length))
    assert all(part.stop - part.start <= size for part in tiles)
    assert all(part.stop - part.start >= 2 for part in tiles[1:])


@pytest.mark.parametrize("sample_frames", [5, 17, 20, 49])
@pytest.mark.parametrize("num_frames", [1, 5, 17, 21, 49, 53])
def test_no_frame_is_lost_or_added(num_frames, sample_frames):
    tokenizer = build(sample_frames)
    frames = media.panning(num_frames, step=2, height=8, width=16)[None]
    ids = tokenizer.encode(frames)
    assert ids.shape == (1, 1 + (num_frames - 1) // 4, 1, 2)
    assert tokenizer.decode(ids).shape == frames.shape


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_one_tile_is_the_whole_video(num_frames):
    frames = media.panning(num_frames, step=2, height=16, width=16)[None]
    whole, tiled = build(301), build(17)
    ids = whole.encode(frames)
    assert torch.equal(tiled.encode(frames), ids)
    assert np.array_equal(tiled.decode(ids), whole.decode(ids))


def test_a_later_tile_is_its_frames_coded_alone():
    tokenizer = build(17)
    frames = media.panning(25, step=2, height=16, width=16)[None]
    ids = tokenizer.encode(frames)
    assert torch.equal(ids[:, :5], tokenizer.encode(frames[:, :17]))
    assert torch.equal(ids[:, 5:], tokenizer.encode(frames[:, 16:])[:, 1:])
    decoded = tokenizer.decode(ids)
    assert np.array_equal(decoded[:, :17], tokenizer.decode(ids[:, :5]))
    assert np.array_equal(decoded[:, 17:], tokenizer.decode(ids[:, 4:])[:, 1:])
