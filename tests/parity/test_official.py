from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.diffusion.codebook import normalize_codebook
from ursa.model.rope import frequency_axes, rotary_embedding
from ursa.model.sequence import positions
from ursa.tokenizers.quantizers import FSQuantizer

DATA = Path(__file__).parent / "data"
LEVELS = (8, 8, 8, 5, 5, 5)


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


def test_codebook_of_the_paper():
    stored = golden("fsq_codebook")
    codebook = FSQuantizer(LEVELS).codebook
    assert torch.equal(codebook[stored["rows"]], stored["emb_raw_rows"])
    normalized = normalize_codebook(codebook)[stored["rows"]]
    torch.testing.assert_close(normalized, stored["emb_normalized_rows"], rtol=0, atol=1e-6)


def test_quantizer():
    stored = golden("fsq")
    quantizer = FSQuantizer(LEVELS)
    z = stored["z4"].movedim(1, -1)
    torch.testing.assert_close(quantizer.bound(z).movedim(-1, 1), stored["bound_z4"])
    ids = quantizer.encode(z)
    assert torch.equal(ids, stored["ids4"].long())
    assert torch.equal(quantizer.decode(ids).movedim(-1, 1), stored["deq_ids4"])


def test_quantizer_at_the_edges():
    stored = golden("fsq")
    quantizer = FSQuantizer(LEVELS)
    values, finite = stored["edge_values"], torch.isfinite(stored["edge_values"])
    ids = quantizer.encode(values[finite].unsqueeze(-1).expand(-1, 6))
    assert torch.equal(ids, stored["edge_ids"][finite].long())
    for channel in range(6):
        z = torch.zeros(int(finite.sum()), 6)
        z[:, channel] = values[finite]
        expected = stored["edge_single_channel_ids"][channel][finite].long()
        assert torch.equal(quantizer.encode(z), expected)


@pytest.mark.parametrize(("name", "shape"), [("image", (1, 4, 6)), ("video", (3, 4, 6))])
def test_positions(name, shape):
    assert torch.equal(positions(8, shape)[8:], golden("rope")[f"pos_{name}"])


@pytest.mark.parametrize("dim", [128, 64, 16])
def test_rotation(dim):
    stored = golden("rope")
    assert torch.equal(frequency_axes(dim), stored[f"dim{dim}_axis"])
    cos, sin = rotary_embedding(stored[f"dim{dim}_pos"], head_dim=dim, theta=1e6)
    half = dim // 2
    torch.testing.assert_close(cos[0, :, :half], stored[f"dim{dim}_cos"], rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0, :, :half], stored[f"dim{dim}_sin"], rtol=0, atol=1e-5)
    q = stored[f"dim{dim}_q"]
    swapped = torch.cat([-q[..., half:], q[..., :half]], -1)
    rotated = q * cos[0, :, None] + swapped * sin[0, :, None]
    official = stored[f"dim{dim}_q_rot"]
    official = torch.cat([official[..., 0::2], official[..., 1::2]], -1)
    torch.testing.assert_close(rotated, official, rtol=0, atol=1e-5)
    scores, expected = (torch.einsum("ihd,jhd->hij", x, x) for x in (rotated, official))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
