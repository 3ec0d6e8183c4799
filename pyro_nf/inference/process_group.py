"""The processes that share a fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as processes
from torch import Tensor

T = TypeVar("T")

# Whether this process goes on without the others for now.
_alone = False


@torch.library.custom_op("pyro_nf::mean_over_ranks", mutates_args=())
def _mean_over_ranks(tensor: Tensor) -> Tensor:
    """One operation of a graph, that asks when it runs whether the others take part."""
    total = tensor.clone()
    if not _alone:
        processes.all_reduce(total)
        total /= processes.get_world_size()
    return total


@_mean_over_ranks.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


class ProcessGroup:
    """The processes of `torch.distributed`'s default group or, where it is not initialised, this one alone.

    All of them must make the same calls in the same order: a process that makes another, or ends, ends the others'
    waiting by an exception, at once or after the `timeout` of `init_process_group`.

    Attributes:
        size: How many there are.
        index: Which one this is, from 0.
    """

    def __init__(self) -> None:
        shared = processes.is_available() and processes.is_initialized()
        self.size = processes.get_world_size() if shared else 1
        self.index = processes.get_rank() if shared else 0
        # Where flags are exchanged: NCCL, say, takes no tensors of the processor.
        backends = processes.get_backend_config() if shared else "cpu:"
        self._device = "cpu" if "cpu:" in backends else backends.partition(":")[0]
        self._seed = 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes; not finite on one is not finite on all. Can be recorded in a graph."""
        return tensor if self.size == 1 else _mean_over_ranks(tensor)  # type: ignore[no-any-return]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let `mean`, also in graphs, return this process's own tensor: nobody waits for one that fails here."""
        global _alone
        before, _alone = _alone, True
        try:
            yield
        finally:
            _alone = before

    def any(self, flag: bool) -> bool:
        """Return whether one of the processes says so."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag), device=self._device)
        processes.all_reduce(said, processes.ReduceOp.MAX)
        return bool(said)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            processes.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""
        if self.size > 1:
            tensor = tensor.clone()
            processes.broadcast(tensor, 0)
        return tensor

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first process, or raise on all what it raises there."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.index == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        processes.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        made: T = outcome[0]
        return made

    def same(self, check: Callable[[], None]) -> None:
        """Check something on each process, and raise on all what the first that fails raises."""
        error = None
        try:
            check()
        except ValueError as raised:
            error = raised
        failed = next((each for each in self.gather(error) if each is not None), None)
        if failed is not None:
            raise failed

    def share(self, number: int) -> int:
        """Return how many of `number` draws each process takes."""
        return -(-number // self.size)

    def seed(self, seed: int | None) -> None:
        """Seed the global generators, all alike: from `seed`, or one drawn from the first process's."""
        if self.size > 1:
            seed = self.from_first(lambda: int(torch.randint(2**48, ())) if seed is None else seed)
        if seed is not None:
            self._seed = seed
            torch.manual_seed(seed)

    def reseed_by_rank(self) -> None:
        """Seed the generators apart, once model and guide have set themselves up alike."""
        if self.size > 1:
            torch.manual_seed(self._seed + self.index)
