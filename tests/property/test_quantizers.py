import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.errors import ConfigError
from ursa.tokenizers.fitted import haar, patch_video, unpatch_video
from ursa.tokenizers.quantizers import FSQuantizer, LFQuantizer, VQuantizer

levels_of = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(levels_of)
def test_codes_are_a_round_trip_on_every_id(levels):
    check_round_trip(levels)


def test_the_64000_codes_of_the_paper_are_a_round_trip():
    check_round_trip((8, 8, 8, 5, 5, 5))
    assert FSQuantizer((8, 8, 8, 5, 5, 5)).codebook.shape == (64000, 6)


def check_round_trip(levels):
    quantizer = FSQuantizer(levels)
    ids = torch.arange(quantizer.codebook_size)
    codes = quantizer.decode(ids)
    assert codes.abs().max() <= 1
    assert len(torch.unique(codes, dim=0)) == len(ids)
    # the latent whose bound is the code: the inverse of tanh, kept off the open end
    half = torch.tensor([(level - 1) * 1.001 / 2 for level in levels])
    offset = torch.tensor([0.0 if level % 2 else 0.5 for level in levels])
    scale = torch.tensor([level // 2 for level in levels])
    latents = torch.atanh((codes * scale + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer.encode(latents), ids)
    torch.testing.assert_close(quantizer.quantize(latents), codes, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(levels_of, st.integers(0, 2**31 - 1))
def test_any_latent_has_an_id_and_its_code_is_the_quantized_latent(levels, seed):
    quantizer = FSQuantizer(levels)
    z = torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed)) * 5
    ids = quantizer.encode(z)
    assert ids.min() >= 0
    assert ids.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(ids), quantizer.quantize(z), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10))
def test_bits_are_a_round_trip_on_every_id(channels):
    quantizer = LFQuantizer(2**channels, channels)
    ids = torch.arange(2**channels)
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)
    assert torch.equal(quantizer.decode(ids), quantizer.codebook)
    # the first channel is the most significant bit
    assert torch.equal(quantizer.codebook[:, 0] > 0, ids >= 2 ** (channels - 1))


def test_a_latent_of_zero_is_the_bit_zero():
    assert LFQuantizer(8, 3).encode(torch.tensor([0.0, -0.0, 1e-30])) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(2, 8), st.integers(0, 2**31 - 1))
def test_vectors_of_one_length_are_a_round_trip_on_every_id(size, channels, seed):
    quantizer = VQuantizer(size, channels)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(size, channels, generator=generator, dtype=torch.float64)
    quantizer.double().load_state_dict(
        {"embedding.weight": table / table.norm(dim=-1, keepdim=True)}
    )
    ids = torch.arange(size).view(1, size)
    codes = quantizer.decode(ids)
    assert codes.shape == (1, size, channels)
    assert torch.equal(quantizer.encode(codes), ids)


def test_the_longer_vector_wins_not_the_nearer_one():
    quantizer = VQuantizer(2, 2)
    quantizer.load_state_dict({"embedding.weight": torch.tensor([[1.0, 0.0], [5.0, 5.0]])})
    assert quantizer.encode(torch.tensor([1.0, 0.1])) == 1


def test_vectors_are_compared_in_parts(monkeypatch):
    quantizer = VQuantizer(50, 4)
    z = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    whole = quantizer.encode(z)
    monkeypatch.setattr("ursa.tokenizers.quantizers._MAX_SCORES", 170)
    assert torch.equal(quantizer.encode(z), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_do_not_round_the_products(dtype):
    half = VQuantizer(4096, 16).to(dtype)
    exact = VQuantizer(4096, 16).double()
    exact.load_state_dict(half.state_dict())
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(half.encode(z), exact.encode(z.double()))
    assert half.codebook.dtype == torch.float32


@pytest.mark.parametrize("size", [(6, 3), (8, 2), (2**31, 31), (1, 0)])
def test_sizes_that_are_no_bits_are_refused(size):
    with pytest.raises(ConfigError, match=f"got {size[0]} codes of {size[1]} channels"):
        LFQuantizer(*size)


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_an_empty_table_is_refused(size):
    with pytest.raises(ConfigError, match=f"got {size[0]} codes of {size[1]} channels"):
        VQuantizer(*size)


def test_gradient_passes_the_rounding():
    quantizer = FSQuantizer((5, 4))
    z = torch.zeros(3, 2, requires_grad=True)
    quantizer.quantize(z).sum().backward()
    assert (z.grad > 0).all()


@pytest.mark.parametrize("levels", [(), (1,), (4, 1)])
def test_too_few_levels_are_refused(levels):
    with pytest.raises(ConfigError, match="at least 2"):
        FSQuantizer(levels)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_wavelet_patches_are_a_round_trip(steps, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(2, 3, 1 + 4 * steps, 4 * rows, 4 * columns, generator=generator) * 2 - 1
    coefficients = patch_video(video, haar())
    assert coefficients.shape == (2, 192, 1 + steps, rows, columns)
    torch.testing.assert_close(unpatch_video(coefficients, haar()), video, rtol=0, atol=1e-5)


def test_wavelets_are_orthonormal_and_keep_the_mean_first():
    matrix = haar()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4))
    torch.testing.assert_close(matrix[0], torch.full((4,), 0.5))


@pytest.mark.parametrize("size", [-2, 0, 3, 6])
def test_wavelets_of_other_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"must be a power of 2 .*, got {size}"):
        haar(size)
