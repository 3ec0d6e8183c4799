"""Minibatches as a fit goes through them, and which of them have data that are no data."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_nf.compiler import trees
from pyro_nf.interface.arguments import unpacked
from pyro_nf.programs.program import BoundProgram, Program

# Minibatches of the first pass that are looked at, each by a run of model and guide.
MAX_CHECKED = 5000
# What is kept of a block's minibatches, to look at those whose steps were skipped: 256 MiB.
_MAX_KEPT = 2**28
# Faults that a sentence lists.
_MAX_LISTED = 3


class Fault(NamedTuple):
    """A minibatch to which nothing could be fitted, by its number, and why."""

    minibatch: str
    problem: str


class Minibatches:
    """The arguments of a model, a minibatch at a time, in passes over an iterable without end.

    Those of the first pass are checked before they are handed out. Later ones may be others, drawn or augmented anew:
    where a step was skipped, its minibatch is looked at when the block of steps has ended, so that no step waits.

    Args:
        batches: Minibatches: tuples or lists of arguments, dictionaries of keyword arguments, or one argument.
        program: Model and guide.

    Attributes:
        faults: Minibatches whose steps were skipped for their data, and what is wrong with them.
    """

    def __init__(self, batches: Iterable[Any], program: Program) -> None:
        self.faults: list[Fault] = []
        self._program = program
        self._passes = self._go_through(batches)
        self._block: list[tuple[str, BoundProgram | None]] = []
        self._room = _MAX_KEPT

    def __iter__(self) -> Iterator[BoundProgram]:
        return self

    def __next__(self) -> BoundProgram:
        return next(self._passes)

    def start_block(self) -> None:
        """Let the minibatch that was handed out last be that of the first step of a block."""
        del self._block[:-1]
        self._room = _MAX_KEPT

    def find_faults(self, elbos: Tensor) -> None:
        """Look at the minibatches of those steps of the block whose ELBO is not finite, `(steps,)`."""
        for step in (~elbos.isfinite()).nonzero()[:, 0].tolist():
            name, pair = self._block[step]
            problem = "too large to be looked at" if pair is None else self._problem(pair) or _not_finite(pair)
            if problem:
                self.faults.append(Fault(name, problem))

    def _go_through(self, batches: Iterable[Any]) -> Iterator[BoundProgram]:
        number_of_pass = 0
        while True:
            number_of_pass += 1
            number = 0
            for number, batch in enumerate(batches, 1):
                pair, name = self._bound(batch), f"minibatch {number} of pass {number_of_pass}"
                self._keep(name, pair)
                checked = number_of_pass == 1 and number <= MAX_CHECKED
                if checked and (problem := self._problem(pair, number == 1)):
                    raise ValueError(f"{name}: {problem}")
                yield pair
            if not number:
                raise ValueError(
                    "batches must give minibatches at each iteration over it; it gave none (a generator gives them "
                    "once: pass a list or a DataLoader)"
                )

    def _bound(self, batch: Any) -> BoundProgram:
        """Return model and guide with a minibatch as their arguments."""
        if isinstance(batch, Mapping):
            return self._program.bind(**batch)
        args, kwargs = unpacked(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
        return self._program.bind(*args, **kwargs)

    def _keep(self, name: str, pair: BoundProgram) -> None:
        self._room -= sum(leaf.nbytes for leaf in trees.leaves_of((pair.args, pair.kwargs)) if isinstance(leaf, Tensor))
        self._block.append((name, pair if self._room >= 0 else None))

    def _problem(self, pair: BoundProgram, first: bool = False) -> str:
        """Say what is wrong with the data of a minibatch, if anything is."""
        # The very first run, which sets the guide up, is the fit's own, and checks the data.
        try:
            if first:
                pair.spec  # noqa: B018
            else:
                pair.check_data()
        except ValueError as error:
            return str(error)
        except LinAlgError:  # of this draw
            pass
        return ""


def faults_in_words(faults: list[Fault], steps: int) -> str:
    """Say how many steps were skipped for their minibatches, which ones, and what is wrong with the first."""
    names = [fault.minibatch for fault in faults[:_MAX_LISTED]]
    more = [f"{len(faults) - _MAX_LISTED} more"] if len(faults) > _MAX_LISTED else []
    return f"{len(faults)} of {steps} steps were skipped, {', '.join([*names, *more])}: {faults[0].problem}"


def _not_finite(pair: BoundProgram) -> str:
    """Count what could be the matter where observed values are not, as in covariates."""
    leaves = [leaf for leaf in trees.leaves_of((pair.args, pair.kwargs)) if isinstance(leaf, Tensor)]
    number = sum(int((~leaf.isfinite()).sum()) for leaf in leaves)
    return f"its arguments hold {number} numbers that are NaN or infinite" if number else ""
