import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ursa.diffusion.loss import posterior_loss
from ursa.model.pretrained import load_transformer, save_transformer
from ursa.model.rope import rotary_embedding
from ursa.model.sequence import (
    TokenLayout,
    block_causal_mask,
    block_positions,
    positions,
    posterior_slice,
)

DATA = Path(__file__).parent / "data"
SHAPES = {"image": (1, 4, 6), "video": (3, 4, 6)}
TEXT_LENGTH = 8


def golden(name):
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def stored():
    return golden("transformer")


@pytest.fixture(scope="module")
def model():
    return load_transformer(DATA / "transformer_tiny")


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_configuration_is_read_and_written_as_published(model, tmp_path):
    save_transformer(model, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((DATA / "transformer_tiny" / "config.json").read_text())
    del published["attn_implementation"]  # null there; the published class warns of it
    assert ours == published
    weights = "diffusion_pytorch_model.safetensors"
    saved, original = load_file(tmp_path / weights), load_file(DATA / "transformer_tiny" / weights)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], value) for name, value in original.items())


@torch.inference_mode()
@pytest.mark.parametrize("case", SHAPES)
def test_every_layer(model, stored, case):
    ids, places = stored[f"{case}_input_ids"], positions(TEXT_LENGTH, SHAPES[case])
    assert torch.equal(places, stored[f"{case}_rope_pos"])
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
        for layer in model.model.layers
    ]
    hidden = model.forward_ids(ids, places)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 3
    for index, output in enumerate(outputs):
        close(output[:, ::8], stored[f"{case}_layer{index}_out"], 2e-5)
    close(hidden[:, ::8], stored[f"{case}_final_hidden"], 1e-5)
    close(model.lm_head(hidden)[:, ::4], stored[f"{case}_logits"], 1e-5)


@pytest.mark.parametrize("case", SHAPES)
def test_loss_and_gradients(stored, case):
    model = load_transformer(DATA / "transformer_tiny")
    ids, labels = stored[f"{case}_input_ids"], stored[f"{case}_labels"]
    text, x_t = ids[:, :TEXT_LENGTH], ids[:, TEXT_LENGTH + 1 :] - 296
    logits = model(text, x_t.view(-1, *SHAPES[case]))
    result = posterior_loss(logits, labels[:, TEXT_LENGTH + 1 :])
    close(result.loss, stored[f"{case}_loss"], 1e-6)
    close(result.accuracy, stored[f"{case}_acc1"], 1e-6)
    result.loss.backward()
    norms = json.loads((DATA / "transformer.json").read_text())[f"{case}_grad_norms"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-5), name
    compared = [name for name in gradients if f"{case}_grad.{name}" in stored]
    assert len(compared) == 5
    for name in compared:
        part = gradients[name] if gradients[name].dim() == 1 else gradients[name][::8]
        close(part, stored[f"{case}_grad.{name}"], 1e-6)


@torch.inference_mode()
def test_one_number_a_token(model, stored):
    """Without positions the published class rotates as Qwen3 does."""
    hidden = model.forward_ids(stored["image_input_ids"], torch.arange(33))
    close(model.lm_head(hidden)[:, ::4], stored["no_rope_pos_logits_image"], 1e-5)


@torch.inference_mode()
def test_bfloat16(stored):
    """As near to float32 as the published class is in bfloat16: 8 bits, logits up to 7.

    Kernels round in another order on each processor, and the error of one input is 0.8 to 1.3
    times that of another.
    """
    model = load_transformer(DATA / "transformer_tiny", dtype=torch.bfloat16)
    places = positions(TEXT_LENGTH, SHAPES["image"])
    logits = model.lm_head(model.forward_ids(stored["image_input_ids"], places))
    assert logits.dtype == torch.bfloat16
    ours = logits[:, ::4].float() - stored["image_logits"]
    official = stored["image_logits_bf16"].float() - stored["image_logits"]
    assert ours.abs().max() < 0.2
    assert ours.square().mean() < 1.5 * official.square().mean()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "is_full"),
    # flags 1 and -1; one that is not given is -1
    [("two_blocks", None), ("flags_short", [True, False, False])],
)
def test_block_masks(model, name, is_full):
    stored = golden("flex_masks")
    mask = block_causal_mask([5, 4, 4], is_full=is_full)
    assert torch.equal(mask, stored[f"mask_{name}"])
    hidden = model.forward_ids(stored["ids"], torch.arange(13), attention_mask=mask)
    close(model.lm_head(hidden), stored[f"logits_{name}"], 1e-5)


def test_a_flag_of_the_first_block_does_what_it_says():
    """Flags [-1, 1, 1] of the published class leave block 0 full, as if there were none."""
    stored = golden("flex_masks")
    assert torch.equal(stored["mask_flags"], stored["mask_two_blocks"])
    ours = block_causal_mask([5, 4, 4], is_full=[False, True, True])
    assert torch.equal(ours[:5, :5], torch.ones(5, 5, dtype=torch.bool).tril())
    assert torch.equal(ours[5:], stored["mask_flags"][5:])
    assert not ours[:5, 5:].any()


BLOCKS = {
    "video_3x4x6": ((3, 4, 6), 1),
    "image_4x6": ((1, 4, 6), 1),
    "image2d_4x6": ((1, 4, 6), 1),
    "blocks_2x3x4x6": ((3, 4, 6), 2),
}


def test_positions_of_blocks():
    stored = golden("rope_blocks")
    compared = 0
    for name, (shape, num_blocks) in BLOCKS.items():
        for prefix, with_bov in (("pos_", True), ("pos_nobov_", False)):
            expected = stored.get(f"{prefix}{name}_shift8")
            if expected is not None:
                ours = block_positions(8, shape, num_blocks=num_blocks, with_bov=with_bov)
                assert torch.equal(ours, expected.long())
                compared += 1
    assert compared == 7


@pytest.mark.parametrize("dim", [128, 64, 16])
def test_rotation_of_interleaved_pairs(dim):
    """The published rotation of pairs x0 y0 x1 y1 ... is ours of x0 x1 ... y0 y1 ..."""
    stored = golden("rope_blocks")

    def halves(x):
        return torch.cat([x[..., 0::2], x[..., 1::2]], -1)

    cos, sin = rotary_embedding(stored[f"dim{dim}_pos"], head_dim=dim, theta=1e6)
    q = halves(stored[f"dim{dim}_q"])
    swapped = torch.cat([-q[..., dim // 2 :], q[..., : dim // 2]], -1)
    rotated = q * cos[:, :, None] + swapped * sin[:, :, None]
    close(rotated, halves(stored[f"dim{dim}_q_rot_interleaved_in"]), 1e-5)


@pytest.mark.parametrize("case", ["image", "video_sync", "video_async"])
def test_inputs_of_a_training_step(case):
    stored = {
        name.split(".")[1]: value
        for name, value in golden("train_inputs").items()
        if name.startswith(f"{case}.")
    }
    text, x_t = stored["txt_ids"], stored["x_t"]
    ids = TokenLayout(text_vocab_size=293, bov_id=291).input_ids(text, x_t)
    assert torch.equal(ids, stored["input_ids"])
    places = positions(text.shape[1], tuple(x_t.shape[1:]))
    assert torch.equal(places.expand(len(ids), -1, -1), stored["rope_pos"])
    # the published loss shifts labels by one to the left: ours reads the same outputs
    shifted = stored["labels"].roll(-1, dims=1)
    part = posterior_slice(text.shape[1], x_t[0].numel())
    assert torch.equal(shifted[:, part], stored["img_ids"].flatten(1))
    assert (stored["labels"] >= 0).sum() == x_t.numel()
