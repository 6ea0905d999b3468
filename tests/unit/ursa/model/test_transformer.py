import pytest
import torch
from pydantic import ValidationError
from transformers import Qwen3Config

from tests import factories
from ursa.model.sequence import block_causal_mask, positions
from ursa.model.transformer import TransformerConfig, UrsaTransformer, build_transformer


@pytest.fixture(scope="module")
def config():
    return factories.transformer_config()


@pytest.fixture(scope="module")
def model(config):
    return build_transformer(config, seed=0).eval()


def inputs(batch=2, shape=(2, 2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(49, (batch, 4), generator=generator)
    return text, torch.randint(60, (batch, *shape), generator=generator)


def test_weights_are_a_function_of_the_seed(config, model):
    state = torch.get_rng_state()
    same, other = build_transformer(config, seed=0), build_transformer(config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


@torch.inference_mode()
def test_shape_and_start_near_uniform(model):
    logits = model(*inputs())
    assert logits.shape == (2, 12, 60)
    assert logits.abs().max() < 1.5


@torch.inference_mode()
def test_samples_do_not_see_each_other(model):
    text, visual = inputs()
    together = model(text, visual)
    alone = torch.cat([model(text[i : i + 1], visual[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("place", [0, 5, 11])
def test_every_token_sees_every_token(model, place):
    """Attention is full: the first output depends on the last token and on the prompt."""
    text, visual = inputs(batch=1)
    changed = visual.clone()
    changed.view(-1)[place] = (changed.view(-1)[place] + 1) % 60
    difference = (model(text, visual) - model(text, changed)).abs().amax((0, 2))
    assert (difference > 0).all()
    other_text = text.clone()
    other_text[0, 0] = (other_text[0, 0] + 1) % 49
    difference = (model(text, visual) - model(other_text, visual)).abs().amax((0, 2))
    assert (difference > 0).all()


@torch.inference_mode()
def test_place_matters(model):
    text, visual = inputs(batch=1, shape=(1, 2, 2))
    swapped = visual.flip(-1)
    assert not torch.allclose(model(text, visual).sum(1), model(text, swapped).sum(1), atol=1e-5)


@torch.inference_mode()
def test_outputs_stand_one_to_the_left(model):
    """The outputs are those of BOV and of all visual tokens but the last."""
    seen = []
    handle = model.model.norm.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    try:
        model(*inputs())
    finally:
        handle.remove()
    assert seen[0].shape[1] == 12
    text, visual = inputs()
    ids = model.layout.input_ids(text, visual)
    assert (ids[:, 4] == 49).all()
    assert ids.shape[1] == 4 + 1 + 12


@torch.inference_mode()
def test_other_shapes_than_trained_on(model):
    text, visual = inputs(shape=(3, 4, 5))
    assert model(text, visual).shape == (2, 60, 60)


@torch.inference_mode()
def test_ids_and_positions_give_what_prompt_and_codes_give(model):
    text, visual = inputs()
    ids, places = model.layout.input_ids(text, visual), positions(4, (2, 2, 3))
    hidden = model.forward_ids(ids, places)
    assert hidden.shape == (2, 17, 32)
    assert torch.equal(model.lm_head(hidden)[:, 4:-1], model(text, visual))
    assert torch.equal(model.forward_ids(ids, places, keep=slice(4, -1)), hidden[:, 4:-1])
    assert torch.equal(model.forward_ids(ids, places.expand(2, -1, -1)), hidden)
    full = torch.ones(17, 17, dtype=torch.bool)
    for mask in (full, full.expand(2, -1, -1)):
        masked = model.forward_ids(ids, places, attention_mask=mask)
        torch.testing.assert_close(masked, hidden, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_mask_hides_what_it_says(model):
    """Each sample has its own mask: under a causal one a later token changes nothing before it."""
    ids = model.layout.input_ids(*inputs())
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 50
    masks = torch.stack([block_causal_mask([1] * 17), torch.ones(17, 17, dtype=torch.bool)])
    first, second = (
        model.forward_ids(x, positions(4, (2, 2, 3)), attention_mask=masks) for x in (ids, other)
    )
    changed = (first != second).any(-1)
    assert changed.tolist() == [[False] * 9 + [True] * 8, [True] * 17]


@torch.inference_mode()
def test_the_base_of_the_rotation_is_ours(config, model, monkeypatch):
    """transformers 5 has no rope_theta on its configuration: nothing here may read it there."""
    monkeypatch.delattr(Qwen3Config, "rope_theta", raising=False)
    other = UrsaTransformer(config.model_copy(update={"rope_theta": 1e6})).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(*inputs()), other(*inputs()), atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 111}, r"vocab_size 111 must be lm_vocab_size 50 \+ lm_head_size 60 = 110"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "attention_heads 3 must be a multiple of .* 2",
        ),
        ({"bov_token_id": 50}, "bov_token_id 50 must be a text id below lm_vocab_size 50"),
        ({"head_dim": 24}, "head_dim"),
        ({"max_prompt_length": 4}, "max_prompt_length"),
        ({"_class_name": "NOVATransformer3DModel"}, "must be URSATransformer3DModel, got 'NOVA"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, values, message):
    with pytest.raises(ValidationError, match=message):
        TransformerConfig.model_validate(config.model_dump() | values)


def test_defaults_are_the_published_ones():
    config = TransformerConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        *(2048, 6144),
        28,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)
    assert (config.vocab_size, config.lm_vocab_size, config.lm_head_size) == (215669, 151669, 64000)
    assert (config.bov_token_id, config.rope_theta, config.rms_norm_eps) == (151652, 1e6, 1e-6)
