"""What the metric path asks of a codebook, in memory that does not grow with tokens times codes.

Everything is in terms of beta, the path's own time: p_b(x | x_1) = exp(-b d(x, x_1)) / Z with d the
squared distance of normalised codes. Tokens are taken in parts of R, so that no tensor of tokens
times codes is larger than R V; only `distance`, `flow` and `law`, the formulas as they stand, make
(..., V). `ursa.diffusion.path.MetricPath` has the readable formulas, over all tokens at once.

Dimensions: V = codes, D = code dimension, R = tokens of a part, ... = any shape of tokens.

References:
    Metric-induced paths: arXiv 2412.03487, section 4. Exact steps and drawing in parts:
    docs/math.md, "Exact step", "The draw, a part at a time".
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ursa.diffusion.draws import check_ids, check_like, draw, in_full_precision
from ursa.errors import ConfigError

NORM_FLOOR = 1e-5
"""Codes are divided by max(|e|, NORM_FLOOR), so that the zero code stays zero."""
_PART_ELEMENTS = 2**19
"""Elements R V of a part: 2 MB in float32, which stays in a processor's cache."""
_LEAST_EXPONENT = -80.0
"""exp of less is a denormal number, ten times as slow on a CPU; exp(-80) is nothing beside 1."""
_LARGE_BETA = 20.0
"""Above it exponents can be less, as distances reach 4."""
SAME_DISTANCE = 1e-10
"""Squared distances below it count as 0: codes on one ray differ by rounding."""
Numbers = Callable[[], Tensor]
"""Gives numbers in [0, 1), shape (3, ...), float64, one call after another."""


class Moments(NamedTuple):
    """The mean distance under p_b(x | x_1), averaged over x_1, and how fast it falls with beta.

    Attributes:
        mean: E[f(d)] with f(d) = d, or sqrt(d) for the Euclidean distance, shape (M,), float64, on
            the CPU.
        fall: -d mean / d beta = E_{x_1} Cov(f(d), d): for f(d) = d the mean variance; likewise.
    """

    mean: Tensor
    fall: Tensor


class DenseCodebook:
    """Any codebook: every code is compared with every token, part by part.

    Attributes:
        codes: Normalised unless told otherwise, shape (V, D), in `dtype`.
    """

    has_fast_moments = False
    """Whether `moments` costs less than a look at every pair of codes."""

    def __init__(
        self, codes: Tensor, dtype: torch.dtype = torch.float32, *, normalize: bool = True
    ) -> None:
        """Normalise the codes.

        Args:
            codes: Embeddings, shape (V, D), V >= 1, any float type, finite.
            dtype: In what to compute: float32, or float64 for checks; never half, whose distances
                are off by 0.1 late in the path.
            normalize: Divide every code by its length, as the paper does; else take it as it is.

        Raises:
            ConfigError: If codes or dtype are not as stated.
        """
        if codes.ndim != 2:
            raise ConfigError(f"codebook must have shape (V, D), got {tuple(codes.shape)}")
        if not len(codes):
            raise ConfigError("codebook_size must be at least 1, got 0")
        if dtype not in {torch.float32, torch.float64}:
            raise ConfigError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if not bool(torch.isfinite(codes).all()):
            raise ConfigError("codebook must be finite, got NaN or infinite entries")
        self.codes = normalize_codebook(codes, dtype) if normalize else codes.to(dtype)
        # |x|^2 + |y|^2 - 2 x y as one product: (-2x, |x|^2, 1) (y, 1, |y|^2)
        square, one = self.codes.square().sum(-1, keepdim=True), torch.ones(len(codes), 1).to(codes)
        self._left = torch.cat([-2 * self.codes, square, one.to(dtype)], dim=-1)
        self._right = torch.cat([self.codes, one.to(dtype), square], dim=-1).T.contiguous()

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""
        return self.codes.dtype

    def to(self, device: torch.device | str) -> Self:
        """Return the same codebook, bit for bit, on a device."""
        moved = copy.copy(self)
        moved.codes = self.codes.to(device)
        moved._left, moved._right = self._left.to(device), self._right.to(device)
        return moved

    def distance(self, ids: Tensor) -> Tensor:
        """Return the squared distance of every code to each token.

        Args:
            ids: Token ids in [0, V), shape (...), int64.

        Returns:
            Distances, in [0, 4] if codes are normalised, shape (..., V), in `dtype`.

        Raises:
            ConfigError: If ids are not integers.
            DataError: If an id is not in [0, V).
        """
        return self._distance(check_ids("x_1", ids, len(self)))

    def noise(self, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw x ~ p_b(x | x_1).

        Args:
            x_1: Token ids, shape (...), int64.
            beta: Inverse temperatures >= 0, of a shape that expands to that of x_1.
            uniform: Random numbers in [0, 1), shape (...), float32 or float64.

        Returns:
            Token ids, shape (...), int64.

        Raises:
            ConfigError: If ids are not integers.
            DataError: If an id is not in [0, V).
        """
        x_1 = check_ids("x_1", x_1, len(self))
        result = torch.empty_like(x_1, memory_format=torch.contiguous_format)
        for ids, b, u, out in self._parts(x_1, beta, uniform, result):
            out.copy_(draw(self._weights(ids, b), u))
        return result

    def flow(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> Tensor:
        """Return the rate of jumping from x_t to every code a unit of beta: the plain formula.

        u(x) = p_b(x | x_1) relu(d(x_t, x_1) - d(x, x_1)), 0 on x_t. `rate` is its sum and `jump`
        a draw in proportion to it, without a tensor of this shape for all tokens.

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Clean token ids, shape (...), int64.
            beta: Inverse temperatures >= 0, of a shape that expands to that of x_1.

        Returns:
            Rates, in [0, 4] if codes are normalised, shape (..., V), in `dtype`.

        Raises:
            ConfigError: If the shapes differ or ids are not integers.
            DataError: If an id is not in [0, V).
        """
        x_t = check_like("x_t", x_t, x_1, len(self))
        distance = self.distance(x_1)
        current = distance.gather(-1, x_t.unsqueeze(-1))
        probs = law(distance, beta)
        return (probs * torch.relu(current - distance)).scatter(-1, x_t.unsqueeze(-1), 0.0)

    def rate(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> Tensor:
        """Return the rate of leaving x_t per unit of beta: E_p[relu(d(x_t, x_1) - d(x, x_1))].

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Clean token ids, shape (...), int64.
            beta: Inverse temperatures >= 0, of a shape that expands to that of x_1.

        Returns:
            Rates, in [0, 4] if codes are normalised, shape (...), in `dtype`.

        Raises:
            ConfigError: If the shapes differ or ids are not integers.
            DataError: If an id is not in [0, V).
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        result = torch.empty(x_1.shape, dtype=self.codes.dtype, device=x_1.device)
        for here, ids, b, out in self._parts(x_t, x_1, beta, result):
            flow, weights = self._flow(here, ids, b)
            out.copy_(flow.sum(-1) / weights.sum(-1))
        return result

    def jump(self, x_t: Tensor, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw where a jump goes: x in proportion to p_b(x | x_1) relu(d(x_t, x_1) - d(x, x_1)).

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Clean token ids, shape (...), int64.
            beta: Inverse temperatures >= 0, of a shape that expands to that of x_1.
            uniform: Random numbers in [0, 1), shape (...), float32 or float64.

        Returns:
            Token ids, shape (...), int64; x_t where no code is closer to x_1.

        Raises:
            ConfigError: If the shapes differ or ids are not integers.
            DataError: If an id is not in [0, V).
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        result = torch.empty_like(x_1, memory_format=torch.contiguous_format)
        for here, ids, b, u, out in self._parts(x_t, x_1, beta, uniform, result):
            flow, _ = self._flow(here, ids, b)
            # a row without flow is defined by a single weight, where the token is
            none = (flow.sum(-1, keepdim=True) == 0).to(flow.dtype)
            flow.scatter_add_(-1, here.unsqueeze(-1), none)
            out.copy_(draw(flow, u))
        return result

    def exact_step(
        self, x_t: Tensor, x_1: Tensor, beta: Tensor, beta_next: Tensor, numbers: Numbers
    ) -> Tensor:
        """Run the jump process of one x_1 from beta to beta_next, without an error of time.

        It carries p_b(. | x_1) to p_b'(. | x_1) however far b' is. The rates need no sums over the
        codes: propose x ~ p_b(. | x_1) after waits of Exp(1) / d(x_t, x_1) in beta, accept with
        probability relu(1 - d(x, x_1) / d(x_t, x_1)). Ours; docs/math.md, "Exact step".

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Clean token ids, shape (...), int64.
            beta: Inverse temperatures >= 0 at the start, of a shape that expands to that of x_1.
            beta_next: At the end, likewise, finite; a token stays where it is not more than beta.
            numbers: Gives random numbers in [0, 1), shape (3, ...), float64 (a grid takes all
                their bits), as often as it is called.

        Returns:
            Token ids, shape (...), int64.

        Raises:
            ConfigError: If the shapes differ or ids are not integers.
            DataError: If an id is not in [0, V).
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x = check_like("x_t", x_t, x_1, len(self)).clone()
        now, end = (each.to(x.device).expand(x.shape).clone() for each in (beta, beta_next))
        distance = self._between(x, x_1).to(now.dtype)
        moves = (distance > 0) & (now < end)
        while bool(moves.any()):
            wait, choice, accept = numbers().to(x.device)
            # a token at distance 0 waits for ever
            now = torch.where(moves, now - torch.log1p(-wait.to(now)) / distance, now)
            moves &= now < end
            clean = x_1[moves]
            proposed = self.noise(clean, now[moves], choice[moves])
            far = self._between(proposed, clean).to(now.dtype)
            taken = accept[moves] < 1 - far / distance[moves]
            x[moves] = torch.where(taken, proposed, x[moves])
            distance[moves] = torch.where(taken, far, distance[moves])
            moves &= distance > 0
        return x

    def moments(
        self, beta: Tensor, weights: Tensor | None = None, *, euclidean: bool = False
    ) -> Moments:
        """Return the mean distance under p_b(x | x_1), averaged over x_1, and its fall by beta.

        Args:
            beta: Inverse temperatures >= 0, shape (M,).
            weights: How often each code is x_1, not negative, finite, shape (V,); None is
                uniformly.
            euclidean: Of the Euclidean distance sqrt(d) instead of d.

        Returns:
            Moments, shape (M,) each, float64.

        Raises:
            ConfigError: If the weights are not as stated, or all zero.
        """
        share = weighted_share(weights, len(self)).to(self.codes.device)
        ids = share.nonzero().squeeze(-1)
        totals = torch.zeros(2, len(beta), dtype=torch.float64)
        for rows, part in zip(self._split(ids), self._split(share[ids]), strict=True):
            distance = self._distance(rows)
            # what rounding leaves of a distance of 0 would count as its square root
            distance.masked_fill_(distance < self._nearest, 0)
            length = distance.sqrt() if euclidean else distance
            for place, b in enumerate(beta.tolist()):
                probs = torch.softmax(-b * distance, dim=-1)
                first = torch.linalg.vecdot(probs, length)
                product = probs * (length - first.unsqueeze(-1))
                second = torch.linalg.vecdot(product, distance)
                totals[0, place] += float(part @ first.double())
                totals[1, place] += float(part @ second.double())
        return Moments(totals[0], totals[1])

    def collisions(self) -> int:
        """Return how many codes are at distance 0 of another, where p_b never becomes a point."""
        ids = torch.arange(len(self), device=self.codes.device)
        parts = ((self._distance(rows) < self._nearest).sum(-1) > 1 for rows in self._split(ids))
        return int(sum(int(part.sum()) for part in parts))

    @property
    def _nearest(self) -> float:
        """Distances below it are rounding: |x|^2 + |y|^2 - 2 x y of equal codes is not quite 0."""
        return 1e-6 if self.codes.dtype == torch.float32 else SAME_DISTANCE

    def _distance(self, ids: Tensor) -> Tensor:
        with in_full_precision(self.codes.device):
            return (self._left[ids] @ self._right).clamp_(min=0)

    def _between(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared distance of codes x and y, shape (...); 0 where they are the same."""
        distance = (self.codes[x] - self.codes[y]).square().sum(-1)
        return torch.where(distance < SAME_DISTANCE, torch.zeros_like(distance), distance)

    def _weights(self, ids: Tensor, beta: Tensor) -> Tensor:
        """Return exp(-b d) of every code, shape (R, V), a row up to a factor."""
        scaled = self._left[ids].mul_(-beta.to(self._left.dtype).unsqueeze(-1))
        with in_full_precision(self.codes.device):
            return _exponential(scaled @ self._right, beta)

    def _flow(self, x_t: Tensor, ids: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return exp(-b d) relu(d(x_t) - d) and exp(-b d) of every code, shape (R, V) each.

        A row of both is up to one factor.
        """
        distance = self._distance(ids)
        flow = (distance.gather(-1, x_t.unsqueeze(-1)) - distance).clamp_(min=0)
        exponents = distance.mul_(-beta.to(distance.dtype).unsqueeze(-1))
        weights = _exponential(exponents, beta)
        return flow.mul_(weights), weights

    def _parts(self, like: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield parts of tensors, each expanded to the shape of the first; the last is written."""
        shape, device = like.shape, like.device
        flat = [like.reshape(-1)]
        flat += [other.to(device).expand(shape).reshape(-1) for other in others[:-1]]
        flat.append(others[-1].view(-1))
        yield from zip(*map(self._split, flat), strict=True)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = flat.split(max(1, _PART_ELEMENTS // len(self)))
        return parts


def _exponential(exponents: Tensor, beta: Tensor) -> Tensor:
    """Return exp in place, of a row up to a factor.

    Where beta is large so is the rounding of its largest exponent, which is near 0.
    """
    if beta.numel() and float(beta.max()) > _LARGE_BETA:
        exponents.sub_(exponents.amax(-1, keepdim=True)).clamp_(min=_LEAST_EXPONENT)
    return exponents.exp_()


def law(distance: Tensor, beta: Tensor) -> Tensor:
    """Return p_b = softmax(-b d) over the last axis of distances (..., V), in their type.

    beta is >= 0, of a shape that expands to (...).
    """
    weights = torch.softmax(-beta.to(distance.dtype).unsqueeze(-1) * distance, dim=-1)
    # softmax adds float32 in a row and is 1e-5 off for 64,000 codes
    return weights / weights.sum(-1, keepdim=True)


def weighted_share(weights: Tensor | None, num_codes: int) -> Tensor:
    """Return what share of x_1 each code is, shape (V,), float64, sum 1.

    Args:
        weights: Not negative, finite, not all zero, shape (V,); None is uniformly.
        num_codes: V.

    Returns:
        Shares on the CPU.

    Raises:
        ConfigError: If the weights are not as stated.
    """
    if weights is None:
        return torch.full((num_codes,), 1 / num_codes, dtype=torch.float64)
    share = weights.double().cpu()
    if share.shape != (num_codes,):
        raise ConfigError(f"weights must have shape {(num_codes,)}, got {tuple(share.shape)}")
    if not bool(torch.isfinite(share).all() & (share >= 0).all() & (share > 0).any()):
        raise ConfigError("weights must be finite, not negative and not all zero")
    return share / share.sum()


def normalize_codebook(codebook: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Divide each row of (V, D) by max(its length, NORM_FLOOR), in dtype; zero stays zero."""
    codebook = codebook.to(dtype)
    length: Tensor = torch.linalg.vector_norm(codebook, dim=-1, keepdim=True)
    return codebook / length.clamp_min(NORM_FLOOR)
