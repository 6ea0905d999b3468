"""Token ids: random draws, and the checks of what comes in.

Dimensions: V = number of weights or codes. A draw has exactly one source of randomness: uniform
numbers, one a token, or a generator. Nothing here keeps a generator for a later call.

References:
    docs/math.md, "The draw, a part at a time".
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ursa.errors import ConfigError, DataError

_BLOCK = 256


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index a row in proportion to weights, by inverting the distribution function.

    In two levels, blocks of 256 and then the weights of one block: running sums over 64,000 codes
    are slow and lose digits. A weight of zero is never drawn.

    Args:
        weights: Not negative, not all zero, shape (..., V), float32 or float64.
        uniform: Random numbers in [0, 1), shape (...), float32 or float64.

    Returns:
        Indices in [0, V), shape (...), int64.
    """
    uniform = uniform.to(weights.dtype)
    size = weights.shape[-1]
    if size <= _BLOCK:
        sums = weights.cumsum(-1)
        return _first_above(sums, uniform.unsqueeze(-1) * sums[..., -1:]).squeeze(-1)
    whole = size // _BLOCK * _BLOCK
    # a product with ones: a sum over 256 is four times as slow
    ones = torch.ones(_BLOCK, dtype=weights.dtype, device=weights.device)
    with in_full_precision(weights.device):
        blocks = weights[..., :whole].unflatten(-1, (-1, _BLOCK)) @ ones
    if whole < size:
        blocks = torch.cat([blocks, weights[..., whole:].sum(-1, keepdim=True)], dim=-1)
    sums = blocks.cumsum(-1)
    target = uniform.unsqueeze(-1) * sums[..., -1:]
    block = _first_above(sums, target)
    # rounding can leave less than nothing, which would draw a first weight of zero
    target = (target - (sums - blocks).gather(-1, block)).clamp_(min=0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = weights.gather(-1, columns.clamp_max(size - 1)).masked_fill_(columns >= size, 0)
    index = block * _BLOCK + _first_above(inside.cumsum(-1), target)
    return index.squeeze(-1)


def in_full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast: distances and rates in half precision are off by 0.1."""
    return torch.autocast(device.type, enabled=False)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Return the first place of each row whose running sum exceeds the target, shape (..., 1).

    A target at or above the last sum, which rounding can make, counts as just below it.
    """
    below = torch.nextafter(sums[..., -1:], sums.new_zeros(()))
    return torch.searchsorted(sums, torch.minimum(target, below).contiguous(), right=True)


def draw_multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index a row as the official code does: `torch.multinomial` over flattened rows.

    For reproducing its seeds; `draw` has the same law and needs one number a row instead of V.

    Args:
        weights: Not negative, no row all zero, shape (..., V), any float type.
        generator: On the device of weights; it moves on.

    Returns:
        Indices in [0, V), shape (...), int64.
    """
    rows = weights.reshape(-1, weights.shape[-1])
    return torch.multinomial(rows, 1, generator=generator).view(weights.shape[:-1])


def hashed_numbers(seeds: Tensor) -> Iterator[Tensor]:
    """Yield uniform numbers in [0, 1) without end, a sequence of its own for each seed.

    For draws that take a number of tries nobody knows: a token's sequence depends on its seed
    alone, so its neighbours, and how tokens are taken together, change nothing. The numbers are a
    counter's, mixed by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

    Args:
        seeds: Uniform numbers in [0, 1), shape (...), float64: all 53 bits count. float32 has only
            2**24 values, each with one sequence.

    Yields:
        Numbers in [0, 1), shape (...), float64, multiples of 2**-53.
    """
    state = (seeds.double() * 2.0**53).long()
    while True:
        state = state + _as_int64(0x9E3779B97F4A7C15)
        mixed = state ^ _shift_right(state, 30)
        mixed = mixed * _as_int64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ _shift_right(mixed, 27)) * _as_int64(0x94D049BB133111EB)
        mixed = mixed ^ _shift_right(mixed, 31)
        yield _shift_right(mixed, 11).double() * 2.0**-53


def _as_int64(value: int) -> int:
    """Return the signed number of the same 64 bits: products of int64 wrap around."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left, where >> of a signed number repeats the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def uniform_codes(
    shape: Sequence[int],
    codebook_size: int,
    *,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Draw ids uniformly over the codes.

    Args:
        shape: Shape of the result.
        codebook_size: Number of codes V, >= 1.
        generator: Draws integers, on its own device: the start of the official sampler.
        uniform: Random numbers in [0, 1), of the shape; give exactly one of the two.

    Returns:
        Ids in [0, V), int64, on the device of the source.

    Raises:
        ConfigError: If not exactly one source is given, or its shape differs.
    """
    if uniform is None and generator is not None:
        return torch.randint(
            codebook_size, torch.Size(shape), generator=generator, device=generator.device
        )
    numbers = uniform_numbers(shape, generator=generator, uniform=uniform)
    return (numbers * codebook_size).long().clamp_max(codebook_size - 1)


def uniform_numbers(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None,
    uniform: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return uniform numbers in [0, 1) from the one source that is given.

    Args:
        shape: Shape of the tokens: one number each.
        generator: Drawn from on its own device, so that a CPU seed means the same everywhere.
        uniform: The numbers themselves, of that shape.
        dtype: Type of the numbers of the generator.

    Returns:
        Numbers, of the shape, of that type or that of uniform, on the device of the source.

    Raises:
        ConfigError: If not exactly one source is given, or the shape differs.
    """
    if generator is not None and uniform is None:
        return torch.rand(
            torch.Size(shape), generator=generator, dtype=dtype, device=generator.device
        )
    if uniform is None or generator is not None:
        given = "neither" if uniform is None else "both"
        raise ConfigError(f"give exactly one of generator= and uniform=, got {given}")
    if uniform.shape != torch.Size(shape):
        raise ConfigError(
            f"uniform must hold one number a token, shape {tuple(shape)}, "
            f"got {tuple(uniform.shape)}"
        )
    return uniform


def check_ids(name: str, ids: Tensor, num_states: int) -> Tensor:
    """Return ids of any shape as int64; `name` is what an error calls them.

    Raises:
        ConfigError: If ids are not integers.
        DataError: If an id is not in [0, num_states).
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name} must hold integer token ids, got {ids.dtype}")
    if ids.numel():
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= num_states:
            raise DataError(
                f"{name} must be ids in [0, {num_states}), got {low} to {high}; are they of "
                "another tokenizer, or ids of the model's vocabulary (then subtract the text's)?"
            )
    return ids.long()


def check_like(name: str, ids: Tensor, x_1: Tensor, num_states: int) -> Tensor:
    """Return ids as int64, of the shape of x_1; `name` is what an error calls them.

    Raises:
        ConfigError: If the shapes differ or ids are not integers.
        DataError: If an id is not in [0, num_states).
    """
    if ids.shape != x_1.shape:
        raise ConfigError(
            f"{name} must have the shape of x_1, {tuple(x_1.shape)}, got {tuple(ids.shape)}"
        )
    return check_ids(name, ids, num_states)
