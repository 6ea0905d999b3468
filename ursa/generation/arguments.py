"""What a call may ask for: names, sizes and counts that fit, or an error that names those that do.

Dimensions: B = videos, T = latent frames, h, w = rows and columns of codes.
"""

import functools
import inspect
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch import Tensor

from ursa.errors import ConfigError, name_hint
from ursa.generation.limits import MAX_INFERENCE_STEPS

logger = logging.getLogger(__name__)

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
_SOLVERS = "exact, euler or euler_beta"
MIN_TEMPERATURE = 1e-6
"""Logits over less are no numbers; 0 takes the most likely code without dividing."""
_MAX_GUIDANCE = 1000
"""Guided states of more overflow."""
P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let a call with a mistyped keyword fail with a TypeError that names the nearest one.

    `pipe(**locals())` in a script or notebook, which the official examples use, hands over the
    names of a module (`__name__` among them): there the names that the function knows are taken.

    Args:
        function: What is called, with named parameters.

    Returns:
        The function with that check before it.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if "__name__" in kwargs:
            given = {name: value for name, value in kwargs.items() if name in known}
            logger.info("of a module's names the call takes %s", ", ".join(sorted(given)))
            return function(*args, **given)  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                hint = name_hint(name, known)
                raise TypeError(f"the pipeline has no argument {name!r}; {hint}")
        return function(*args, **kwargs)

    return checked


def check_whole_numbers(**numbers: object) -> None:
    """Check that counts are whole numbers, or None.

    Args:
        numbers: Values by name.

    Raises:
        ConfigError: If one is another thing, such as 5.0; it is named.
    """
    for name, number in numbers.items():
        if number is None:
            continue
        try:
            operator.index(number)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"{name} must be a whole number, got {number!r}") from error


def check_tensor(name: str, value: object) -> None:
    """Check that an argument is a tensor.

    Args:
        name: What the error calls it.
        value: What was given.

    Raises:
        ConfigError: If it is another thing, such as a NumPy array.
    """
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise ConfigError(f"{name} must be a tensor of codes, got {kind}; use torch.as_tensor")


def checked_latent_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (T, h, w) of a given latent shape, (h, w) meaning one frame.

    Args:
        shape: (T, h, w) or (h, w).

    Raises:
        ConfigError: If it has another number of sizes, or one below 1.
    """
    sizes = tuple(int(size) for size in shape)
    if len(sizes) == 2:
        sizes = (1, *sizes)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigError(
            f"latents_shape must be (frames, rows, columns) or (rows, columns), got {tuple(shape)}"
        )
    return sizes[0], sizes[1], sizes[2]


def check_sampler(
    *,
    num_inference_steps: int,
    guidance_scale: float,
    flow_shift: float,
    temperature: float,
    cond_noise_scale: float,
    solver: str = "exact",
    draw_order: str = "per_token",
) -> None:
    """Check that the sampler's numbers are in their ranges.

    Args:
        num_inference_steps: At least 1, at most `MAX_INFERENCE_STEPS`.
        guidance_scale: In [0, 1000]; up to 1 is off.
        flow_shift: Positive and finite; 1 is none.
        temperature: 0, or at least `MIN_TEMPERATURE` and finite; 1 is the model's own law.
        cond_noise_scale: In [0, 1].
        solver: "exact" or "euler".
        draw_order: "per_token" or "official".

    Raises:
        ConfigError: Unless all are; it names the first that is not.
    """
    for name, value, fits, expected in (
        ("num_inference_steps", num_inference_steps, num_inference_steps >= 1, "at least 1"),
        (
            "num_inference_steps",
            num_inference_steps,
            num_inference_steps <= MAX_INFERENCE_STEPS,
            f"at most {MAX_INFERENCE_STEPS:,}",
        ),
        (
            "guidance_scale",
            guidance_scale,
            0 <= guidance_scale <= _MAX_GUIDANCE,
            f"in [0, {_MAX_GUIDANCE}]; up to 1 is off",
        ),
        ("flow_shift", flow_shift, 0 < flow_shift < math.inf, "positive and finite; 1 is none"),
        (
            "temperature",
            temperature,
            temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf,
            f"0, or at least {MIN_TEMPERATURE:g} and finite; 1 is the model's own law",
        ),
        ("cond_noise_scale", cond_noise_scale, 0 <= cond_noise_scale <= 1, "in [0, 1]"),
        ("solver", solver, solver in {"exact", "euler", "euler_beta"}, _SOLVERS),
        (
            "draw_order",
            draw_order,
            draw_order in {"per_token", "official"},
            "per_token or official",
        ),
    ):
        if not fits:
            raise ConfigError(f"{name} must be {expected}; got {value}")


def check_output(
    *,
    output_type: str,
    vae_batch_size: int,
    max_prompt_length: int | None,
    tensor_inputs: Sequence[str],
) -> None:
    """Check before the first step what is needed after the last one.

    Args:
        output_type: "pil", "np", "pt" or "latent".
        vae_batch_size: Videos decoded at once, at least 1.
        max_prompt_length: Ids a prompt, at least 1, or None.
        tensor_inputs: What the callback gets: "latents" alone.

    Raises:
        ConfigError: Unless all are so; it names the first that is not.
    """
    if output_type not in {"pil", "np", "pt", "latent"}:
        raise ConfigError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
    if vae_batch_size < 1:
        raise ConfigError(f"vae_batch_size must be at least 1, got {vae_batch_size}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ConfigError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    if set(tensor_inputs) - {"latents"}:
        raise ConfigError(
            "callback_on_step_end_tensor_inputs may name 'latents' alone, got "
            f"{list(tensor_inputs)}"
        )


def parse_size(size: int | str) -> int:
    """Return the bytes of a size.

    Args:
        size: Bytes, or a text such as "5GB" or "200MB", in powers of 1000.

    Raises:
        ConfigError: If it is neither, or below 1.
    """
    text = str(size).strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        found = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"max_shard_size must be bytes or such as '5GB' (KB, MB or GB), got {size!r}"
        ) from error
    if found < 1:
        raise ConfigError(f"max_shard_size must be positive, got {size!r}")
    return found


def per_video(values: str | Sequence[str], num_prompts: int, name: str) -> list[str]:
    """Return one text a prompt: a single text serves all.

    Args:
        values: One text, or one a prompt.
        num_prompts: Number of prompts.
        name: What the error calls the texts.

    Raises:
        ConfigError: If there is another number of texts than prompts.
    """
    texts = [values] * num_prompts if isinstance(values, str) else list(values)
    if len(texts) != num_prompts:
        raise ConfigError(
            f"{name} must be one text or one a prompt ({num_prompts}), got {len(texts)}"
        )
    return texts
