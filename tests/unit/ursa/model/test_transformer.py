import pytest
import torch

from tests import factories
from ursa.model.transformer import TransformerConfig, build_transformer


@pytest.fixture(scope="module")
def config():
    return TransformerConfig(
        backbone=factories.tiny_config().model,
        text_vocab_size=50,
        codebook_size=60,
        bov_id=49,
        max_prompt_length=4,
    )


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
