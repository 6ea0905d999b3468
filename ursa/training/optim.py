"""Optimizer, learning-rate schedule and weight average.

References:
    AdamW: arXiv 1711.05101. Cosine: arXiv 1608.03983. The growing decay of the average is that of
    TensorFlow's `ExponentialMovingAverage`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ursa.config import StageConfig


def trained_part(model: nn.Module) -> nn.Module:
    """Return what optimizer, average and checkpoints hold: all parameters that need a gradient.

    Args:
        model: The network.

    Returns:
        The network itself if it is trained whole, else a module without a function of its own that
        has the same parameters under the same names.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) == len(list(model.parameters())):
        return model
    root = nn.Module()
    for name, parameter in trained.items():
        *folders, last = name.split(".")
        place = root
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        place.register_parameter(last, parameter)
    return root


def build_optimizer(model: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters, one group (the paper decays every weight).

    Args:
        model: The network, or its `trained_part`. Decay takes adapters back to the weights that
            they stand on, and other weights to 0.
        config: The stage: rate, betas, weight decay.
    """
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        # one kernel without copies of all weights; on a CPU it has other bits than the plain one
        fused=True if parameters[0].device.type == "cuda" else None,
    )


def learning_rate(config: StageConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to `final_learning_rate`.

    Args:
        config: The stage.
        step: Step number from 0.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def build_average(model: nn.Module, config: StageConfig) -> AveragedModel:
    """Return the exponential moving average of the weights.

    The decay grows from 0 to `ema_decay` as (1 + n) / (10 + n), so that the random start is soon
    forgotten in short stages.

    Args:
        model: The network; the average starts as a copy of it.
        config: The stage: `ema_decay`.
    """

    def update(
        averages: Sequence[Tensor], values: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        count = float(num_averaged)  # once a step: on a GPU reading it waits for all that goes on
        decay = min(config.ema_decay, (1 + count) / (10 + count))
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 1 - decay)

    return AveragedModel(model, multi_avg_fn=update)
