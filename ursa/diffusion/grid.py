"""The normalised FSQ grid by its symmetry: the path's operations in microseconds a token.

Axes with the same number of levels may change places, and axes with an odd number of levels may
change sign: neither changes a distance between codes. So a code's distances to all others are those
of one representative of its orbit under these moves, with the codes moved along. The published grid
(8, 8, 8, 5, 5, 5) has 288 moves and 64,000 codes, but only 1,200 orbits and 2.7 million pairs of
(orbit, distance), over which every sum runs. docs/math.md derives it.

Dimensions: V = codes, C = axes, O = orbits, P = classes: pairs of an orbit and one of the distances
from its representative, N = tokens.

Ours; published nowhere.
"""

import functools
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import platformdirs
import torch
from torch import Tensor

from ursa.diffusion.codebook import (
    SAME_DISTANCE,
    DenseCodebook,
    Moments,
    normalize_codebook,
    weighted_share,
)
from ursa.diffusion.draws import check_ids, check_like, hashed_numbers
from ursa.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSION = 1
"""Of the tables in the cache."""
_MAX_CODES = 2**16
"""Ids of the tables are 16 bits."""
_MAX_ENTRIES = 10**8
"""Orbits times codes; the published grid has 7.7e7."""
_SMALL_CODES = 4096
"""Tables of fewer codes are made faster than read."""
_ROWS = 60
"""Representatives whose distances are sorted at once: 31 MB for 64,000 codes."""
_ROUND = 1e-9
"""Distances closer than this are one; those of the published grid are 1e-6 apart."""
_NUM_BINS = 64
_LEAST_BIN = 5e-3
_MAX_DISTANCE = 4.0
_STRIDE = 8.0
"""Distance of one orbit's keys from the next's; more than any distance of codes."""
_PART_TOKENS = 2**13
"""With more different betas in one call the sums over classes cost more than streaming."""
_LEAST_EXPONENT = -700.0
"""exp of less is a denormal float64."""


class GridTables(NamedTuple):
    """What depends on the levels alone.

    Attributes:
        orbit: Orbit of every code, shape (V,), int16.
        representative: Its code of sorted coordinates, shape (O,), int32.
        move: Weight of canonical axis i in the id of the code, shape (V, C), int32: the sign by the
            basis of the axis that it is moved to.
        start: First class of every orbit and the end, shape (O + 1,), int64.
        distance: Distance of every class, rising within an orbit, shape (P,), float64.
        offset: Codes closer to the representative than those of the class, shape (P,), int32.
        order: Codes by distance from the representative, shape (O, V), the bits of uint16.
    """

    orbit: Tensor
    representative: Tensor
    move: Tensor
    start: Tensor
    distance: Tensor
    offset: Tensor
    order: Tensor


class _Sums(NamedTuple):
    """Running sums over all classes for one beta, shape (P + 1,) each, float64."""

    beta: float
    weight: Tensor
    weighted_distance: Tensor


class GridCodebook(DenseCodebook):
    """The L2-normalised grid of an FSQ tokenizer. Same interface and laws as `DenseCodebook`.

    A draw takes one number a token: `jump` inverts the distribution function in another order of
    codes, `noise` takes the number as the seed of its tries. So tokens differ from those of
    `DenseCodebook` while their law is the same. Give `noise` float64: float32 has 2**24 seeds only.
    `rate` and `jump` sum over all classes once a beta (tens of milliseconds for 64,000 codes): a
    step of the sampler has at most two.
    """

    has_fast_moments = True

    def __init__(
        self,
        levels: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        cache: Path | None = None,
    ) -> None:
        """Make or read the tables.

        Args:
            levels: FSQ levels of each axis, each >= 2; at most 65,536 codes, and symmetric enough
                (`has_small_tables`).
            dtype: As in `DenseCodebook`; orbit sums are float64 in any case.
            cache: Directory for the tables of large grids (188 MB for the published one, made once
                in some seconds and then memory-mapped); None is the user's cache directory.

        Raises:
            ConfigError: If levels or dtype are not as stated.
        """
        super().__init__(grid_codes(levels), dtype)
        self.levels = tuple(levels)
        self._tables = grid_tables(self.levels, cache)
        digits, self._basis = _digits(self.levels)
        self._digits = digits.to(torch.int8)
        self._middle = int(((torch.tensor(levels) // 2) * self._basis).sum())
        exact = grid_codes(levels).double()
        self._exact = exact / torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp_min(1e-5)
        self._count = _class_counts(self._tables, len(self))
        row = torch.arange(len(self._tables.representative))
        size = self._tables.start.diff()
        # rising over all orbits, so that one search finds a distance within an orbit
        self._key = self._tables.distance + _STRIDE * row.repeat_interleave(size)
        self._bins = _Bins.of(self._tables, self._count)
        self._last: _Sums | None = None

    def to(self, device: torch.device | str) -> Self:
        """Return the same codebook, bit for bit, on a device."""
        moved = super().to(device)
        moved._tables = GridTables(*(each.to(device) for each in self._tables))
        moved._bins = _Bins(*(each.to(device) for each in self._bins))
        for name in ("_basis", "_digits", "_exact", "_count", "_key"):
            setattr(moved, name, getattr(self, name).to(device))
        moved._last = None
        return moved

    def noise(self, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw x ~ p_b(x | x_1), any beta a token. See `DenseCodebook.noise`.

        Classes of an orbit lie in 64 bins of distance. A bin is proposed in proportion to its
        codes times exp(-b low), low its least distance, one of its codes evenly, and taken with
        probability exp(-b (d - low)): nine times of ten.
        """
        x_1 = check_ids("x_1", x_1, len(self))
        result = torch.empty_like(x_1, memory_format=torch.contiguous_format)
        flat = (x_1.reshape(-1), beta, uniform)
        places = [each.to(x_1.device).expand(x_1.shape).reshape(-1) for each in flat[1:]]
        parts = zip(
            flat[0].split(_PART_TOKENS),
            *(each.split(_PART_TOKENS) for each in places),
            result.view(-1).split(_PART_TOKENS),
            strict=True,
        )
        for ids, b, seeds, out in parts:
            out.copy_(self._noise_part(ids, b.float(), seeds))
        return result

    def _noise_part(self, x_1: Tensor, beta: Tensor, seeds: Tensor) -> Tensor:
        bins, order = self._bins, self._tables.order
        orbit = self._tables.orbit[x_1].long()
        masses = torch.addcmul(bins.log_count[orbit], beta[:, None], bins.low[orbit], value=-1)
        sums = masses.exp_().cumsum(-1)
        result = torch.empty_like(x_1)
        tries = hashed_numbers(seeds)
        left = torch.arange(len(x_1), device=x_1.device)
        while len(left):
            where, member, accept = (next(tries)[left] for _ in range(3))
            rows, cdf, b = orbit[left], sums[left], beta[left]
            target = where.float()[:, None] * cdf[:, -1:]
            below = torch.nextafter(cdf[:, -1:], cdf.new_zeros(()))
            place = torch.searchsorted(cdf, torch.minimum(target, below), right=True)[:, 0]
            count = bins.codes[rows, place]
            inside = torch.minimum((member * count).long(), count - 1)
            near = _unsigned(order[rows, bins.offset[rows, place] + inside])
            distance = self._between_exact(near, self._tables.representative[rows].long())
            taken = accept < torch.exp(-b * (distance - bins.low[rows, place]))
            chosen = left[taken]
            result[chosen] = self._moved(x_1[chosen], near[taken])
            left = left[~taken]
        return result

    def rate(self, x_t: Tensor, x_1: Tensor, beta: Tensor) -> Tensor:
        """Return the rate of leaving x_t per unit of beta. See `DenseCodebook.rate`."""
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        result = torch.empty(x_1.shape, dtype=self.codes.dtype, device=x_1.device)
        for b, chosen in _by_beta(beta, x_1):
            sums = self._sums(b)
            flow, _, first, _ = self._flow_of(sums, x_t[chosen], x_1[chosen])
            end = self._tables.start[self._tables.orbit[x_1[chosen]].long() + 1]
            total = sums.weight[end] - sums.weight[first]
            result[chosen] = (flow / total).to(result.dtype)
        return result

    def jump(self, x_t: Tensor, x_1: Tensor, beta: Tensor, uniform: Tensor) -> Tensor:
        """Draw where a jump goes. See `DenseCodebook.jump`.

        The flow into the closest j classes is d(x_t) A_j - B_j, A and B running sums of weights and
        of weights times distance: it rises with j, so bisection finds the class.
        """
        x_1 = check_ids("x_1", x_1, len(self))
        x_t = check_like("x_t", x_t, x_1, len(self))
        result = x_t.clone()
        uniform = uniform.to(x_1.device).expand(x_1.shape)
        for b, chosen in _by_beta(beta, x_1):
            part = self._jump_part(self._sums(b), x_t[chosen], x_1[chosen], uniform[chosen])
            result[chosen] = part
        return result

    def _jump_part(self, sums: _Sums, x_t: Tensor, x_1: Tensor, uniform: Tensor) -> Tensor:
        flow, distance, first, end = self._flow_of(sums, x_t, x_1)
        moves = (flow > 0) & (end > first)
        flow, distance, first, end, clean = (
            each[moves] for each in (flow, distance, first, end, x_1)
        )
        target = uniform[moves].double() * flow

        def flow_below(place: Tensor) -> Tensor:
            weight = sums.weight[place] - sums.weight[first]
            return distance * weight - (sums.weighted_distance[place] - before)

        before = sums.weighted_distance[first]
        low, high = first, end - 1
        for _ in range(math.ceil(math.log2(max(2, int(self._tables.start.diff().max()))))):
            middle = (low + high) // 2
            reached = flow_below(middle + 1) > target
            high = torch.where(reached, middle, high)
            low = torch.where(reached, low, torch.minimum(middle + 1, high))
        under, over = flow_below(low), flow_below(low + 1)
        # what is left of the number chooses one of the codes at this distance
        share = ((target - under) / (over - under)).nan_to_num(0).clamp(0, 1)
        count = self._count[low]
        inside = torch.minimum((share * count).long(), count - 1)
        rows = self._tables.orbit[clean].long()
        near = _unsigned(self._tables.order[rows, self._tables.offset[low] + inside])
        result = x_t.clone()
        result[moves] = self._moved(clean, near)
        return result

    def moments(
        self, beta: Tensor, weights: Tensor | None = None, *, euclidean: bool = False
    ) -> Moments:
        """Return the mean distance and its fall by beta. See `DenseCodebook.moments`."""
        share = weighted_share(weights, len(self))
        orbits = len(self._tables.representative)
        share = torch.zeros(orbits, dtype=torch.float64).index_add_(
            0, self._tables.orbit.long().cpu(), share
        )
        distance, count = self._tables.distance.cpu(), self._count.cpu()
        length = distance.sqrt() if euclidean else distance
        means: list[float] = []
        falls: list[float] = []
        for b in beta.tolist():
            weight = (distance * -b).clamp_(min=_LEAST_EXPONENT).exp_().mul_(count)
            total = self._row_sums(weight)
            mean = self._row_sums(weight * length) / total
            other = mean if not euclidean else self._row_sums(weight * distance) / total
            product = self._row_sums(weight * length * distance) / total
            means.append(float(share @ mean))
            falls.append(float(share @ (product - mean * other)))
        return Moments(*(torch.tensor(each, dtype=torch.float64) for each in (means, falls)))

    def collisions(self) -> int:
        """Return how many codes share their direction with another. See `DenseCodebook`."""
        first = self._tables.start[:-1]
        shared = (self._tables.distance[first] < SAME_DISTANCE) & (self._count[first] > 1)
        return int(shared[self._tables.orbit.long()].sum())

    def _row_sums(self, values: Tensor) -> Tensor:
        """Add up the values of each orbit's classes, shape (O,)."""
        sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
        start = self._tables.start.cpu()
        return sums[start[1:]] - sums[start[:-1]]

    def _sums(self, beta: float) -> _Sums:
        """Return the running sums of a beta: a step asks twice for those of its start."""
        last = self._last
        if last is None or last.beta != beta:
            distance, zero = self._tables.distance, self._key.new_zeros(1)
            weight = (distance * -beta).clamp_(min=_LEAST_EXPONENT).exp_().mul_(self._count)
            running = torch.cat([zero, weight.cumsum(0)])
            last = _Sums(beta, running, torch.cat([zero, weight.mul_(distance).cumsum(0)]))
            self._last = last
        return last

    def _flow_of(
        self, sums: _Sums, x_t: Tensor, x_1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sum of exp(-b d) relu(d(x_t) - d), d(x_t), and the classes closer than x_t."""
        orbit = self._tables.orbit[x_1].long()
        first = self._tables.start[orbit]
        distance = self._between_exact(x_t, x_1)
        end = torch.searchsorted(self._key, _STRIDE * orbit + (distance - 10 * _ROUND))
        end = torch.maximum(end, first)
        weight = sums.weight[end] - sums.weight[first]
        spent = sums.weighted_distance[end] - sums.weighted_distance[first]
        return (distance * weight - spent).clamp_(min=0), distance, first, end

    def _between_exact(self, x: Tensor, y: Tensor) -> Tensor:
        distance: Tensor = (self._exact[x] - self._exact[y]).square().sum(-1)
        return distance

    def _moved(self, x_1: Tensor, near: Tensor) -> Tensor:
        """Return the codes that stand to x_1 as `near` to its representative, shape (N,)."""
        ids: Tensor = (self._digits[near] * self._tables.move[x_1]).sum(-1) + self._middle
        return ids


class _Bins(NamedTuple):
    """All codes by distance from the representative of an orbit, in B bins; shape (O, B) each.

    Attributes:
        codes: Codes in the bin, int64.
        log_count: Logarithm of their number, float32.
        low: Their least distance, float32; 9 in an empty bin.
        offset: Codes in the bins before, int64.
    """

    codes: Tensor
    log_count: Tensor
    low: Tensor
    offset: Tensor

    @classmethod
    def of(cls, tables: GridTables, class_count: Tensor) -> "_Bins":
        edges = torch.cat(
            [
                torch.tensor([_ROUND], dtype=torch.float64),
                torch.logspace(
                    math.log10(_LEAST_BIN),
                    math.log10(_MAX_DISTANCE + 1e-3),
                    _NUM_BINS - 1,
                    dtype=torch.float64,
                ),
            ]
        )
        orbits = len(tables.representative)
        row = torch.arange(orbits).repeat_interleave(tables.start.diff())
        flat = torch.searchsorted(edges, tables.distance) + _NUM_BINS * row
        size = orbits * _NUM_BINS
        count = torch.zeros(size, dtype=torch.int64).index_add_(0, flat, class_count)
        low = torch.full((size,), 9.0, dtype=torch.float64)
        low.scatter_reduce_(0, flat, tables.distance, "amin")
        count = count.view(orbits, _NUM_BINS)
        # rounded down, so that no distance is below its bin's
        low = torch.nextafter(low.float(), torch.tensor(0.0)).view(orbits, _NUM_BINS)
        return cls(count, count.float().log(), low, count.cumsum(1) - count)


def grid_codes(levels: tuple[int, ...]) -> Tensor:
    """Return the codes of an FSQ grid by id, not normalised, shape (V, C), float32, in [-1, 1].

    FSQ: arXiv 2309.15505, in the official order of ids.

    Raises:
        ConfigError: If there is no level, one below 2, or more than 65,536 codes.
    """
    _check_levels(levels)
    digits, _ = _digits(levels)
    return digits.float() / (torch.tensor(levels) // 2)


def _by_beta(beta: Tensor, x_1: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield each beta and where it holds, shape of x_1."""
    spread = beta.to(x_1.device).expand(x_1.shape)
    for value in beta.unique():
        yield float(value), spread == value


def _check_levels(levels: tuple[int, ...]) -> None:
    if not levels or min(levels) < 2:
        raise ConfigError(f"FSQ levels must be at least 2 each, got {levels}")
    if math.prod(levels) > _MAX_CODES:
        raise ConfigError(
            f"FSQ levels must make at most {_MAX_CODES} codes here, got {math.prod(levels)} of "
            f"{levels}; DenseCodebook takes any number"
        )


def num_orbits(levels: tuple[int, ...]) -> int:
    """Return the number of orbits of a grid: a multiset of levels or magnitudes for each group."""
    count = 1
    for level in set(levels):
        values = (level + 1) // 2 if level % 2 else level
        count *= math.comb(values + levels.count(level) - 1, levels.count(level))
    return count


def has_small_tables(levels: tuple[int, ...]) -> bool:
    """Return whether a grid's tables fit: at most 65,536 codes and 1e8 entries, orbits x codes."""
    return (
        math.prod(levels) <= _MAX_CODES and num_orbits(levels) * math.prod(levels) <= _MAX_ENTRIES
    )


def match_grid(codes: Tensor, levels: tuple[int, ...]) -> bool:
    """Return whether codes, shape (V, C), point where those of an FSQ grid do, within 1e-6.

    Raises:
        ConfigError: If a level is smaller than 2 and the shape fits.
    """
    if math.prod(levels) > _MAX_CODES or codes.shape != (math.prod(levels), len(levels)):
        return False
    given, grid = normalize_codebook(codes.cpu()), normalize_codebook(grid_codes(levels))
    return bool(torch.allclose(given, grid, rtol=0, atol=1e-6))


def _digits(levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return coordinates -L // 2 ... (L - 1) // 2 of every code, (V, C), and the basis, (C,)."""
    sizes = torch.tensor(levels)
    basis = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
    ids = torch.arange(math.prod(levels))
    return (ids[:, None] // basis) % sizes - sizes // 2, basis


@functools.lru_cache(maxsize=4)
def grid_tables(levels: tuple[int, ...], cache: Path | None = None) -> GridTables:
    """Return the tables of a grid: made if it is small, else memory-mapped from the cache.

    Args:
        levels: FSQ levels of each axis, as `has_small_tables` takes.
        cache: Directory of the cache; None is the user's.

    Returns:
        The tables. Those of more than 4,096 codes lie in files that all processes share; in memory
        if these cannot be written. Calls share them: do not change them.

    Raises:
        ConfigError: As `grid_codes`, or if the grid has too little symmetry.
    """
    _check_levels(levels)
    if not has_small_tables(levels):
        raise ConfigError(
            f"an FSQ grid of levels {levels} has too little symmetry for tables: "
            f"{num_orbits(levels)} orbits of {math.prod(levels)} codes; take DenseCodebook"
        )
    if math.prod(levels) <= _SMALL_CODES:
        return _build_tables(levels)
    root = cache or Path(platformdirs.user_cache_dir("ursa"))
    folder = root / f"fsq-grid-v{_VERSION}-{'x'.join(map(str, levels))}"
    found = _read_tables(folder)
    if found is not None:
        return found
    made = _build_tables(levels)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _store_tables(made, folder)
    except OSError as error:
        logger.warning("tables of the FSQ grid are not kept: %s", error)
    return _read_tables(folder) or made


def _read_tables(folder: Path) -> GridTables | None:
    """Map the tables of a directory; None if there are none, or damaged ones, which then go."""
    if not folder.is_dir():
        return None
    try:
        # copy on write: torch has no read-only tensors
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="c") for name in GridTables._fields]
    except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
        logger.warning("tables of the FSQ grid are damaged and made again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return GridTables(*map(torch.from_numpy, arrays))


def _store_tables(tables: GridTables, folder: Path) -> None:
    """Write a directory of arrays; it appears whole or not at all."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        for name, array in tables._asdict().items():
            np.save(scratch / f"{name}.npy", array.numpy())
        scratch.chmod(0o755)  # others may share the cache
        scratch.rename(folder)
    except OSError:
        # another process may have been faster
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build_tables(levels: tuple[int, ...]) -> GridTables:
    digits, basis = _digits(levels)
    canonical, move = torch.empty_like(digits), torch.empty_like(digits)
    for level in set(levels):
        axes = torch.tensor([axis for axis, each in enumerate(levels) if each == level])
        values = digits[:, axes]
        place = (values.abs() if level % 2 else values).argsort(dim=1, stable=True)
        moved = values.gather(1, place)
        # axis `axes[i]` of the representative stands at axis `axes[place[i]]` of the code
        sign = torch.where(moved < 0, -1, 1) if level % 2 else torch.ones_like(moved)
        canonical[:, axes] = moved * sign
        move[:, axes] = sign * basis[axes[place]]
    middle = ((torch.tensor(levels) // 2) * basis).sum()
    representative, orbit = ((canonical * basis).sum(1) + middle).unique(return_inverse=True)
    codes = grid_codes(levels).double()
    codes = codes / torch.linalg.vector_norm(codes, dim=-1, keepdim=True).clamp_min(1e-5)
    order = torch.empty(len(representative), len(codes), dtype=torch.int16)
    distances, offsets, sizes = [], [], []
    for first in range(0, len(representative), _ROWS):
        rows = representative[first : first + _ROWS]
        square = codes.square().sum(1)
        distance = square[rows][:, None] + square - 2 * codes[rows] @ codes.T
        distance = distance.clamp_(min=0).div_(_ROUND).round_().mul_(_ROUND)
        distance, ids = distance.sort(dim=1, stable=True)
        order[first : first + len(rows)] = _signed(ids)
        begins = torch.ones_like(distance, dtype=torch.bool)
        begins[:, 1:] = distance[:, 1:] - distance[:, :-1] > _ROUND / 2
        distances.append(distance[begins])
        offsets.append(begins.nonzero()[:, 1].int())
        sizes.append(begins.sum(1))
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)])
    return GridTables(
        orbit.to(torch.int16),
        representative.int(),
        move.int(),
        start,
        torch.cat(distances),
        torch.cat(offsets),
        order,
    )


def _class_counts(tables: GridTables, num_codes: int) -> Tensor:
    """Return the number of codes of each class, shape (P,), int64."""
    end = torch.cat([tables.offset[1:].long(), tables.start.new_zeros(1)])
    end[tables.start[1:] - 1] = num_codes
    return end - tables.offset


def _signed(ids: Tensor) -> Tensor:
    """Return ids below 2**16 as the int16 of the same bits, for want of uint16 operations."""
    return torch.where(ids < 2**15, ids, ids - 2**16).to(torch.int16)


def _unsigned(stored: Tensor) -> Tensor:
    return stored.long() & 0xFFFF
