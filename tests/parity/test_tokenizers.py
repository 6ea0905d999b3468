"""The visual tokenizers against stored numbers of the official classes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.tokenizers.cosmos import LEVELS, CosmosAutoencoder
from ursa.tokenizers.cosmos_layers import haar_join, haar_split, patch_video
from ursa.tokenizers.quantizers import FSQuantizer, LFQuantizer, VQuantizer
from ursa.tokenizers.visual import AutoencoderTokenizer, load_visual_tokenizer, to_pixels

DATA = Path(__file__).parent / "data"
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


def vector_quantizer():
    quantizer = VQuantizer(64, 8)
    quantizer.load_state_dict({"embedding.weight": golden("vq")["codebook"]})
    return quantizer


QUANTIZERS = {
    "fsq": lambda: FSQuantizer(LEVELS),
    "lfq": lambda: LFQuantizer(256, 8),
    "vq": vector_quantizer,
}


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_and_codes(name, rank):
    stored, quantizer = golden(name), QUANTIZERS[name]()
    ids = quantizer.encode(stored[f"z{rank}"].movedim(1, -1))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, stored[f"ids{rank}"].long())
    assert torch.equal(quantizer.decode(ids).movedim(-1, 1), stored[f"deq_ids{rank}"])


@pytest.mark.parametrize("name", ["lfq", "vq"])
def test_codebook(name):
    assert torch.equal(QUANTIZERS[name]().codebook, golden(name)["codebook"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fsq_of_half_latents_does_not_depend_on_the_dtype_of_the_network(dtype):
    stored = golden("fsq")
    ids = FSQuantizer(LEVELS).to(dtype).encode(stored["z4"].half().movedim(1, -1))
    assert torch.equal(ids, stored["ids4_from_fp16"].long())


def test_fsq_at_the_edges_and_at_infinity():
    stored, quantizer = golden("fsq"), FSQuantizer(LEVELS)
    values = stored["edge_values"]
    assert values.isinf().sum() == 2
    z = values.unsqueeze(-1).expand(-1, 6)
    assert torch.equal(quantizer.bound(z).T, stored["edge_bound"])
    ids = quantizer.encode(z)
    assert torch.equal(ids, stored["edge_ids"].long())
    assert [int(ids.min()), int(ids.max())] == stored["all_min_max"].tolist()
    for channel, expected in enumerate(stored["edge_single_channel_ids"]):
        z = torch.zeros(len(values), 6)
        z[:, channel] = values
        assert torch.equal(quantizer.encode(z), expected.long())


def test_fsq_of_other_levels():
    stored = golden("fsq")
    codes = FSQuantizer((4, 3, 2)).decode(stored["small_ids"].long())
    assert torch.equal(codes.movedim(-1, 1), stored["small_deq_levels_4_3_2"])


def test_haar_transform():
    stored = golden("cosmos")
    torch.testing.assert_close(haar_split(stored["dwt_in"]), stored["dwt_out"], rtol=0, atol=1e-6)
    torch.testing.assert_close(haar_join(stored["dwt_out"]), stored["dwt_in"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def video():
    return golden("cosmos")["video_uint8_tchw"].permute(0, 2, 3, 1)[None].numpy()


@pytest.fixture(scope="module")
def cosmos():
    return load_visual_tokenizer(DATA / "cosmos_tiny")


def test_patches(video):
    patched = patch_video(to_pixels(video[:, :17]), 4)[..., ::4, ::4]
    torch.testing.assert_close(patched, golden("cosmos")["encoder_patched_T17"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_frames", [1, 17, 49])
def test_video_latents(cosmos, video, num_frames):
    with torch.inference_mode():
        latents = cosmos.network.latents(to_pixels(video[:, :num_frames]))
    expected = golden("cosmos")[f"sf49_latents_T{num_frames}"]
    torch.testing.assert_close(latents.movedim(-1, 1), expected, **TOLERANCE)


@pytest.mark.parametrize("num_frames", [1, 17, 33, 49])
def test_video_ids(cosmos, video, num_frames):
    expected = golden("cosmos")[f"sf49_ids_T{num_frames}"].long()
    assert torch.equal(cosmos.encode(video[:, :num_frames]), expected)


@pytest.mark.parametrize("num_frames", [1, 17])
def test_decoded_video(cosmos, num_frames):
    stored = golden("cosmos")
    pixels = cosmos.decode_pixels(stored[f"sf49_ids_T{num_frames}"])
    assert pixels.shape == (1, 3, num_frames, 64, 64)
    expected = stored[f"sf49_dec_T{num_frames}"]
    torch.testing.assert_close(pixels[..., ::4, ::4], expected, **TOLERANCE)


def test_decoded_video_of_49_frames(cosmos):
    stored = golden("cosmos")
    pixels = cosmos.decode_pixels(stored["sf49_ids_T49"])
    assert pixels.shape == (1, 3, 49, 64, 64)
    some = pixels[:, :, [0, 1, 16, 17, 32, 48], ::4, ::4]
    expected = stored["sf49_dec_13lat_frames_0_1_16_17_32_last"]
    torch.testing.assert_close(some, expected, **TOLERANCE)
    frames = pixels.transpose(0, 2).flatten(1)
    mean, std = stored["sf49_dec_13lat_mean_per_frame"], stored["sf49_dec_13lat_std_per_frame"]
    torch.testing.assert_close(frames.mean(1), mean, **TOLERANCE)
    torch.testing.assert_close(frames.std(1), std, **TOLERANCE)


def with_config(tokenizer, **changes):
    network = CosmosAutoencoder(tokenizer.network.config.model_copy(update=changes))
    network.load_state_dict(tokenizer.network.state_dict())
    return AutoencoderTokenizer(network)


def test_a_picture_is_its_videos_first_latent_with_causal_attention_alone(cosmos, video):
    causal = with_config(cosmos, causal_attention=True)
    pairs = [
        (tokenizer.encode(video[:, :1])[:, 0], tokenizer.encode(video[:, :17])[:, 0])
        for tokenizer in (causal, cosmos)
    ]
    assert [float((picture == first).float().mean()) for picture, first in pairs] == [1.0, 0.34375]


@pytest.mark.parametrize(("num_frames", "doubled"), [(33, [5]), (49, [5, 10])])
def test_tiles_are_the_official_ones_without_the_doubled_latents(
    cosmos, video, num_frames, doubled
):
    ids = with_config(cosmos, sample_frames=17).encode(video[:, :num_frames])
    official = golden("cosmos")[f"sf17_ids_T{num_frames}"].long()
    kept = [index for index in range(official.shape[1]) if index not in doubled]
    assert ids.shape[1] == 1 + (num_frames - 1) // 4
    assert torch.equal(ids, official[:, kept])


def test_image_autoencoder():
    stored, tokenizer = golden("image_autoencoder"), load_visual_tokenizer(DATA / "vq_tiny")
    images = stored["images_uint8_bchw"].permute(0, 2, 3, 1)[:, None].numpy()
    with torch.inference_mode():
        latents = tokenizer.network.latents(to_pixels(images))
    torch.testing.assert_close(latents[:, 0].movedim(-1, 1), stored["latents"], **TOLERANCE)
    ids = tokenizer.encode(images)
    assert torch.equal(ids[:, 0], stored["ids"].long())
    pixels = tokenizer.decode_pixels(ids)
    assert pixels.shape == (2, 3, 1, 64, 96)
    torch.testing.assert_close(pixels[:, :, 0, ::2, ::2], stored["decoded"], **TOLERANCE)
    video = tokenizer.decode_pixels(ids.transpose(0, 1))
    torch.testing.assert_close(video[0], pixels[:, :, 0].transpose(0, 1), rtol=0, atol=1e-6)
