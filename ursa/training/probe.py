"""How fast this machine trains: a few steps of a shallow network, timed. Takes seconds.

Real layers, loss and update of the planned width run at two depths; the difference is what a layer
costs. Where the planned shapes are too large for a probe they are cut, and what was measured is
taken as a rate.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ursa.config import StageConfig
from ursa.diffusion.loss import linear_posterior_loss
from ursa.model.config import TransformerConfig
from ursa.model.size import Clip, num_parameters
from ursa.model.transformer import build_transformer
from ursa.training.optim import build_average, build_optimizer
from ursa.training.plan import TRAINING_FORWARDS, Speed, split_flops

_DEPTHS = (1, 3)
_MAX_FLOPS = 4e10
"""Of a forward and backward pass of the deeper network: a second or less on most machines."""
_MAX_ROWS = 2**23
"""Elements of embedding and head, each."""
_REPEATS, _MAX_S = 4, 4.0
"""Steps timed at most, and seconds after which no further one begins."""


class _Timed(NamedTuple):
    """Seconds of a forward and backward pass, and of an update."""

    pass_s: float
    update_s: float


def measure_speed(
    network: TransformerConfig,
    clip: Clip,
    micro_batch: int,
    stage: StageConfig,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time shallow networks of the planned width with the threads that torch has.

    Args:
        network: The planned network.
        clip: Sizes of a sample.
        micro_batch: Samples at once.
        stage: Settings of the optimizer.
        clock: Seconds; `time.process_time` leaves out what other processes take.

    Returns:
        Rates of this machine.
    """
    cut, small, batch = _cut(network, clip, micro_batch)
    shallow, deep = (_time(_of_depth(cut, depth), small, batch, stage, clock) for depth in _DEPTHS)
    one = _of_depth(cut, 1)
    layer_flops, head_flops = split_flops(one, small)
    rows = (one.vocab_size + one.lm_head_size) * one.hidden_size
    parameters = num_parameters(one) - rows
    layer_s, head_s = _split(shallow.pass_s, deep.pass_s, layer_flops, head_flops)
    layer_update_s, row_update_s = _split(shallow.update_s, deep.update_s, parameters, rows)
    passes = TRAINING_FORWARDS * batch
    is_cut = (cut, small, batch) != (network, clip, micro_batch)
    return Speed(
        layer_flops=passes * layer_flops / layer_s,
        head_flops=passes * head_flops / head_s,
        layer_parameters_per_s=parameters / layer_update_s,
        row_parameters_per_s=rows / row_update_s,
        source=f"measured here with {torch.get_num_threads()} threads on {_DEPTHS[0]} and "
        f"{_DEPTHS[1]} layers" + (" of smaller shapes" if is_cut else ""),
    )


def _split(shallow_s: float, deep_s: float, layer: float, rest: float) -> tuple[float, float]:
    """Return seconds of one layer and of the rest, from those of networks of `_DEPTHS` layers.

    On a busy machine the difference can be noise, down to nothing or less: neither part is taken
    for ten times as fast as both together.

    Args:
        shallow_s: Seconds of the shallower network.
        deep_s: Of the deeper one.
        layer: Work of a layer, in any unit.
        rest: Of the rest.
    """
    together_s = deep_s / (_DEPTHS[1] * layer + rest)
    layer_s = max((deep_s - shallow_s) / (_DEPTHS[1] - _DEPTHS[0]), 0.1 * together_s * layer)
    return layer_s, max(shallow_s - layer_s, 0.1 * together_s * rest)


def _cut(
    network: TransformerConfig, clip: Clip, micro_batch: int
) -> tuple[TransformerConfig, Clip, int]:
    """Return shapes that a probe has time and memory for: fewer codes, samples, then tokens."""
    most = max(256, _MAX_ROWS // network.hidden_size)
    codes, text = min(network.lm_head_size, most), min(network.lm_vocab_size, most)
    network = network.model_copy(
        update={
            "lm_head_size": codes,
            "lm_vocab_size": text,
            "vocab_size": text + codes,
            "bov_token_id": 0,
        }
    )
    layers, head = split_flops(_of_depth(network, _DEPTHS[1]), clip)
    each = TRAINING_FORWARDS * (layers + head)
    if each <= _MAX_FLOPS:
        return network, clip, min(micro_batch, max(1, int(_MAX_FLOPS / each)))
    while TRAINING_FORWARDS * sum(split_flops(_of_depth(network, _DEPTHS[1]), clip)) > _MAX_FLOPS:
        if clip.num_tokens < 64:
            break
        clip = Clip((1, 1, max(1, clip.num_visual_tokens // 2)), clip.prompt_length // 2)
    return network, clip, 1


def _of_depth(network: TransformerConfig, depth: int) -> TransformerConfig:
    return network.model_copy(update={"num_hidden_layers": depth, "max_window_layers": depth})


def _time(
    network: TransformerConfig,
    clip: Clip,
    batch: int,
    stage: StageConfig,
    clock: Callable[[], float],
) -> _Timed:
    model = build_transformer(network, seed=0)
    optimizer, average = build_optimizer(model, stage), build_average(model, stage)
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(batch, clip.prompt_length, dtype=torch.long)
    shape = (batch, *clip.latent_shape)
    x_1, x_t = torch.randint(network.lm_head_size, (2, *shape), generator=generator)
    # the least of them: what others take of the machine is not its speed
    timed: list[_Timed] = []
    end_s = time.monotonic() + _MAX_S
    for _ in range(1 + _REPEATS):  # the first makes the moments and warms up
        if len(timed) > 1 and time.monotonic() > end_s:
            break
        optimizer.zero_grad(set_to_none=True)
        started = clock()
        hidden = model.hidden_states(text, x_t)
        linear_posterior_loss(hidden, model.lm_head.weight, x_1.flatten(1)).loss.backward()
        middle = clock()
        nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
        optimizer.step()
        average.update_parameters(model)
        timed.append(_Timed(middle - started, clock() - middle))
    return _Timed(*(min(each) for each in zip(*timed[1:], strict=True)))
