import numpy as np
import pytest
import torch

from ursa.diffusion.loss import linear_posterior_loss, posterior_loss
from ursa.errors import ConfigError


def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 8, generator=generator, requires_grad=True)
    return logits, torch.randint(8, (2, 6), generator=generator)


def test_loss_is_cross_entropy_in_nats():
    x_1 = torch.tensor([[0, 1], [2, 3]])
    flat = posterior_loss(torch.zeros(2, 2, 8), x_1)
    assert float(flat.loss) == pytest.approx(np.log(8))
    sure = torch.nn.functional.one_hot(x_1, 8) * 50.0
    result = posterior_loss(sure, x_1)
    assert float(result.loss) == pytest.approx(0.0, abs=1e-5)
    assert float(result.accuracy) == 1.0
    sure[0, 0] = sure[0, 1]
    result = posterior_loss(sure, x_1)
    assert float(result.accuracy) == 0.75
    assert result.token_loss.tolist() == [[50.0, 0.0], [0.0, 0.0]]


def test_only_tokens_of_the_mask_count():
    logits, x_1 = case()
    mask = torch.tensor([[True, False, True, True, False, False], [False] * 5 + [True]])
    labels = x_1.masked_fill(~mask, -100)  # the official way to write it
    result = posterior_loss(logits, labels, labels >= 0)
    every = posterior_loss(logits, x_1)
    assert result.loss.item() == pytest.approx(every.token_loss[mask].mean().item(), rel=1e-6)
    right = (logits.argmax(-1) == x_1)[mask].float().mean()
    assert float(result.accuracy) == pytest.approx(float(right))
    assert torch.equal(result.token_loss, every.token_loss * mask)
    result.loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any(-1).all()


def test_a_full_mask_is_no_mask():
    logits, x_1 = case()
    for masked, plain in zip(
        posterior_loss(logits, x_1, torch.ones(2, 6, dtype=torch.bool)),
        posterior_loss(logits, x_1),
        strict=True,
    ):
        assert torch.equal(masked, plain)


def test_without_a_token_that_counts_nothing_is_learned():
    # the official loss divides by zero: NaN, and with it every weight
    logits, x_1 = case()
    result = posterior_loss(logits, x_1, torch.zeros(2, 6, dtype=torch.bool))
    assert result.loss.item() == 0.0
    assert float(result.accuracy) == 0.0
    result.loss.backward()
    assert (logits.grad == 0).all()
    empty = posterior_loss(logits[:, :0], x_1[:, :0])
    assert (empty.loss.item(), empty.accuracy.item()) == (0, 0)


def test_shapes_that_do_not_fit_are_refused():
    logits, x_1 = case()
    with pytest.raises(ConfigError, match=r"logits must have shape \(B, N, V\)"):
        posterior_loss(logits, x_1[:, :3])
    with pytest.raises(ConfigError, match="mask must be bool of the shape of x_1"):
        posterior_loss(logits, x_1, torch.ones(2, 6))
    with pytest.raises(ConfigError, match="mask must be bool of the shape of x_1"):
        posterior_loss(logits, x_1, torch.ones(6, dtype=torch.bool))


def head_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, 5, generator=generator).to(dtype).requires_grad_()
    weight = (3 * torch.randn(8, 5, generator=generator)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(8, (2, 6), generator=generator)


MASKS = {
    "none": None,
    "some": torch.tensor([[True, False, True, True, False, False], [False] * 5 + [True]]),
    "empty": torch.zeros(2, 6, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("part_rows", [1, 5, None])
def test_the_loss_of_hidden_states_is_that_of_their_logits(mask, part_rows):
    hidden, weight, x_1 = head_case(torch.float64)
    expected = posterior_loss(hidden @ weight.T, x_1, mask)
    expected.loss.backward()
    gradients = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    labels = x_1 if mask is None else x_1.masked_fill(~mask, -100)
    result = linear_posterior_loss(hidden, weight, labels, mask, part_rows=part_rows)
    (2 * result.loss).backward()
    for ours, plain in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for ours, plain in zip([hidden.grad, weight.grad], gradients, strict=True):
        torch.testing.assert_close(ours, 2 * plain, rtol=1e-6, atol=1e-7)


def test_the_loss_of_bfloat16_states_is_float32():
    hidden, weight, x_1 = head_case(torch.bfloat16)
    result = linear_posterior_loss(hidden, weight, x_1)
    plain = posterior_loss((hidden @ weight.T), x_1)
    assert result.loss.dtype == torch.float32
    assert float(result.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-6)
    result.loss.backward()
    ours = hidden.grad
    hidden.grad = None
    plain.loss.backward()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, hidden.grad, rtol=0.02, atol=0.01)


def test_nothing_is_kept_where_nothing_is_learned():
    hidden, weight, x_1 = head_case()
    weight.requires_grad_(False)
    result = linear_posterior_loss(hidden, weight, x_1)
    result.loss.backward(retain_graph=True)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="the loss can be differentiated once"):
        result.loss.backward()
    with torch.no_grad():
        assert not linear_posterior_loss(hidden, weight, x_1).loss.requires_grad


def test_improbable_labels_keep_their_loss():
    hidden = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[200.0, 0.0], [0.0, 0.0]])
    result = linear_posterior_loss(hidden, weight, torch.tensor([[1]]))
    assert float(result.loss.detach()) == 200.0
    result.loss.backward()
    assert hidden.grad.tolist() == [[[200.0, 0.0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_1": torch.zeros(2, 5, dtype=torch.long)}, r"hidden must have shape \(B, N, D\)"),
        ({"weight": torch.zeros(8, 4)}, r"weight \(V, D\)"),
        ({"mask": torch.ones(2, 6)}, "mask must be bool"),
        ({"part_rows": 0}, "part_rows must be at least 1, got 0"),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(changes, message):
    hidden, weight, x_1 = head_case()
    with pytest.raises(ConfigError, match=message):
        linear_posterior_loss(**{"hidden": hidden, "weight": weight, "x_1": x_1, **changes})
