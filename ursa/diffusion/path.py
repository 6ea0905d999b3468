"""Probability paths: how a clean token becomes noise, and how fast it comes back.

Dimensions: B = batch, T = latent frames, H, W = rows and columns, V = codebook size, S = states of
a token (V, or V + 1 with a mask), D = code dimension.

Every path has the same interface and moves every token on its own:

- `source(shape)`: tokens at t = 0;
- `probs(x_1, t)`: the law p_t(x | x_1) over the S states;
- `sample(x_1, t)`: x_t drawn from it;
- `velocity(x_t, x_1, t)`: rates u_t(x; x_t, x_1) of the jump process that carries p_t, so that
  d/dt p_t(x) = sum_y p_t(y) u_t(x; y) - p_t(x) sum_z u_t(z; x) (Kolmogorov's forward equation);
- `rate(x_t, x_1, t)`: their sum, and `jump(x_t, x_1, t)`: a draw in proportion to them;
- `rate_over(x_t, x_1, t, t_next)`: the rate of t in the path's own time, times that time;
- `exact_step(x_t, x_1, t, t_next, numbers)`: x_t carried to t_next < 1 by that process, without an
  error of time, and `last_step(x_t, x_1)`: to 1;
- `rests_at_start`: whether all rates are 0 at t = 0.

`probs` and `velocity` are the readable reference and hold (..., S) tensors; the others do not.

t is a number, one a sample (B,), one a latent frame (B, T) or whatever `expand_time` takes.
Randomness is numbers in [0, 1), one a token, or a generator; a path keeps neither.

References:
    URSA, arXiv 2510.24717, section 3; metric-induced paths and kinetic-optimal velocities:
    arXiv 2412.03487, section 4; mixture paths: arXiv 2407.15595; masked diffusion: MDLM,
    arXiv 2406.07524. `exact_step` and `rate_over` are ours: docs/math.md, "Exact step".
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ursa.diffusion.codebook import DenseCodebook, Numbers, law
from ursa.diffusion.draws import check_ids, check_like, uniform_codes, uniform_numbers
from ursa.diffusion.product import ProductCodebook
from ursa.diffusion.schedule import PowerSchedule, Schedule
from ursa.diffusion.timesteps import expand_time
from ursa.errors import ConfigError

Codebook = DenseCodebook | ProductCodebook
"""What a metric path measures distances on; `GridCodebook` is a `DenseCodebook`."""


class MetricPath:
    """Probability path p_t(x | x_1) proportional to exp(-beta_t * d(x, x_1)).

    d is the squared Euclidean distance between L2-normalised codebook rows (of a `ProductCodebook`
    between rows as they are), and beta_t = c * (t / (1 - t)) ** alpha or another schedule. t = 0 is
    uniform noise, t -> 1 a point mass on x_1, or uniform over the codes at distance 0 of it. The
    rates of a `ProductCodebook` are those of its axes.
    """

    def __init__(
        self,
        codebook: Tensor | Codebook,
        *,
        alpha: float | None = None,
        c: float | None = None,
        schedule: Schedule | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Keep codebook and schedule.

        Args:
            codebook: Code embeddings, shape (V, D), any float type, finite; or a codebook that
                knows a faster way.
            alpha: Exponent of the schedule, > 0.
            c: Scale of the schedule, > 0.
            schedule: Instead of alpha and c.
            dtype: In what to compute: float32, or float64 for checks. Never half, whatever the
                type of the codebook: beta' is 50,000 at t = 0.99 (alpha 1, c 5): times a distance
                it overflows. Not used if codebook is no tensor: it has a type.

        Raises:
            ConfigError: If the codebook, alpha, c or dtype are not as stated, or a schedule is
                given beside alpha and c, or neither.
        """
        if (schedule is None) == (alpha is None) or (alpha is None) != (c is None):
            raise ConfigError(
                f"give alpha and c, or schedule, got alpha={alpha}, c={c}, schedule={schedule}"
            )
        if alpha is not None and c is not None:
            schedule = PowerSchedule(alpha, c)
        assert schedule is not None
        self.schedule: Schedule = schedule
        self.codebook: Codebook = (
            DenseCodebook(codebook, dtype) if isinstance(codebook, Tensor) else codebook
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""
        return self.codebook.dtype

    @property
    def codebook_size(self) -> int:
        """Number of codes V."""
        return len(self.codebook)

    @property
    def num_states(self) -> int:
        """Number of states of a token: the V codes."""
        return self.codebook_size

    @property
    def rests_at_start(self) -> bool:
        """Whether beta' is taken as 0 at t = 0, so that an Euler step from there moves nothing."""
        return float(self.beta_rate(torch.zeros((), dtype=torch.float64))) == 0

    def to(self, device: torch.device | str) -> "MetricPath":
        """Return the same path with its codebook, bit for bit, on a device."""
        moved = copy.copy(self)
        moved.codebook = self.codebook.to(device)
        return moved

    def beta(self, t: Tensor) -> Tensor:
        """Return beta_t of the schedule, same shape as t, t in [0, 1)."""
        return self.schedule.beta(t)

    def beta_rate(self, t: Tensor) -> Tensor:
        """Return the time derivative of beta, same shape as t; see the schedule for t = 0."""
        return self.schedule.rate(t)

    def source(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Draw tokens at t = 0: uniform over the codes. See `uniform_codes`."""
        return uniform_codes(shape, self.codebook_size, generator=generator, uniform=uniform)

    def distance(self, x_1: Tensor) -> Tensor:
        """Return the squared distance of every code to each token. See `DenseCodebook.distance`."""
        return self.codebook.distance(x_1)

    def probs(self, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return p_t(x | x_1).

        Args:
            x_1: Clean token ids, shape (...), int64.
            t: Times in [0, 1), a number or a shape that `expand_time` takes.

        Returns:
            Probabilities, shape (..., V), summing to 1 over the last axis.

        Raises:
            ConfigError: If t is out of range or does not fit x_1, or ids are not integers.
            DataError: If an id is not in [0, V).
        """
        return law(self.distance(x_1), self.beta(_time(t, x_1, self.dtype)))

    def sample(
        self,
        x_1: Tensor,
        t: float | Tensor,
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Draw x_t from p_t(x | x_1), one number a token. See `DenseCodebook.noise`.

        Args:
            x_1: Clean token ids, shape (...), int64.
            t: Times in [0, 1), a number or a shape that `expand_time` takes.
            generator: Gives the uniform numbers, float64, drawn on its own device.
            uniform: Random numbers in [0, 1), shape of x_1, float64 (a grid takes all their bits):
                the draw of a token depends on nothing but its own number. Give exactly one of the
                two.

        Returns:
            Noisy token ids, shape of x_1, int64.

        Raises:
            ConfigError: If t is out of range, t or uniform do not fit x_1, ids are not integers, or
                not exactly one source is given.
            DataError: If an id is not in [0, V).
        """
        beta = self.beta(_time(t, x_1, self.dtype))
        uniform = uniform_numbers(
            x_1.shape, generator=generator, uniform=uniform, dtype=torch.float64
        )
        return self.codebook.noise(x_1, beta, uniform)

    def velocity(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the kinetic-optimal rate of jumping from x_t to every code.

        u_t(x; x_t, x_1) = p_t(x | x_1) * beta'(t) * relu(d(x_t, x_1) - d(x, x_1)), 0 on x_t.
        Of a `ProductCodebook`: this on each axis, for codes that differ in that axis alone.

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Predicted clean token ids, shape (...), int64.
            t: Times in [0, 1), a number or a shape that `expand_time` takes.

        Returns:
            Rates per unit of time, shape (..., V), not negative.

        Raises:
            ConfigError: If t is out of range, ids are not integers, or shapes do not fit.
            DataError: If an id is not in [0, V).
        """
        t = _time(t, x_1, self.dtype)
        flow = self.codebook.flow(x_t, x_1, self.beta(t))
        return self.beta_rate(t).to(self.dtype).unsqueeze(-1) * flow

    def rate(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rate of leaving x_t, the sum of `velocity` over the codes.

        Arguments and errors are those of `velocity`.

        Returns:
            Rates per unit of time, shape (...).
        """
        t = _time(t, x_1, self.dtype)
        return self.beta_rate(t).to(self.dtype) * self.codebook.rate(x_t, x_1, self.beta(t))

    def rate_over(
        self, x_t: Tensor, x_1: Tensor, t: float | Tensor, t_next: float | Tensor
    ) -> Tensor:
        """Return the rate of leaving x_t a unit of beta, at t, times the beta that passes.

        `rate` times (t_next - t) holds the derivative of beta over the step as well: it is 0 at
        t = 0 of a power schedule, and too little where beta' rises.

        Args:
            x_t: Current token ids, shape (...), int64.
            x_1: Clean token ids, shape (...), int64.
            t: Start in [0, 1), a number or a shape that `expand_time` takes.
            t_next: End in [0, 1), likewise; the result is negative where it is below t.

        Returns:
            Mean numbers of jumps, shape (...).

        Raises:
            ConfigError: If t or t_next are not in [0, 1), ids no integers, or shapes do not fit.
            DataError: If an id is not in [0, V).
        """
        start, end = (self.beta(_time(each, x_1, self.dtype)) for each in (t, t_next))
        return self.codebook.rate(x_t, x_1, start) * (end - start).to(self.dtype)

    def jump(self, x_t: Tensor, x_1: Tensor, t: float | Tensor, uniform: Tensor) -> Tensor:
        """Draw where a jump goes, in proportion to `velocity`; x_t where nothing is closer to x_1.

        Arguments and errors are those of `velocity`; uniform numbers in [0, 1), shape (...).

        Returns:
            Token ids, shape (...), int64.
        """
        return self.codebook.jump(x_t, x_1, self.beta(_time(t, x_1, self.dtype)), uniform)

    def exact_step(
        self, x_t: Tensor, x_1: Tensor, t: float | Tensor, t_next: float | Tensor, numbers: Numbers
    ) -> Tensor:
        """Carry x_t from t to t_next < 1 by the jump process of x_1.

        See `DenseCodebook.exact_step`.

        Raises:
            ConfigError: If t or t_next are not in [0, 1), ids no integers, or shapes do not fit.
            DataError: If an id is not in [0, V).
        """
        start, end = (self.beta(_time(each, x_1, self.dtype)) for each in (t, t_next))
        return self.codebook.exact_step(x_t, x_1, start, end, numbers)

    def last_step(self, x_t: Tensor, x_1: Tensor) -> Tensor:  # noqa: ARG002
        """Return where a token is at t = 1: at x_1."""
        return x_1


class _ToClean:
    """What the baselines share: a jump goes to x_1, at a rate of 1 / (1 - t)."""

    codebook_size: int
    dtype: torch.dtype
    rests_at_start = False

    def rate_over(
        self, x_t: Tensor, x_1: Tensor, t: float | Tensor, t_next: float | Tensor
    ) -> Tensor:
        """Return the integral of the rate: log((1 - t) / (1 - t_next)), 0 where the rate is 0."""
        start, end = (_time(each, x_1, self.dtype) for each in (t, t_next))
        passed = torch.log((1 - start) / (1 - end)).to(self.dtype)
        return torch.where(self.rate(x_t, x_1, t) > 0, passed, torch.zeros_like(passed))

    def rate(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rates of leaving x_t, shape (...)."""
        raise NotImplementedError

    def jump(self, x_t: Tensor, x_1: Tensor, t: float | Tensor, uniform: Tensor) -> Tensor:  # noqa: ARG002
        """Return x_1: a jump goes nowhere else."""
        return check_ids("x_1", x_1, self.codebook_size)

    def exact_step(
        self, x_t: Tensor, x_1: Tensor, t: float | Tensor, t_next: float | Tensor, numbers: Numbers
    ) -> Tensor:
        """Carry x_t to x_1 with probability (t_next - t) / (1 - t), if its rate is not 0."""
        start, end = (_time(each, x_1, self.dtype) for each in (t, t_next))
        jumps = (self.rate(x_t, x_1, t) > 0) & (
            numbers()[0].to(x_1.device) < (end - start) / (1 - start)
        )
        return torch.where(jumps, x_1.long(), x_t.long())

    def last_step(self, x_t: Tensor, x_1: Tensor) -> Tensor:  # noqa: ARG002
        """Return where a token is at t = 1: at x_1."""
        return x_1


class MixturePath(_ToClean):
    """Probability path p_t(x | x_1) = t delta(x, x_1) + (1 - t) / V: the baseline without a metric.

    Same interface as `MetricPath`, whose docstrings hold shapes and errors.
    """

    def __init__(self, codebook_size: int, *, dtype: torch.dtype = torch.float32) -> None:
        """Take V >= 1 and the type to compute in: float32, or float64 for checks.

        Raises:
            ConfigError: If codebook_size or dtype are not as stated.
        """
        _check(codebook_size, dtype)
        self.codebook_size = codebook_size
        self.dtype = dtype

    @property
    def num_states(self) -> int:
        """Number of states of a token: the V codes."""
        return self.codebook_size

    def to(self, device: torch.device | str) -> "MixturePath":  # noqa: ARG002
        """Return the path: it holds no tensor, results are on the device of the tokens."""
        return self

    def source(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Draw tokens at t = 0: uniform over the codes. See `uniform_codes`."""
        return uniform_codes(shape, self.codebook_size, generator=generator, uniform=uniform)

    def probs(self, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return p_t(x | x_1), shape (..., V)."""
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        shape = (*x_1.shape, self.codebook_size)
        noise = ((1 - t) / self.codebook_size).to(self.dtype).unsqueeze(-1).expand(shape)
        clean = t.to(self.dtype).expand(x_1.shape).unsqueeze(-1)
        return noise.scatter_add(-1, x_1.unsqueeze(-1), clean)

    def sample(
        self,
        x_1: Tensor,
        t: float | Tensor,
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """Draw x_t: x_0 where the uniform number is below 1 - t, x_1 elsewhere.

        Args:
            x_1: Clean token ids, shape (...), int64.
            t: Times in [0, 1), a number or a shape that `expand_time` takes.
            generator: Draws x_0, unless given, and then the uniform numbers: the order of the
                official code.
            uniform: Random numbers in [0, 1), shape of x_1; give exactly one of the two.
            x_0: Noise, shape of x_1. None takes it from the generator, or from the same uniform
                numbers: given u < 1 - t, u / (1 - t) is uniform again.

        Returns:
            Noisy token ids, shape of x_1, int64.

        Raises:
            ConfigError, DataError: As `MetricPath.sample`.
        """
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        if x_0 is None and generator is not None and uniform is None:
            x_0 = self.source(x_1.shape, generator=generator).to(x_1.device)
        uniform = uniform_numbers(x_1.shape, generator=generator, uniform=uniform)
        uniform = uniform.to(x_1.device)
        if x_0 is None:
            x_0 = self.source(x_1.shape, uniform=(uniform / (1 - t)).clamp_max(1))
        x_0 = check_like("x_0", x_0, x_1, self.codebook_size)
        return torch.where(uniform < 1 - t, x_0, x_1)

    def velocity(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rates, shape (..., V): 1 / (1 - t) to x_1, else 0; 0 on x_t."""
        return _on_code(x_1.long(), self.rate(x_t, x_1, t), self.num_states)

    def rate(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rates of leaving x_t, shape (...)."""
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        x_t = check_like("x_t", x_t, x_1, self.num_states)
        return torch.where(x_t == x_1, 0.0, (1 / (1 - t)).to(self.dtype))


class MaskedPath(_ToClean):
    """Masked (absorbing) diffusion, the baseline of MDLM: x_1 with probability t, else a mask.

    p_t(x | x_1) = t delta(x, x_1) + (1 - t) delta(x, V). The mask is the id V, so tokens have
    V + 1 states: the last column of `probs` and `velocity`. Same interface as `MetricPath`, whose
    docstrings hold shapes and errors; x_1 has ids in [0, V), x_t in [0, V].

    A code never moves again, not even in the last step.
    """

    def __init__(self, codebook_size: int, *, dtype: torch.dtype = torch.float32) -> None:
        """Take V >= 1 and the type to compute in: float32, or float64 for checks.

        Raises:
            ConfigError: If codebook_size or dtype are not as stated.
        """
        _check(codebook_size, dtype)
        self.codebook_size = codebook_size
        self.dtype = dtype

    @property
    def mask_id(self) -> int:
        """The id of the mask, V."""
        return self.codebook_size

    @property
    def num_states(self) -> int:
        """Number of states of a token: the V codes and the mask."""
        return self.codebook_size + 1

    def to(self, device: torch.device | str) -> "MaskedPath":  # noqa: ARG002
        """Return the path: it holds no tensor, results are on the device of the tokens."""
        return self

    def source(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Return tokens at t = 0: all masks, of a shape.

        Nothing is drawn: of a source only the device counts, and it may be left out.
        """
        source = uniform if uniform is not None else generator
        device = torch.device("cpu") if source is None else source.device
        return torch.full(torch.Size(shape), self.mask_id, device=device)

    def probs(self, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return p_t(x | x_1), shape (..., V + 1)."""
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        probs = _on_code(x_1, t.to(self.dtype), self.num_states)
        probs[..., self.mask_id] = (1 - t).to(self.dtype)
        return probs

    def sample(
        self,
        x_1: Tensor,
        t: float | Tensor,
        *,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Draw x_t: the mask where the uniform number is below 1 - t, x_1 elsewhere."""
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        uniform = uniform_numbers(x_1.shape, generator=generator, uniform=uniform)
        uniform = uniform.to(x_1.device)
        return torch.where(uniform < 1 - t, self.mask_id, x_1)

    def velocity(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rates, shape (..., V + 1): 1 / (1 - t) from the mask to x_1, else 0."""
        return _on_code(x_1.long(), self.rate(x_t, x_1, t), self.num_states)

    def rate(self, x_t: Tensor, x_1: Tensor, t: float | Tensor) -> Tensor:
        """Return the rates of leaving x_t, shape (...)."""
        t = _time(t, x_1, self.dtype)
        x_1 = check_ids("x_1", x_1, self.codebook_size)
        x_t = check_like("x_t", x_t, x_1, self.num_states)
        return torch.where(x_t == self.mask_id, (1 / (1 - t)).to(self.dtype), 0.0)

    def last_step(self, x_t: Tensor, x_1: Tensor) -> Tensor:
        """Return where a token is at t = 1: at x_1 if it is still the mask, else where it is."""
        return torch.where(x_t == self.mask_id, x_1, x_t)


ProbabilityPath = MetricPath | MixturePath | MaskedPath
"""What the solver moves tokens along."""


def _time(t: float | Tensor, x_1: Tensor, dtype: torch.dtype) -> Tensor:
    """Align t with the tokens and compute with it in no less than dtype."""
    aligned = expand_time(t, x_1)
    return aligned.to(torch.promote_types(aligned.dtype, dtype))


def _on_code(ids: Tensor, values: Tensor, num_states: int) -> Tensor:
    """Put a value of each token on the column of its id; zero elsewhere. Shape (..., S)."""
    columns = torch.zeros(*ids.shape, num_states, dtype=values.dtype, device=ids.device)
    return columns.scatter_(-1, ids.unsqueeze(-1), values.expand(ids.shape).unsqueeze(-1))


def _check(codebook_size: int, dtype: torch.dtype) -> None:
    if codebook_size < 1:
        raise ConfigError(f"codebook_size must be at least 1, got {codebook_size}")
    if dtype not in {torch.float32, torch.float64}:
        raise ConfigError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
