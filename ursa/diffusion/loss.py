"""Cross-entropy of the posterior p(x_1 | x_t) and its accuracy.

`posterior_loss` is the readable reference; `linear_posterior_loss` is what training uses: the same
numbers from hidden states, without the logits of all tokens at once.

Dimensions: B = batch, N = visual tokens, V = codebook size, D = hidden size, R = rows of a part.

References:
    URSA, arXiv 2510.24717, section 3.1. Gradients made on the way forward, a part at a time: Liger
    Kernel, arXiv 2410.10989; docs/math.md, "loss without logits".
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ursa.errors import ConfigError

PART_ELEMENTS = 2**24
"""Logits that are held at once, 64 MB in float32: 262 tokens of 64,000 codes.

With half of them the products take a quarter longer on a CPU.
"""
GPU_PART_ELEMENTS = 2**25
"""On a GPU: with bfloat16 states 8 bytes each, 268 MB."""
_LEAST_EXPONENT = -80.0
"""exp of less is a denormal number, ten times as slow on a CPU; exp(-80) is nothing beside 1."""
_IGNORED = -100
"""Target of tokens without a label, as torch and the official labels write it."""


class PosteriorLoss(NamedTuple):
    """Mean loss in nats and accuracy over the tokens that count, and the loss of each token.

    Attributes:
        loss: Mean, nats, scalar, float32.
        accuracy: In [0, 1], scalar, float32; no gradient.
        token_loss: Nats, shape (B, N), float32, 0 where a token does not count; no gradient.
        token_right: Whether the likeliest code is the clean one, shape (B, N), bool, False where a
            token does not count.
    """

    loss: Tensor
    accuracy: Tensor
    token_loss: Tensor
    token_right: Tensor


def posterior_loss(logits: Tensor, x_1: Tensor, mask: Tensor | None = None) -> PosteriorLoss:
    """Compare posterior logits with the clean tokens.

    Args:
        logits: Posterior logits, shape (B, N, V), any float type; computed in float32.
        x_1: Clean token ids in [0, V), shape (B, N), int64; any number where the mask is False.
        mask: Which tokens count (True), shape (B, N), bool; None counts all. Of official labels it
            is `labels >= 0`.

    Returns:
        Mean loss (scalar, nats, float32) and accuracy in [0, 1] over the tokens that count, and
        losses and hits of tokens, shape (B, N), 0 and False where they do not. If no token counts,
        loss and accuracy are 0 and so is the gradient: such a batch teaches nothing, instead of NaN
        to all weights.

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
        size = max(1, x_1.numel())
        right = logits.argmax(-1) == x_1
        return PosteriorLoss(
            token_loss.sum() / size, right.sum() / size, token_loss.detach(), right
        )
    if mask.shape != x_1.shape or mask.dtype != torch.bool:
        raise ConfigError(
            f"mask must be bool of the shape of x_1, {tuple(x_1.shape)}, "
            f"got {mask.dtype}, {tuple(mask.shape)}"
        )
    token_loss = _cross_entropy(logits, x_1.masked_fill(~mask, _IGNORED))
    count = mask.sum().clamp_min(1)
    right = (logits.argmax(-1) == x_1) & mask
    return PosteriorLoss(token_loss.sum() / count, right.sum() / count, token_loss.detach(), right)


def linear_posterior_loss(
    hidden: Tensor,
    weight: Tensor,
    x_1: Tensor,
    mask: Tensor | None = None,
    *,
    part_rows: int | None = None,
) -> PosteriorLoss:
    """Compare the posterior of hidden states with the clean tokens: `posterior_loss` of W h.

    The logits of R tokens are made, turned into their own gradient and dropped, so memory grows
    with R V instead of N V; tokens that do not count are dropped before the head. The gradients are
    made on the way forward (three products in all, as in the plain way), and the loss is float32
    also for bfloat16 states.

    torch's `linear_cross_entropy` does the same, but returns the loss itself in bfloat16, and its
    parts are slow on a CPU.

    Args:
        hidden: Last hidden states at the predicting places, shape (B, N, D), any float type.
        weight: Head W, shape (V, D), any float type, same device.
        x_1: Clean token ids in [0, V), shape (B, N), int64; any number where the mask is False.
        mask: Which tokens count (True), shape (B, N), bool; None counts all.
        part_rows: R; None takes what fits into 64 MB, into 268 MB on a GPU.

    Returns:
        As `posterior_loss`. The loss can be differentiated once; a second backward raises
        RuntimeError.

    Raises:
        ConfigError: If shapes do not fit, the mask is not bool or part_rows is not positive.
    """
    if hidden.ndim != 3 or hidden.shape[:-1] != x_1.shape or weight.shape[1:] != hidden.shape[2:]:
        raise ConfigError(
            "hidden must have shape (B, N, D), weight (V, D) and x_1 (B, N), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(x_1.shape)}"
        )
    if mask is not None and (mask.shape != x_1.shape or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask must be bool of the shape of x_1, {tuple(x_1.shape)}, "
            f"got {mask.dtype}, {tuple(mask.shape)}"
        )
    if part_rows is not None and part_rows < 1:
        raise ConfigError(f"part_rows must be at least 1, got {part_rows}")
    elements = GPU_PART_ELEMENTS if hidden.is_cuda else PART_ELEMENTS
    rows = part_rows or max(1, elements // len(weight))
    counted = torch.ones_like(x_1, dtype=torch.bool) if mask is None else mask
    states = hidden.flatten(0, 1) if mask is None else hidden[mask]
    apply: Any = _LinearCrossEntropy.apply  # untyped in torch
    loss, losses, right = apply(states, weight, x_1[counted], rows)
    token_loss = torch.zeros(x_1.shape, device=hidden.device)
    token_loss[counted] = losses
    token_right = torch.zeros_like(counted)
    token_right[counted] = right
    return PosteriorLoss(loss, right.sum() / max(1, len(right)), token_loss, token_right)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(h W^T), shape (N, D) and (V, D), N may be 0."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, part_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean, the loss and whether the likeliest code is right of each token."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(len(hidden), device=hidden.device)
        right = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        head = weight.to(hidden.dtype)
        # one buffer for all parts: a new one would be made while the last is still held
        buffer = hidden.new_empty(min(part_rows, len(hidden)), len(head))
        for start in range(0, len(hidden), part_rows):
            part = slice(start, start + part_rows)
            logits = torch.mm(hidden[part], head.T, out=buffer[: len(hidden[part])]).float()
            ids = target[part].unsqueeze(-1)
            greatest, likeliest = logits.max(-1, keepdim=True)
            right[part] = (likeliest == ids).squeeze(-1)
            logits -= greatest
            wanted = logits.gather(-1, ids)
            exponentials = logits.clamp_(min=_LEAST_EXPONENT).exp_()
            total = exponentials.sum(-1, keepdim=True)
            losses[part] = (total.log() - wanted).squeeze(-1)
            if not (needs_hidden or needs_weight):
                continue
            # of the mean: (softmax - one-hot) / N, in the place of the logits
            gradient = exponentials.div_(total * len(hidden))
            gradient.scatter_add_(-1, ids, torch.full_like(total, -1 / len(hidden)))
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, gradient.T, hidden[part])
        ctx.gradients = grad_hidden, grad_weight
        ctx.mark_non_differentiable(losses, right)
        return losses.sum() / max(1, len(losses)), losses, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what the way forward has made."""
        if ctx.gradients is None:
            raise RuntimeError("the loss can be differentiated once; compute it again")
        hidden, weight = (
            None if gradient is None else gradient.mul_(grad_outputs[0].to(gradient.dtype))
            for gradient in ctx.gradients
        )
        ctx.gradients = None
        return hidden, weight, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right; factors of half precision are multiplied and summed in that of the total.

    A GPU does so without copies of the factors, an order of magnitude faster than with them.
    """
    if left.is_cuda and left.dtype != total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return nats of each token, shape (B, N), float32; 0 for an ignored one."""
    flat = logits.float().flatten(0, 1)
    loss = functional.cross_entropy(flat, target.flatten(), reduction="none", ignore_index=_IGNORED)
    return loss.view_as(target)
