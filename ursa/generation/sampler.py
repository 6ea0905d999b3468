"""The sampler: the steps from noise to codes, and where their randomness comes from.

Dimensions: B = videos, T = latent frames, h, w = rows and columns of codes, V = codes, L = ids.

References:
    URSA, arXiv 2510.24717, algorithm 2.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ursa.diffusion.draws import draw_multinomial
from ursa.diffusion.path import ProbabilityPath
from ursa.diffusion.solver import draw_from_head, euler_step, exact_step, guide, official_step
from ursa.errors import ConfigError
from ursa.generation.conditions import frame_clock
from ursa.model.transformer import UrsaTransformer

DrawOrder = Literal["per_token", "official"]
Solver = Literal["exact", "euler", "euler_beta"]
Generators = torch.Generator | Sequence[torch.Generator] | None
OnStep = Callable[[int, float, Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The numbers of one call; `UrsaPipeline.__call__` says what they mean.

    `times` are the start times of the steps.
    """

    times: tuple[float, ...]
    scale: float
    trunc: float
    temperature: float
    top_k: int | None
    top_p: float | None
    draw_order: DrawOrder
    solver: Solver


class Draws:
    """Random numbers of one call.

    In the order "per_token" every token has numbers of its own, so that a video depends on its own
    generator alone; in the order "official" one generator serves all.
    """

    def __init__(
        self,
        generator: Generators,
        num_videos: int,
        shape: tuple[int, int, int],
        order: DrawOrder,
    ) -> None:
        """Take generators for videos of latent shape (T, h, w).

        Args:
            generator: One for all videos or one a video; None is torch's own.
            num_videos: B.
            shape: (T, h, w).
            order: Which numbers are drawn: see the class.

        Raises:
            ConfigError: If there is another number of generators than videos, or several in the
                official order.
        """
        single = generator is None or isinstance(generator, torch.Generator)
        self._generators = [] if single else list(generator)  # type: ignore[arg-type]
        if not single and len(self._generators) != num_videos:
            raise ConfigError(
                f"generator must be one or one a video ({num_videos}), got {len(self._generators)}"
            )
        if not single and order == "official":
            raise ConfigError('draw_order "official" takes one generator for all videos')
        self._single = generator if isinstance(generator, torch.Generator) else None
        self._order = order
        self._shape = (num_videos, *shape)

    @property
    def single(self) -> torch.Generator:
        """The one generator: torch's own if none was given."""
        return torch.default_generator if self._single is None else self._single

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers in [0, 1), one a token, shape (B, T, h, w), on the generators' device.

        Args:
            dtype: float32, or float64 where all bits count.
        """
        if self._generators:
            return torch.stack(
                [
                    torch.rand(self._shape[1:], generator=item, dtype=dtype, device=item.device)
                    for item in self._generators
                ]
            )
        return torch.rand(
            self._shape, generator=self.single, dtype=dtype, device=self.single.device
        )

    def numbers(self) -> Callable[[], Tensor]:
        """Return a source of three numbers a token, shape (3, B, T, h, w), for one step.

        However often a step asks, the generators move on by one number, so that a video does not
        depend on how often its neighbours ask.
        """
        own = self._generators or [self.single]
        shape = self._shape[1:] if self._generators else self._shape
        streams = []
        for item in own:
            seed = torch.randint(2**62, (), generator=item, device=item.device).item()
            streams.append(torch.Generator(item.device).manual_seed(int(seed)))

        def more() -> Tensor:
            drawn = [
                torch.rand((3, *shape), generator=each, dtype=torch.float64, device=each.device)
                for each in streams
            ]
            return torch.stack(drawn, dim=1) if self._generators else drawn[0]

        return more

    def source(self, path: ProbabilityPath) -> Tensor:
        """Draw codes at t = 0.

        Args:
            path: The probability path.

        Returns:
            Codes, shape (B, T, h, w), int64.
        """
        if self._order == "official":
            return path.source(self._shape, generator=self.single)
        return path.source(self._shape, uniform=self.uniform())

    def noised(self, path: ProbabilityPath, codes: Tensor, given: Tensor, t: float) -> Tensor:
        """Draw x_t of codes; the official order draws for the given frames alone.

        Args:
            path: The probability path.
            codes: Codes x_1, shape (B, T, h, w), int64; not changed.
            given: Which latent frames are given, shape (T,), bool; read in the official order
                alone.
            t: Time in [0, 1].

        Returns:
            Codes, shape (B, T, h, w), int64; frames that are not given are not to be read.
        """
        if self._order == "official":
            result = codes.clone()
            probs = path.probs(codes[:, given.to(codes.device)], t)
            result[:, given.to(codes.device)] = draw_multinomial(probs, self.single)
            return result
        return path.sample(codes, t, uniform=self.uniform(torch.float64).to(codes.device))


def sample(  # noqa: PLR0913  (what the steps read)
    transformer: UrsaTransformer,
    path: ProbabilityPath,
    codes: Tensor,
    *,
    begins: Tensor,
    text_ids: Tensor,
    negative_ids: Tensor,
    sampling: Sampling,
    draws: Draws,
    on_step: OnStep,
    progress: Callable[[range], Iterable[int]],
) -> Tensor:
    """Run the steps.

    Args:
        transformer: The posterior network.
        path: The probability path.
        codes: Where to start, shape (B, T, h, w), int64; not changed.
        begins: When each latent frame begins to move, shape (T,), 1 for never.
        text_ids: Prompts, shape (B, L).
        negative_ids: Prompts of the unconditional branch, shape (B, L).
        sampling: Steps, guidance, temperature.
        draws: Randomness.
        on_step: Called with (step, t, codes) after every step; returns the codes that go on and
            whether to stop.
        progress: Wraps the steps.

    Returns:
        Codes, shape (B, T, h, w), int64.
    """
    times = [*sampling.times, 1.0]
    rests = sampling.solver == "euler" and path.rests_at_start
    for step in progress(range(len(sampling.times))):
        t, t_next, is_last = times[step], times[step + 1], step + 1 == len(sampling.times)
        begin, end = (each.expand(len(codes), -1) for each in frame_clock(begins, t, t_next))
        if sampling.draw_order == "official":
            logits = _official_logits(transformer, codes, text_ids, negative_ids, t, sampling)
            moved = official_step(
                path, codes, logits, begin, end, is_last=is_last, generator=draws.single
            )
        elif rests and not is_last and bool((begin[end > begin] == 0).all()):
            moved = codes  # no rate at t = 0: what the network says would change nothing
        else:
            hidden = _hidden_states(transformer, codes, text_ids, negative_ids, t, sampling)
            moved = draw_from_head(
                hidden,
                transformer.lm_head.weight,
                draws.uniform(),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
            if is_last:
                moved = path.last_step(codes, moved)
            else:
                moved = _carry(path, codes, moved, begin, end, draws, sampling.solver)
        waits = (begins >= t_next).to(codes.device)[:, None, None]
        codes, stops = on_step(step, t, torch.where(waits, codes, moved))
        if stops:
            break
    return codes


def _carry(
    path: ProbabilityPath,
    codes: Tensor,
    clean: Tensor,
    begin: Tensor,
    end: Tensor,
    draws: Draws,
    solver: Solver,
) -> Tensor:
    """Move codes towards the clean ones that the posterior drew."""
    if solver == "exact":
        return exact_step(path, codes, clean, t=begin, t_next=end, numbers=draws.numbers())
    numbers = torch.stack([draws.uniform(), draws.uniform()])
    in_beta = solver == "euler_beta"
    return euler_step(path, codes, clean, t=begin, t_next=end, uniforms=numbers, in_beta=in_beta)


def _hidden_states(
    transformer: UrsaTransformer,
    codes: Tensor,
    text_ids: Tensor,
    negative_ids: Tensor,
    t: float,
    sampling: Sampling,
) -> Tensor:
    """Return guided hidden states, shape (B, T, h, w, D): the head is linear, so this is enough."""
    if sampling.scale <= 1 or t >= sampling.trunc:
        hidden = transformer.hidden_states(text_ids, codes)
    else:
        both = transformer.hidden_states(
            torch.cat([text_ids, negative_ids]), torch.cat([codes, codes])
        )
        conditional, unconditional = both.chunk(2)
        hidden = guide(conditional, unconditional, sampling.scale)
    return hidden.view(*codes.shape, -1)


def _official_logits(
    transformer: UrsaTransformer,
    codes: Tensor,
    text_ids: Tensor,
    negative_ids: Tensor,
    t: float,
    sampling: Sampling,
) -> Tensor:
    """Return guided logits, shape (B, T, h, w, V), rounded as the official code's."""
    scale = sampling.scale if t < sampling.trunc else 1.0
    if sampling.scale > 1:
        # the official code runs both branches to the end; one branch alone would round otherwise
        both = transformer(torch.cat([text_ids, negative_ids]), torch.cat([codes, codes]))
        conditional, unconditional = both.chunk(2)
        logits = guide(conditional, unconditional, scale)
    else:
        logits = transformer(text_ids, codes)
    return logits.view(*codes.shape, -1)
