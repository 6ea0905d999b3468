"""The process group as the trainer sees it: rank, size, sums, equal gradients, sharded networks.

The launcher (Ray Train or `stage.launch_local`) makes the group; without one a process is alone.

References:
    Sharding: ZeRO, arXiv 1910.02054, stage 3; PyTorch FSDP, arXiv 2304.11277.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ursa.errors import ConfigError
from ursa.model.transformer import UrsaTransformer
from ursa.training.execution import DeviceType

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Group:
    """This process and how many there are.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and metrics."""
        return self.rank == 0

    def share(self, global_batch_size: int) -> slice:
        """Return this rank's part of the global batch.

        Args:
            global_batch_size: Samples a step over all ranks.

        Raises:
            ConfigError: If the batch cannot be divided evenly.
        """
        if global_batch_size % self.world_size:
            raise ConfigError(
                f"global_batch_size {global_batch_size} must be divisible by the "
                f"{self.world_size} workers"
            )
        size = global_batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks, which all call this.

        Args:
            value: Any shape, the same everywhere, of a floating type.

        Returns:
            The same shape, detached if there is more than one rank.
        """
        if self.world_size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the ranks, in one message; all ranks call this.

        Args:
            model: Parameters without a gradient are passed over, the same ones everywhere.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def any(self, flag: bool) -> bool:  # noqa: FBT001  (the only argument)
        """Return whether it holds on any rank; all ranks call this.

        Args:
            flag: Whether it holds here.
        """
        if self.world_size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def from_main(self, find: Callable[[], Found]) -> Found:
        """Return what rank 0 finds, so that all go by the same; all ranks call this.

        Args:
            find: Called on rank 0 alone; the result must pickle.
        """
        if self.world_size == 1:
            return find()
        box = [find() if self.is_main else None]
        dist.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def current_group() -> Group:
    """Return the initialised process group, or a group of one."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return Group(0, 1)


def local_device(kind: DeviceType) -> torch.device:
    """Return where this process computes; on a GPU it becomes torch's current device.

    Launchers number the processes of a machine in the variable LOCAL_RANK.

    Args:
        kind: cuda is the GPU of that number.

    Raises:
        ConfigError: If there is no such GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"training process {number} of this machine is to have a GPU, and torch finds {count}; "
            "set URSA_GPUS_PER_TRAIN_WORKER to 0, lower URSA_NUM_TRAIN_WORKERS, or check the "
            "driver and that torch is built for it"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def shard_model(model: UrsaTransformer, *, precision: torch.dtype = torch.float32) -> None:
    """Leave each rank its part of every parameter, split by rows; all ranks call this.

    A layer's weights are gathered before it computes and dropped after; those of embedding, last
    norm and head stay from the forward pass to the end of the backward pass, as the loss reads the
    head. A backward pass leaves the part of the mean gradient over all ranks.

    Args:
        model: The same weights on all ranks; parameters become `DTensor`s.
        precision: In which the layers' weights are gathered; gradients are summed in float32.
    """
    parameter = model.lm_head.weight
    mesh = init_device_mesh(parameter.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # states between layers stay float32, as under autocast
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")


def drop_gathered(model: nn.Module) -> None:
    """Leave a sharded network nothing but parts, after forward passes without a backward pass.

    Args:
        model: The network; one that is not sharded stays as it is.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def local_part(value: Tensor) -> Tensor:
    """Return what this rank holds of a tensor.

    Args:
        value: Sharded or not.
    """
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor; all ranks call this.

    Args:
        value: Sharded or not.

    Returns:
        Gathered, in new memory, or as it is.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Return this rank's part of a tensor that all ranks have.

    Args:
        value: Whole, the same everywhere.
        model: Sharded in the way that is wanted, or not at all.

    Returns:
        Sharded, in new memory, or as it is.
    """
    if not isinstance(model, DTensor):
        return value
    # without a source nothing is sent: each rank cuts out its own
    return distribute_tensor(
        value.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    ).clone()
