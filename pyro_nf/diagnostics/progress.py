"""A bar for calls that take longer than about two seconds: what is being done, how much of it, and seconds left."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nf.interface.arguments import check_flag
from pyro_nf.programs.program import BoundProgram, Randomness, TracePair

# Seconds after which a call shows what it does.
_DELAY = 2.0

Item = TypeVar("Item")
Advance = Callable[[int], object]


class Progress:
    """The progress of one call, part by part, on one line that goes when the call ends.

    Args:
        caller: The function that was called.
        shown: Whether to show it, on stderr or in a notebook's cell.

    Raises:
        ValueError: If `shown` is not a `bool`.
    """

    def __init__(self, caller: str, shown: bool) -> None:
        self.caller, self.shown = caller, check_flag("progress", shown)
        self._due = time.perf_counter() + _DELAY

    @contextmanager
    def part(self, name: str, total: int) -> Iterator[Advance]:
        """Show a part of the call, and yield a function to call with how much more of `total` is done."""
        delay = max(0.0, self._due - time.perf_counter())
        # By time alone, not by counts: what comes slowly is seen too.
        options: dict[str, Any] = {"delay": delay, "miniters": 0, "leave": False, "dynamic_ncols": True}
        with tqdm(total=total, desc=f"{self.caller}: {name}", disable=not self.shown, **options) as bar:
            yield bar.update

    def over(self, name: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield the items, each a step of a part."""
        with self.part(name, total) as advance:
            for item in items:
                yield item
                advance(1)

    def chunks(self, name: str, program: BoundProgram, number: int) -> Iterator[Randomness]:
        """`BoundProgram.chunks` as a part of the call."""
        with self.part(name, number) as advance:
            yield from counted(program.chunks(number), advance)

    def map(
        self,
        name: str,
        program: BoundProgram,
        extract: Callable[[TracePair], dict[str, Tensor]],
        number: int,
    ) -> dict[str, Tensor]:
        """`BoundProgram.vmap_in_chunks` as a part of the call."""
        parts = list(map(program.repeated(extract), self.chunks(name, program, number)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def counted(chunks: Iterable[Randomness], advance: Advance) -> Iterator[Randomness]:
    """Yield draws, and count those that are done with."""
    for draws in chunks:
        yield draws
        advance(len(draws.noise))
