"""How a stage is computed, as against what it computes: options that no fingerprint knows.

They change memory and time, and the weights to rounding only, like the number of workers. A stage
that was begun with some goes on with others. Read without torch.
"""

from typing import Literal

from ursa.config import FrozenModel
from ursa.model.size import Recomputed

Strategy = Literal["replicated", "fsdp"]
DeviceType = Literal["cpu", "cuda"]
CPU_BACKEND = "gloo"
GPU_BACKEND = "cpu:gloo,cuda:nccl"
"""Flags, records and what lies on the CPU go by gloo, tensors of GPUs by NCCL."""


class Execution(FrozenModel):
    """Options of the workers of a stage, the same on all of them.

    Attributes:
        strategy: replicated: each worker holds weights, optimizer and average whole, and gradients
            are averaged; fsdp: each holds its part of them, and a layer's weights are gathered when
            it is their turn. One worker alone has nothing to share out.
        activation_checkpointing: What is computed again in the backward pass instead of kept: the
            inside of the MLPs; that of MLPs and attention; all of a layer but its input.
        compile_layers: Whether `torch.compile` turns each layer into machine code.
        device: Where the network is: cuda is the GPU of the number that the process has on its
            machine. Prompts, times and noise are drawn on the CPU either way, so that a step learns
            from the same tokens everywhere.
    """

    strategy: Strategy = "replicated"
    activation_checkpointing: Recomputed = "none"
    compile_layers: bool = False
    device: DeviceType = "cpu"


DEFAULT_EXECUTION = Execution()
