"""Cross-entropy of the posterior p(x_1 | x_t) and its accuracy.

Dimensions: B = batch, N = visual tokens, V = codebook size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PosteriorLoss(NamedTuple):
    """Mean loss in nats and accuracy over the tokens, and the loss of each token."""

    loss: Tensor
    accuracy: Tensor
    token_loss: Tensor


def posterior_loss(logits: Tensor, x_1: Tensor) -> PosteriorLoss:
    """Compare posterior logits with the clean tokens.

    Args:
        logits: Posterior logits, shape (B, N, V).
        x_1: Clean token ids, shape (B, N), int64.

    Returns:
        Mean loss (scalar, nats, float32), accuracy in [0, 1] and token losses, shape (B, N).
    """
    token_loss = functional.cross_entropy(
        logits.float().flatten(0, 1), x_1.flatten(), reduction="none"
    ).view_as(x_1)
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == x_1).float().mean()
    return PosteriorLoss(token_loss.mean(), accuracy, token_loss.detach())
