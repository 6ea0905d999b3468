import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ursa.errors import ConfigError
from ursa.tokenizers.fitted import haar, patch_video, unpatch_video
from ursa.tokenizers.quantizers import FSQuantizer

levels_of = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(levels_of)
def test_codes_are_a_round_trip_on_every_id(levels):
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


def test_paper_codebook_has_64000_codes():
    quantizer = FSQuantizer((8, 8, 8, 5, 5, 5))
    assert quantizer.codebook.shape == (64000, 6)


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
