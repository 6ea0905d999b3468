import numpy as np
import pytest
import torch

from ursa.diffusion.loss import posterior_loss
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


def test_shapes_that_do_not_fit_are_refused():
    logits, x_1 = case()
    with pytest.raises(ConfigError, match=r"logits must have shape \(B, N, V\)"):
        posterior_loss(logits, x_1[:, :3])
    with pytest.raises(ConfigError, match="mask must be bool of the shape of x_1"):
        posterior_loss(logits, x_1, torch.ones(2, 6))
    with pytest.raises(ConfigError, match="mask must be bool of the shape of x_1"):
        posterior_loss(logits, x_1, torch.ones(6, dtype=torch.bool))
