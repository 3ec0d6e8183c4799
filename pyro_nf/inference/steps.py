"""Steps of a fit as a graph of tensor operations, free of Python, that a compiler can take.

Pyro's effect handlers, the particles' `vmap`, the gradient and the optimiser are ordinary Python around tensor
operations. Running a step once under `make_fx` records the operations alone. All tensors that a step reads become
inputs of the graph: what it is given, the parameters, and those that a model holds, such as data and buffers. Random
operations stay in the graph, in their order: from one seed, its draws are those of the plain step.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize

from pyro_nf.compiler.inductor import compile_graph
from pyro_nf.compiler.recording import GraphError, lift, merge, record, without_reading
from pyro_nf.compiler.scripts import scripted
from pyro_nf.inference.optim import State
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.programs.program import Randomness

Leaves = tuple[Tensor, ...]
Step = Callable[[State, Tensor, Randomness, Leaves], tuple[State, Tensor]]
"""`(state, learning rate, draws, data) -> (state, ELBO)`."""

# How far a graph's results may be from the plain step's: relative to the largest entry of a parameter's gradient, some
# thousand rounding units of float32, which sums in another order leave; and relative to the largest of all, for
# gradients that are zero but for rounding.
TOLERANCE, TOLERANCE_OF_ALL = 1e-3, 1e-5
# Later in a fit results may be all rounding: gradients at the optimum are zero, deep flows are chaotic. How far that
# moves them is seen where parameters are moved by some rounding units, and what differs by some times as much is equal.
_ROUNDING_UNITS, _TIMES = 8, 20

# Operations of a compiled graph: more steps in one call save calls, but take longer to compile.
MAX_OPERATIONS_UNROLLED = 1500
MAX_UNROLL = 2

# What `pays_to_compile` assumes, measured on one core of an AMD EPYC. No clock decides: a seed gives the same run.
COMPILE_SECONDS, COMPILE_SECONDS_PER_OPERATION, SECONDS_SAVED_PER_OPERATION = 4.0, 0.012, 4e-6
# Recording a step takes as long as some 200 plain steps; those that follow are five to twenty times as fast.
MIN_STEPS_TO_RECORD = 300


class PlainSteps:
    """Run a step as it is, several times.

    Args:
        step: A step that reads the parameters where they are.
        params: The parameters, whose values side by side are `state.params`.
    """

    def __init__(self, step: Step, params: Sequence[Tensor]) -> None:
        self._step, self._params = step, params

    def __call__(self, state: State, rates: Tensor, draws: Randomness, leaves: Leaves) -> tuple[State, Tensor]:
        """Take a step for each of the learning rates; return the state and the ELBOs, `(num_steps,)`."""
        values = []
        for i, rate in enumerate(rates):
            write(state.params, self._params)
            state, value = self._step(state, rate, draws.step(i), leaves)
            values.append(value)
        return state, torch.stack(values)


class GraphSteps:
    """Run a step as a graph, several times.

    Args:
        step: A step that reads the parameters where they are.
        params: The parameters, whose values side by side are `state.params`.
        state: A state of the fit.
        draws: Draws for one step.
        leaves: Data.

    Raises:
        GraphError: If the step cannot be recorded, as where control flow depends on values.
    """

    def __init__(self, step: Step, params: Sequence[Tensor], state: State, draws: Randomness, leaves: Leaves) -> None:
        self._plain = PlainSteps(step, params)
        self._params = params
        self._example = state, draws, leaves
        self._num_plates = len(draws.indices)
        names = list(draws.indices)

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            old, (rate, noise, *rest) = State(*inputs[: len(state)]), inputs[len(state) :]
            given = Randomness(noise, dict(zip(names, rest[: len(names)], strict=True)))
            data = rest[len(names) :]
            constants, reading = without_reading(inputs, data)
            with constants, reading:
                new, value = step(old, rate, given, tuple(data))
            return *new, value

        inputs = (*state, state.params.new_zeros(()), draws.noise, *draws.indices.values(), *leaves)
        with self._rehearsal():
            try:
                # Copies, for one tensor given twice would be one input.
                self._graph = record(function, *(tensor.clone() for tensor in inputs))
            except GraphError:
                raise
            except Exception as error:  # whatever the model raises where its tensors have no values
                raise GraphError(first_line(error)) from error
            self._held = lift(self._graph, params)
            self._script = scripted(self._graph, (*(tensor.clone() for tensor in inputs), *self._held))
        self.unroll = 1
        self._call: Callable[..., Leaves] = self._scripted_steps

    @property
    def size(self) -> int:
        """Number of operations of a step."""
        return sum(node.op == "call_function" for node in self._graph.graph.nodes)

    def pays_to_compile(self, num_steps: int) -> bool:
        """Whether compiling takes less time than it saves in a quarter of so many steps, by an estimate.

        A run whose end is not known mostly stops long before the bound on its steps.
        """
        cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATION * self.size
        return cost < num_steps / 4 * self.size * SECONDS_SAVED_PER_OPERATION

    def compile(self, num_steps: int) -> None:
        """Compile the graph of several steps, as many as divide `num_steps` and are small, and call it once.

        Raises:
            GraphError: If the compiler refuses, or there is none.
        """
        most = min(MAX_UNROLL, max(1, MAX_OPERATIONS_UNROLLED // self.size))
        self.unroll = max(u for u in range(1, most + 1) if num_steps % u == 0)
        on_gpu = self._params[0].is_cuda
        # The compiler's own random numbers are faster by a little, but not those of the plain step. In small steps
        # most of the time goes into making tensors, which is fastest from C++, at once.
        options = {
            "fallback_random": True,
            # A captured graph would repeat what the first calls did, and these share nothing with other processes.
            "triton.cudagraphs": on_gpu and ProcessGroup().size == 1,
            "cpp_wrapper": not on_gpu,
            "memory_planning": not on_gpu,
        }
        state, draws, leaves = self._example
        rates, draws = state.params.new_zeros(self.unroll), _repeated(draws, self.unroll)
        given = (*state, rates, draws.noise, *draws.indices.values(), *leaves)
        inputs = (*(tensor.clone() for tensor in given), *self._held)
        with self._rehearsal(), torch.no_grad():
            try:
                steps = self._steps if on_gpu else self._steps_in_place
                graph = record(functionalize(steps, remove="mutations"), *inputs)
                merge(graph)
                self._call = compile_graph(graph, inputs, options)
                self(state, rates, draws, leaves)
            except Exception as error:  # the compiler's errors are of many kinds
                self.unroll, self._call = 1, self._scripted_steps
                raise GraphError(first_line(error)) from error

    def verify(self) -> None:
        """Compare ELBO and gradient with the plain step's, here and at perturbed parameters, from one seed.

        Raises:
            GraphError: If they differ.
        """
        here, draws, leaves = self._example
        draws = _repeated(draws, self.unroll)
        with self._rehearsal():
            for _ in range(2):
                wanted, got = (self._result(steps, here, draws, leaves) for steps in (self._plain, self))
                if not self._are_close(wanted, got):
                    raise GraphError("the graph's results differ from the plain step's")
                # Near enough that deep flows are not chaotic in float32, far enough that nothing is at its identity.
                here = wanted[0]._replace(params=here.params + 0.01 * torch.randn_like(here.params))

    def difference(self, params: Tensor, draws: Randomness, leaves: Leaves) -> str:
        """Say how the plain step, as it is now, differs from the graph on the same noise: in no way, an empty string.

        Args:
            params: The parameters' values.
            draws: Draws for one step.
            leaves: Data.
        """
        here, draws = State.start(params), _repeated(draws, self.unroll)
        with self._rehearsal(params):
            wanted, got = (self._result(steps, here, draws, leaves) for steps in (self._plain, self))
            if self._are_close(wanted, got):
                return ""
            unit = _ROUNDING_UNITS * torch.finfo(params.dtype).eps
            near = State.start(params + unit * params.abs() * torch.randn_like(params))
            if self._are_close(wanted, got, self._result(self._plain, near, draws, leaves)):
                return ""
        elbos = [float(elbo.mean()) for _, elbo in (wanted, got)]
        if _close(wanted[1], got[1]):
            return "another gradient than the recorded step"
        return f"an ELBO of {elbos[0]:.6g} on draws on which the recorded step has {elbos[1]:.6g}"

    def _result(self, steps: Any, here: State, draws: Randomness, leaves: Leaves) -> tuple[State, Tensor]:
        """Take steps from one seed, at the rate 0: parameters stay, and the averages are those of the gradient."""
        torch.manual_seed(1)
        result: tuple[State, Tensor] = steps(here, here.params.new_zeros(self.unroll), draws, leaves)
        return result

    def _are_close(
        self, wanted: tuple[State, Tensor], got: tuple[State, Tensor], near: tuple[State, Tensor] | None = None
    ) -> bool:
        """Whether states and ELBOs are equal up to rounding, which may be as large as `near` is away."""
        sizes = [param.numel() for param in self._params]
        largest = _size(wanted[0].mean)
        one, other, third = (
            [*state.mean.split(sizes), elbos, *state] for state, elbos in (wanted, got, near or wanted)
        )
        atol = [TOLERANCE_OF_ALL * largest] * len(sizes) + [0.0] * (len(one) - len(sizes))
        return all(
            _close(a, b, least + _TIMES * _size(a - c)) for a, b, c, least in zip(one, other, third, atol, strict=True)
        )

    def __call__(self, state: State, rates: Tensor, draws: Randomness, leaves: Leaves) -> tuple[State, Tensor]:
        """Take a step for each of the learning rates; return the state and the ELBOs, `(num_steps,)`."""
        values = []
        given = (draws.noise, *draws.indices.values())
        whole = len(rates) // self.unroll * self.unroll
        on_gpu = self._params[0].is_cuda
        # A compiled call writes over the state that it is given.
        state = State(*(tensor.clone() for tensor in state))
        with torch.no_grad():  # gradients are operations of the graph
            for start in range(0, len(rates), self.unroll):
                # What is left over by whole calls runs as recorded.
                call = self._call if start < whole else self._scripted_steps
                part = slice(start, start + self.unroll)
                if on_gpu:
                    torch.compiler.cudagraph_mark_step_begin()
                now = (rates[part], *(tensor[part] for tensor in given))
                *new, value = call(*state, *now, *leaves, *self._held)
                if on_gpu:  # the next call writes over the outputs of this one
                    new, value = [tensor.clone() for tensor in new], value.clone()
                state = State(*new)
                values.append(value)
        return state, torch.cat(values)

    def _steps(self, *inputs: Tensor) -> Leaves:
        """Take the steps of one call: states, learning rates and draws of each step, data."""
        return self._steps_of(self._graph, inputs)

    def _scripted_steps(self, *inputs: Tensor) -> Leaves:
        return self._steps_of(self._script, inputs)

    def _steps_of(self, graph: Callable[..., Leaves], inputs: Leaves) -> Leaves:
        first, second = len(State._fields), len(State._fields) + 2 + self._num_plates
        state, (rates, *draws), leaves = inputs[:first], inputs[first:second], inputs[second:]
        values = []
        for i in range(len(rates)):
            *new, value = graph(*state, rates[i], *(tensor[i] for tensor in draws), *leaves)
            state = tuple(new)
            values.append(value)
        return *state, torch.stack(values)

    def _steps_in_place(self, *inputs: Tensor) -> Leaves:
        """Take the steps of one call, writing the new state over the old: no memory is asked for and freed again."""
        state, (*new, values) = inputs[: len(State._fields)], self._steps(*inputs)
        return *(old.copy_(value) for old, value in zip(state, new, strict=True)), values

    @contextmanager
    def _rehearsal(self, params: Tensor | None = None) -> Iterator[None]:
        """Leave parameters and random state as they were, and warnings for the run itself."""
        level = logging.root.manager.disable
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)  # the compiler's remarks on its own ways
            try:
                yield
            finally:
                logging.disable(level)
                write(self._example[0].params if params is None else params, self._params)


def write(flat: Tensor, params: Sequence[Tensor]) -> None:
    """Copy values that stand side by side into the parameters."""
    with torch.no_grad():
        parts = flat.split([param.numel() for param in params])
        for part, param in zip(parts, params, strict=True):
            param.copy_(part.view_as(param))


def read(params: Sequence[Tensor]) -> Tensor:
    """Return the parameters' values side by side."""
    return torch.cat([param.detach().reshape(-1) for param in params])


def first_line(error: Exception) -> str:
    """Return what an error says, in short."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _repeated(draws: Randomness, num_steps: int) -> Randomness:
    """Other draws of the same kind for each step: the given ones, rolled along the particles."""
    noise = torch.stack([draws.noise.roll(i, -1) for i in range(num_steps)])
    return Randomness(noise, {name: torch.stack([rows] * num_steps) for name, rows in draws.indices.items()})


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().nan_to_num(posinf=0.0).amax()) if tensor.numel() else 0.0


def _close(wanted: Tensor, got: Tensor, atol: float = 0.0) -> bool:
    return torch.allclose(wanted.double(), got.double(), 0.0, TOLERANCE * _size(wanted) + atol, equal_nan=True)
