"""The FSQ grid without normalisation: a path that moves every coordinate on its own.

The squared distance of un-normalised codes is a sum over axes, so p_b(x | x_1) is a product of one
law an axis. With the jump process of each axis at work beside the others, a code costs as many
numbers as it has levels, 39 for the published grid instead of 64,000. It is ANOTHER path than the
paper's, with other betas and smaller jumps: a model is trained for one or the other.

Dimensions: V = codes, C = axes, ... = any shape of tokens.

Ours; docs/math.md derives it.
"""

import copy
import math
from typing import Self

import torch
from torch import Tensor

from ursa.diffusion.codebook import DenseCodebook, Moments, Numbers, weighted_share
from ursa.diffusion.draws import check_ids, check_like, draw, hashed_numbers
from ursa.errors import ConfigError


class ProductCodebook:
    """The un-normalised grid of an FSQ tokenizer. Same interface as `DenseCodebook`.

    Distances are those of codes in [-1, 1], up to 4 an axis. Rates and jumps are those of
    single coordinates: a jump changes one.
    """

    has_fast_moments = True

    def __init__(self, levels: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """Make one small codebook an axis.

        Args:
            levels: FSQ levels of each axis, each >= 2.
            dtype: As in `DenseCodebook`.

        Raises:
            ConfigError: If levels or dtype are not as stated.
        """
        if not levels or min(levels) < 2:
            raise ConfigError(f"FSQ levels must be at least 2 each, got {levels}")
        self.levels = tuple(levels)
        self._axes = [
            DenseCodebook(
                (torch.arange(level)[:, None] - level // 2) / (level // 2), dtype, normalize=False
            )
            for level in levels
        ]
        self._basis = [math.prod(levels[:axis]) for axis in range(len(levels))]
        self.dtype = dtype

    def __len__(self) -> int:
        return math.prod(self.levels)

    @property
    def codes(self) -> Tensor:
        """The codes, shape (V, C), in [-1, 1]."""
        ids = torch.arange(len(self), device=self._axes[0].codes.device)
        parts = [
            axis.codes[digit] for axis, digit in zip(self._axes, self._split(ids), strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def to(self, device: torch.device | str) -> Self:
        """Return the same codebook, bit for bit, on a device."""
        moved = copy.copy(self)
        moved._axes = [axis.to(device) for axis in self._axes]
        return moved

    def distance(self, ids: Tensor) -> Tensor:
        """Return the squared distance of every code to each token, shape (..., V), in [0, 4 C].

        See `DenseCodebook.distance`.
        """
        digits = self._split(check_ids("x_1", ids, len(self)))
        total = torch.zeros(*ids.shape, 1, dtype=self.dtype, device=ids.device)
        for axis, digit in zip(self._axes, digits, strict=True):
            # the first axis is the fastest of an id
            total = (axis.distance(digit).unsqueeze(-1) + total.unsqueeze(-2)).flatten(-2)
        return total

    def noise(self, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw x ~ p_b(x | x_1). See `DenseCodebook.noise`; give float64 numbers.

        One number serves all axes: what is left of it within the level drawn is uniform again.
        """
        digits = self._split(check_ids("x_1", x_1, len(self)))
        number = uniform.to(x_1.device).expand(x_1.shape).double()
        beta = beta.to(x_1.device).expand(x_1.shape).to(self.dtype).unsqueeze(-1)
        drawn = []
        for axis, digit in zip(self._axes, digits, strict=True):
            weights = torch.exp(-beta * axis.distance(digit)).double()
            level = draw(weights, number)
            sums = weights.cumsum(-1)
            weight, above = (each.gather(-1, level[..., None])[..., 0] for each in (weights, sums))
            number = ((number * sums[..., -1] - (above - weight)) / weight).clamp(0, 1 - 2.0**-53)
            drawn.append(level)
        return self._join(drawn)

    def flow(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> Tensor:
        """Return the rate of jumping from x_t to every code a unit of beta, shape (..., V).

        0 on codes that differ in more than one axis. See `DenseCodebook.flow`.
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        result = torch.zeros(*x_1.shape, len(self), dtype=self.dtype, device=x_1.device)
        digits = zip(self._axes, self._basis, self._split(x_t), self._split(x_1), strict=True)
        for axis, basis, here, clean in digits:
            for level in range(len(axis)):
                target = x_t + (level - here) * basis
                rate = axis.flow(here, clean, beta)[..., level]
                result.scatter_add_(-1, target.unsqueeze(-1), rate.unsqueeze(-1))
        return result

    def rate(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> Tensor:
        """Return the rate of leaving x_t per unit of beta: the sum over the axes, shape (...).

        In [0, 4 C]. See `DenseCodebook.rate`.
        """
        return torch.stack(self._rates(x_t, x_1, beta)).sum(0)

    def jump(self, x_t: Tensor, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw where a jump goes: an axis in proportion to its rate, then a level of it.

        One number serves both: give float64. See `DenseCodebook.jump`.
        """
        rates = torch.stack(self._rates(x_t, x_1, beta), dim=-1).double()
        number = uniform.to(x_1.device).expand(x_1.shape).double()
        moves = rates.sum(-1) > 0
        safe = torch.where(moves.unsqueeze(-1), rates, torch.ones_like(rates))
        chosen = draw(safe, number)
        sums = safe.cumsum(-1)
        rate, above = (each.gather(-1, chosen[..., None])[..., 0] for each in (safe, sums))
        number = ((number * sums[..., -1] - (above - rate)) / rate).clamp(0, 1 - 2.0**-53)
        digits = self._split(x_t.long())
        targets = zip(self._axes, digits, self._split(x_1.long()), strict=True)
        jumped = [axis.jump(here, clean, beta, number) for axis, here, clean in targets]
        pairs = enumerate(zip(digits, jumped, strict=True))
        return self._join(
            [torch.where(moves & (chosen == axis), there, here) for axis, (here, there) in pairs]
        )

    def exact_step(
        self, x_t: Tensor, x_1: Tensor, beta: Tensor, beta_next: Tensor, numbers: Numbers
    ) -> Tensor:
        """Run the jump process from beta to beta_next. See `DenseCodebook.exact_step`.

        The axes do not wait for each other, so each runs alone, with numbers of its own: how often
        it asks must not move those of the next. Of `numbers` it takes the first of three, as seeds:
        give float64.
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        triples = zip(self._axes, self._split(x_t), self._split(x_1), strict=True)
        return self._join(
            [
                axis.exact_step(here, clean, beta, beta_next, _numbers(numbers()[0]))
                for axis, here, clean in triples
            ]
        )

    def moments(
        self, beta: Tensor, weights: Tensor | None = None, *, euclidean: bool = False
    ) -> Moments:
        """Return the mean distance and its fall by beta. See `DenseCodebook.moments`.

        Raises:
            ConfigError: If euclidean is asked for, which is no sum over axes, or the weights are
                not as `DenseCodebook.moments` says.
        """
        if euclidean:
            raise ConfigError(
                "the product path has squared distances alone; use the normalised grid for "
                "the Euclidean one"
            )
        share = weighted_share(weights, len(self))
        ids = torch.arange(len(self))
        parts = [
            axis.moments(beta, torch.bincount(digit, share, minlength=len(axis)))
            for axis, digit in zip(self._axes, self._split(ids), strict=True)
        ]
        means, falls = zip(*parts, strict=True)
        return Moments(torch.stack(means).sum(0), torch.stack(falls).sum(0))

    def collisions(self) -> int:
        """Return 0: no two codes of the grid are the same."""
        return 0

    def _rates(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> list[Tensor]:
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        triples = zip(self._axes, self._split(x_t), self._split(x_1), strict=True)
        return [axis.rate(here, clean, beta) for axis, here, clean in triples]

    def _split(self, ids: Tensor) -> list[Tensor]:
        pairs = zip(self._basis, self.levels, strict=True)
        return [(ids // basis) % level for basis, level in pairs]

    def _join(self, digits: list[Tensor]) -> Tensor:
        return torch.stack(
            [digit * basis for digit, basis in zip(digits, self._basis, strict=True)]
        ).sum(0)


def _numbers(seeds: Tensor) -> Numbers:
    """Return a source of three numbers a token, shape (3, ...), from one seed a token."""
    sequence = hashed_numbers(seeds)
    return lambda: torch.stack([next(sequence) for _ in range(3)])
