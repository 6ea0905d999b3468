"""Layers of the network that keep less, or are compiled; names and values of weights stay."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ursa.errors import ConfigError
from ursa.model.size import Recomputed
from ursa.model.transformer import UrsaTransformer


def checkpoint_activations(model: UrsaTransformer, level: Recomputed) -> None:
    """Let parts of the layers be computed again in the backward pass instead of kept.

    Gradients are equal to the bit where the same operations give the same bits, as on a CPU. Copies
    of a network are made before: a copy would compute with the weights of the first.

    Args:
        model: Its layers are changed.
        level: What is computed again; see `Execution`.
    """
    for layer in model.model.layers:
        assert isinstance(layer, nn.Module)
        parts: dict[Recomputed, tuple[object, ...]] = {
            "none": (),
            "mlp": (layer.mlp,),
            "attention": (layer.mlp, layer.self_attn),
            "layer": (layer,),
        }
        for part in parts[level]:
            assert isinstance(part, nn.Module)
            part.forward = _recomputed(part.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass that keeps its inputs alone; a plain function, which compiles."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # nothing in a layer is random but the masks of adapters, which follow from seeds
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped


def compile_layers(model: UrsaTransformer) -> None:
    """Compile each layer when it is first used; layers of one kind share the code.

    Args:
        model: Its layers are changed.

    Raises:
        ConfigError: If `torch.compile` does not work here, most often for want of a compiler.
    """
    device = model.lm_head.weight.device
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"compile_layers: torch.compile does not work on this machine for {device.type} "
            f"({reason}); install a C++ compiler and set CXX to it, or set URSA_COMPILE_LAYERS=0"
        ) from error
    for layer in model.model.layers:
        layer.compile()


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1
