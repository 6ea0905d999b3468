"""One Euler step of the jump process, classifier-free guidance, and draws from the posterior.

Dimensions: B = batch, N = tokens, V = codebook size, S = states of a token (V, or V + 1 with a
mask). Nothing here changes the caller's tensors or keeps a generator for a later call.

References:
    URSA, arXiv 2510.24717, section 3.1, algorithm 2; guidance: arXiv 2207.12598; nucleus sampling:
    arXiv 1904.09751. `exact_step`, `in_beta` and `draw_from_head` are ours: docs/math.md, "Exact
    step", "Jump as thinned noising", "Folded guidance".
"""

import torch
from torch import Tensor

from ursa.diffusion.codebook import Numbers
from ursa.diffusion.draws import check_like, draw, draw_multinomial
from ursa.diffusion.path import ProbabilityPath
from ursa.diffusion.timesteps import align_time, expand_time
from ursa.errors import ConfigError

_PART_ELEMENTS = 2**23
_GPU_PART_ELEMENTS = 2**25
"""Logits that are held at once, 32 MB in float32: 131 tokens of 64,000 codes."""
_LEAST_EXPONENT = -80.0
"""exp of less is a denormal number, ten times as slow on a CPU; exp(-80) is nothing beside 1."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return z_u + scale * (z_c - z_u), any float type, of one shape; scale 1 is no guidance.

    Of logits, shape (B, N, V), or of the hidden states that a linear head reads, shape (B, N, D).
    """
    # one tensor beside the two: they are the largest of a step
    return (conditional - unconditional).mul_(scale).add_(unconditional)


def euler_step(
    path: ProbabilityPath,
    x_t: Tensor,
    x_1: Tensor,
    *,
    t: float | Tensor,
    t_next: float | Tensor,
    uniforms: Tensor,
    in_beta: bool = False,
) -> Tensor:
    """Move every token once: jump with probability 1 - exp(-rate dt), else stay.

    Args:
        path: The probability path.
        x_t: Current token ids, shape (...), int64.
        x_1: Clean token ids drawn from the posterior, shape (...), int64.
        t: Start of the step in [0, 1), a number or a shape that `expand_time` takes. At t = 0 a
            metric path with a power schedule moves nothing unless in_beta: beta' is taken as 0
            there.
        t_next: End of the step in [t, 1], with in_beta in [t, 1), likewise; equal to t for a token
            that must not move.
        uniforms: Random numbers in [0, 1), shape (2, ...): whether to jump, and where to.
        in_beta: Count the path's own time, beta(t_next) - beta(t), instead of beta'(t) dt as the
            paper does: the rates of the start are then held over the step, but not beta' as well.

    Returns:
        Token ids at t_next, shape (...), int64.

    Raises:
        ConfigError: If t or t_next are out of range, ids no integers, or shapes do not fit.
        DataError: If an id is out of range.
    """
    if uniforms.shape != (2, *x_t.shape):
        raise ConfigError(
            f"uniforms must hold two numbers a token, shape {(2, *x_t.shape)}, "
            f"got {tuple(uniforms.shape)}"
        )
    uniforms = uniforms.to(x_t.device)
    jumps = uniforms[0] < jump_threshold(path, x_t, x_1, t, t_next, in_beta=in_beta)
    moved = x_t.long().clone()
    start = expand_time(t, x_1).expand(x_1.shape)
    moved[jumps] = path.jump(x_t[jumps], x_1[jumps], start[jumps], uniforms[1][jumps])
    return moved


def exact_step(
    path: ProbabilityPath,
    x_t: Tensor,
    x_1: Tensor,
    *,
    t: float | Tensor,
    t_next: float | Tensor,
    numbers: Numbers,
) -> Tensor:
    """Move every token by the jump process of its x_1, exact for steps of any length.

    `euler_step` holds the rates of t over the whole step and errs by that; this is the process
    itself: given x_t ~ p_t(. | x_1) the result is distributed as p_{t_next}(. | x_1).

    Args:
        path: The probability path.
        x_t: Current token ids, shape (...), int64.
        x_1: Clean token ids drawn from the posterior, shape (...), int64.
        t: Start of the step in [0, 1), a number or a shape that `expand_time` takes.
        t_next: End of the step in [t, 1), likewise; equal to t for a token that must not move.
        numbers: Gives random numbers in [0, 1), shape (3, ...), float64 (a grid takes all their
            bits), as often as it is called.

    Returns:
        Token ids at t_next, shape (...), int64.

    Raises:
        ConfigError: If t or t_next are out of range, ids no integers, or shapes do not fit.
        DataError: If an id is out of range.
    """
    start, end = expand_time(t, x_1), expand_time(t_next, x_1)
    if not bool((end >= start).all()):
        raise ConfigError(
            f"t_next must be in [t, 1) (t_next = t holds a token), got {float(end.min())} to "
            f"{float(end.max())} for t from {float(start.min())}"
        )
    return path.exact_step(x_t, x_1, start, end, numbers)


def jump_threshold(
    path: ProbabilityPath,
    x_t: Tensor,
    x_1: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    in_beta: bool = False,
) -> Tensor:
    """Return the probability of a jump in a step: 1 - exp(-dt * sum_x u_t(x; x_t, x_1)).

    With in_beta it is 1 - exp(-`path.rate_over`).

    `euler_step` jumps where its first uniform number is below it, to x in proportion to
    `path.velocity`. Arguments and errors are those of `euler_step`.

    Returns:
        Probabilities in [0, 1], shape (...), in the type of the path.
    """
    if not in_beta:
        return _jump_probability(path.rate(x_t, x_1, t), x_1, t, t_next)
    _ordered(expand_time(t, x_1), expand_time(t_next, x_1))
    return -torch.expm1(-path.rate_over(x_t, x_1, t, t_next))


def draw_from_head(
    hidden: Tensor,
    weight: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    part_rows: int | None = None,
) -> Tensor:
    """Draw x_1 as `draw_posterior` does, from hidden states, without the logits of all tokens.

    The head is linear: guide the hidden states, then draw once, and one product serves both
    branches. A token's draw does not depend on how many are taken at once, but for rounding.

    Args:
        hidden: Last hidden states at the predicting places, shape (..., D), any float type.
        weight: Head W, shape (V, D), of the same type.
        uniform: Random numbers in [0, 1), shape (...), one a token.
        temperature: As in `draw_posterior`, like the two that follow.
        top_k: The k most likely codes.
        top_p: The fewest codes whose mass reaches p.
        part_rows: Tokens at once; None takes what fits into 32 MB, into 128 MB on a GPU.

    Returns:
        Token ids in [0, V), shape (...), int64.

    Raises:
        ConfigError: If an option or a shape is not as stated.
    """
    if weight.shape[1:] != hidden.shape[-1:]:
        raise ConfigError(
            "hidden must have shape (..., D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if uniform.shape != hidden.shape[:-1]:
        raise ConfigError(
            f"uniform must hold one number a token, shape {tuple(hidden.shape[:-1])}, "
            f"got {tuple(uniform.shape)}"
        )
    if part_rows is not None and part_rows < 1:
        raise ConfigError(f"part_rows must be at least 1, got {part_rows}")
    elements = _GPU_PART_ELEMENTS if hidden.is_cuda else _PART_ELEMENTS
    rows = part_rows or max(1, elements // len(weight))
    _check_options(temperature, top_k, top_p)
    states = hidden.detach().flatten(0, -2)
    numbers = uniform.flatten().to(hidden.device)
    drawn = torch.empty(len(states), dtype=torch.int64, device=hidden.device)
    # one buffer for all parts: small results between large ones would scatter the memory
    buffer = states.new_empty(min(rows, len(states)), len(weight))
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        logits = buffer[: len(states[part])]
        torch.mm(states[part], weight.detach().T, out=logits)
        drawn[part] = _draw_codes(logits, numbers[part], temperature, top_k, top_p)
    return drawn.view(uniform.shape)


def draw_posterior(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw x_1 from softmax(logits / temperature), cut to its likely codes if asked.

    Without options this is the model's own law, the one that the jump process needs; the options
    trade variety for likelihood.

    Args:
        logits: Posterior logits, shape (..., V), any float type; computed in float32.
        uniform: Random numbers in [0, 1), shape (...), one a token.
        temperature: >= 0, finite; 1 is the model's law, 0 the most likely code (uniform is then not
            used).
        top_k: Keep the k most likely codes, >= 1; None or >= V keeps all.
        top_p: Then keep the fewest codes whose mass reaches p, in (0, 1]; None or 1 keeps all.

    Returns:
        Token ids in [0, V), shape (...), int64.

    Raises:
        ConfigError: If an option or the shape of uniform is not as stated.
    """
    if uniform.shape != logits.shape[:-1]:
        raise ConfigError(
            f"uniform must hold one number a token, shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(uniform.shape)}"
        )
    _check_options(temperature, top_k, top_p)
    own = logits.to(torch.float32, copy=True)
    return _draw_codes(own, uniform.to(logits.device), temperature, top_k, top_p)


def _draw_codes(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Draw as `draw_posterior` says, in place of float32 logits (..., V); options are checked."""
    if temperature == 0:
        return logits.argmax(-1)
    if logits.is_cuda and temperature == 1 and top_k is None and top_p is None:
        # one kernel, where what follows has five: there, the passes over memory are what takes time
        return draw(torch.softmax(logits, -1, dtype=torch.float32), uniform)
    logits = logits.float()
    # from the maximum down, so that a small temperature cannot make inf - inf
    logits -= logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits /= temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter_(-1, best.indices, best.values.exp())
    else:
        weights = logits.clamp_(min=_LEAST_EXPONENT).exp_()
    if top_p is not None and top_p < 1:
        ranked = weights.sort(dim=-1, descending=True, stable=True)
        # a code stays if those before it do not reach p yet: the first always does
        before = ranked.values.cumsum(-1) - ranked.values
        limit = top_p * weights.sum(-1, keepdim=True)
        kept = ranked.values.masked_fill(before >= limit, 0)
        weights = torch.zeros_like(weights).scatter_(-1, ranked.indices, kept)
    return draw(weights, uniform)


def official_step(
    path: ProbabilityPath,
    x_t: Tensor,
    logits: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    is_last: bool,
    generator: torch.Generator,
    x_1: Tensor | None = None,
) -> Tensor:
    """Draw x_1 and step, in the official order of draws: for reproducing its seeds.

    The official code draws a multinomial of softmax(logits) for x_1, then one uniform number a
    token, then a multinomial of the velocity of those tokens that jump; in the last step only the
    first. The same seed gives the same tokens on a CPU for float32 logits, up to draws that tie
    within rounding. `euler_step` has the same law, with numbers that belong to one token each.

    Args:
        path: `MetricPath` or `MixturePath`; the official code has no masked one.
        x_t: Current token ids, shape (...), int64.
        logits: Posterior logits, shape (..., V), any float type, guided already.
        t: Start of the step, a number or a shape that `expand_time` takes; not used in the last.
        t_next: End of the step, likewise.
        is_last: Whether this is the last step of the grid: its result is x_1.
        generator: On the device of logits; it moves on.
        x_1: Clean token ids if they are drawn already, shape (...); then logits are not read.

    Returns:
        Token ids at t_next, shape (...), int64.

    Raises:
        ConfigError: If t or t_next are out of range, ids no integers, or shapes do not fit.
        DataError: If an id is out of range.
    """
    if x_1 is None:
        x_1 = draw_multinomial(torch.softmax(logits, dim=-1), generator)
    if is_last:
        return check_like("x_1", x_1, x_t, path.codebook_size)
    velocity = path.velocity(x_t, x_1, t)
    probability = _jump_probability(velocity.sum(-1), x_1, t, t_next)
    uniform = torch.rand(
        x_t.shape, generator=generator, dtype=velocity.dtype, device=velocity.device
    )
    jumps = uniform < probability
    moved = x_t.long().clone()
    moved[jumps] = draw_multinomial(velocity[jumps], generator)
    return moved


def _jump_probability(
    rate: Tensor, x_1: Tensor, t: float | Tensor, t_next: float | Tensor
) -> Tensor:
    """Return 1 - exp(-rate * (t_next - t)), shape of rate."""
    start, end = expand_time(t, x_1), align_time("t_next", t_next, x_1)
    _ordered(start, end)
    return -torch.expm1(-rate * (end - start).to(rate.dtype))


def _ordered(start: Tensor, end: Tensor) -> None:
    if not bool(((end >= start) & (end <= 1)).all()):
        raise ConfigError(
            "t_next must be in [t, 1] (t_next = t holds a token), got "
            f"{float(end.min())} to {float(end.max())} for t from {float(start.min())}"
        )


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be >= 0 (1 is the model's law), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1 (None keeps all), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1] (None keeps all), got {top_p}")
