"""Cross-entropy of the posterior p(x_1 | x_t) and its accuracy.

Dimensions: B = batch, N = visual tokens, V = codebook size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ursa.errors import ConfigError

_IGNORED = -100
"""Target of tokens without a label, as torch and the official labels write it."""


class PosteriorLoss(NamedTuple):
    """Mean loss in nats and accuracy over the tokens that count, and the loss of each token."""

    loss: Tensor
    accuracy: Tensor
    token_loss: Tensor


def posterior_loss(logits: Tensor, x_1: Tensor, mask: Tensor | None = None) -> PosteriorLoss:
    """Compare posterior logits with the clean tokens.

    Args:
        logits: Posterior logits, shape (B, N, V).
        x_1: Clean token ids, shape (B, N), int64; any number where the mask is False.
        mask: Which tokens count (True), shape (B, N), bool; None counts all. Of official labels it
            is `labels >= 0`.

    Returns:
        Mean loss (scalar, nats, float32) and accuracy in [0, 1] over the tokens that count, and
        token losses, shape (B, N), 0 where they do not. If no token counts, loss and accuracy are
        0 and so is the gradient: such a batch teaches nothing, instead of NaN to all weights.

    Raises:
        ConfigError: If shapes do not fit or the mask is not bool.
    """
    if logits.ndim != 3 or logits.shape[:-1] != x_1.shape:
        raise ConfigError(
            "logits must have shape (B, N, V) and x_1 (B, N), "
            f"got {tuple(logits.shape)} and {tuple(x_1.shape)}"
        )
    if mask is None:
        token_loss = _cross_entropy(logits, x_1)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == x_1).float().mean()
        return PosteriorLoss(token_loss.mean(), accuracy, token_loss.detach())
    if mask.shape != x_1.shape or mask.dtype != torch.bool:
        raise ConfigError(
            f"mask must be bool of the shape of x_1, {tuple(x_1.shape)}, "
            f"got {mask.dtype}, {tuple(mask.shape)}"
        )
    token_loss = _cross_entropy(logits, x_1.masked_fill(~mask, _IGNORED))
    count = mask.sum().clamp_min(1)
    with torch.no_grad():
        accuracy = ((logits.argmax(-1) == x_1) & mask).sum() / count
    return PosteriorLoss(token_loss.sum() / count, accuracy, token_loss.detach())


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return nats of each token, shape (B, N), float32; 0 for an ignored one."""
    flat = logits.float().flatten(0, 1)
    loss = functional.cross_entropy(flat, target.flatten(), reduction="none", ignore_index=_IGNORED)
    return loss.view_as(target)
