"""A step of a fit as one graph of tensor operations, free of Python, that a compiler can take.

Pyro's effect handlers, the particles' `vmap`, the gradient and the optimiser are ordinary Python around tensor
operations. Running a step once under `make_fx` records the operations alone. The random ones stay in the graph, in
their order: from one seed, its draws are those of the plain step, and the two can be compared.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

State = tuple[Tensor, ...]
Step = Callable[[State, Tensor], tuple[State, Tensor]]

# How far a graph's results may be from the plain step's, relative to the largest entry of each tensor: some thousand
# rounding units of float32, which sums in another order leave.
TOLERANCE = 1e-3


# Recording a step takes as long as some hundred plain steps, and about halves the time of those that follow.
MIN_STEPS_TO_RECORD = 1000
# Measured on one core of an AMD EPYC, for graphs of 450 to 3,000 operations.
COMPILE_SECONDS, COMPILE_SECONDS_PER_OPERATION = 4.0, 0.012


class GraphError(Exception):
    """A step cannot be recorded, compiled, or trusted; the message says why."""


class GraphStep:
    """A step `(state, learning_rate) -> (state, value)` that updates parameters in place, recorded as a graph.

    The parameters and all else that the step reads are the tensors themselves, not copies: a graph is good for as long
    as the program keeps these tensors.

    Args:
        step: The plain step.
        params: The tensors that it updates.
        state: What the first call gets.
        learning_rate: The learning rate of the first call, a scalar tensor.

    Raises:
        GraphError: If the step cannot be recorded, as where control flow depends on values.
    """

    def __init__(self, step: Step, params: Sequence[Tensor], state: State, learning_rate: Tensor) -> None:
        self._step, self._params, self._inputs = step, params, (state, learning_rate)
        with self._rehearsal():
            try:
                self._graph = make_fx(step)(state, learning_rate)
            except Exception as error:  # whatever the model raises where its tensors have no values
                raise GraphError(_first_line(error)) from error
        self._call: Step = self._graph

    @property
    def size(self) -> int:
        """Number of operations."""
        return len(self._graph.graph.nodes)

    def pays_to_compile(self, steps: int) -> bool:
        """Whether compiling takes less than half of the time that so many steps take without."""
        with self._rehearsal():
            self(*self._inputs)
            start = time.perf_counter()
            for _ in range(5):
                self(*self._inputs)
            seconds = (time.perf_counter() - start) / 5
        return 2 * (COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATION * self.size) < steps * seconds

    def compile(self) -> None:
        """Compile the graph, and call it once.

        Raises:
            GraphError: If the compiler refuses, or there is none.
        """
        # The compiler's own random numbers are faster by a little, but not those of the plain step.
        self._call = torch.compile(self._graph, fullgraph=True, options={"fallback_random": True})
        with self._rehearsal():
            try:
                self(*self._inputs)
            except Exception as error:  # the compiler's errors are of many kinds
                self._call = self._graph
                raise GraphError(_first_line(error)) from error

    def verify(self) -> None:
        """Compare a step of the graph with the plain one, here and at perturbed parameters, from one seed.

        Raises:
            GraphError: If value, parameters or state differ.
        """
        for shift in (0.0, 0.1):
            wanted, got = self._outcome(self._step, shift), self._outcome(self, shift)
            for one, other in zip(wanted, got, strict=True):
                scale = one.abs().nan_to_num(posinf=0.0).amax() if one.numel() else 0.0
                if not torch.allclose(one.double(), other.double(), 0.0, TOLERANCE * float(scale), equal_nan=True):
                    raise GraphError("the graph's results differ from the plain step's")

    def __call__(self, state: State, learning_rate: Tensor) -> tuple[State, Tensor]:
        """Take a step."""
        with torch.no_grad():  # gradients are operations of the graph
            return self._call(state, learning_rate)

    def _outcome(self, step: Step, shift: float) -> list[Tensor]:
        with self._rehearsal():
            torch.manual_seed(0)
            with torch.no_grad():
                for param in self._params:
                    param.add_(shift * torch.randn_like(param))
            state, value = step(*self._inputs)
            return [value, *state, *(param.detach().clone() for param in self._params)]

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Leave parameters and random state as they were, and warnings for the run itself."""
        kept = [param.detach().clone() for param in self._params]
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                with torch.no_grad():
                    for param, value in zip(self._params, kept, strict=True):
                        param.copy_(value)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
