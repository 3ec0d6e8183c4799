"""The processes that share a fit."""

import torch
import torch.distributed as processes
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce


class Ranks:
    """The processes of `torch.distributed`'s default group or, where it is not initialised, this one alone.

    Attributes:
        size: How many there are.
        index: Which one this is, from 0.
    """

    def __init__(self) -> None:
        shared = processes.is_available() and processes.is_initialized()
        self.size = processes.get_world_size() if shared else 1
        self.index = processes.get_rank() if shared else 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes; not finite on one is not finite on all. Can be recorded in a graph."""
        if self.size == 1:
            return tensor
        return all_reduce(tensor, "sum", processes.group.WORLD) / self.size

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""
        if self.size > 1:
            tensor = tensor.clone()
            processes.broadcast(tensor, 0)
        return tensor

    def share(self, number: int) -> int:
        """Return how many of `number` draws each process takes."""
        return -(-number // self.size)

    def seed(self, seed: int | None) -> None:
        """Seed the global generators: from `seed`, or one drawn from the first process's; apart on each process."""
        if seed is not None or self.size > 1:
            drawn = torch.randint(2**48, ()) if seed is None else torch.tensor(seed)
            torch.manual_seed(int(self.of_first(drawn)) + self.index)
