"""The process group as the trainer sees it: rank, size, sums and equal gradients.

The launcher (Ray Train or `stage.launch_local`) makes the group; without one a process is alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ursa.errors import ConfigError

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
