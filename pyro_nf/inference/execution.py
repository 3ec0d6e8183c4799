"""How the steps of a fit run: plain, recorded as a graph, or compiled."""

import time
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_nf.inference.graph import MIN_STEPS_TO_RECORD, GraphError, GraphSteps, Leaves, PlainSteps, Step
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.ranks import Ranks
from pyro_nf.objectives import ELBO
from pyro_nf.tracing import Draws, Program, signature

Steps = Callable[[State, Tensor, Draws], tuple[State, Tensor]]
"""`(state, learning rates, draws) -> (state, ELBOs)`, as many steps as there are rates."""

_FORMS = ("plain", "recorded", "compiled")
_ADVICE = {
    "plain": "usual causes are .item(), a Python `if` on a tensor, and shapes that depend on values: use torch.where "
    "and masks",
    "recorded": "the compiler needs a C++ compiler, g++ or clang, on the machine",
}


class Execution:
    """Makes the steps of a fit, in the form that pays.

    Args:
        mode: The form asked for: `False` plain, `True` compiled, "auto" what pays within `num_steps`.
        program: Model and guide.
        objective: What to maximise.
        adam: The optimiser.
        params: The parameters.
        ranks: The processes that share the gradient.
        num_steps: How many steps may be taken.
        block: A number of steps that will be asked for at once, where data are fixed.

    Attributes:
        form: "plain", "recorded" or "compiled", of the latest data.
        reason: Why it is not compiled, or an empty string.
        seconds: Time spent on recording and compiling.
    """

    def __init__(
        self,
        mode: bool | Literal["auto"],
        program: Program,
        objective: ELBO,
        adam: GuardedAdam,
        params: Sequence[Tensor],
        ranks: Ranks,
        num_steps: int,
        block: int,
    ) -> None:
        self.mode, self.program, self.objective, self.adam = mode, program, objective, adam
        self.params, self.ranks, self.num_steps, self.block = params, ranks, num_steps, block
        self.form, self.reason, self.seconds = "plain", "", 0.0
        self._known: dict[Any, Callable[[State, Tensor, Draws, Leaves], tuple[State, Tensor]]] = {}

    def steps(
        self, state: State, num_particles: int, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: bool
    ) -> Steps:
        """Return the steps for these arguments of the model.

        Args:
            state: A state of the fit.
            num_particles: Draws a step.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
            fixed: Whether these arguments are the same all through the fit: their values may be part of the graph.
                Else one graph serves all tensors of their shapes.
        """
        values, spec = pytree.tree_flatten((args, kwargs))
        leaves = () if fixed else tuple(value for value in values if isinstance(value, Tensor))
        # An objective may change its form between blocks of steps.
        key = (self.objective.path_gradient, None if fixed else signature(args, kwargs))
        new = key not in self._known
        # All processes prepare when one has to, for they choose the form together.
        if new if fixed or self.mode is False else self.ranks.any(new):

            def arguments(leaves: Leaves) -> Any:
                given = iter(leaves)
                filled = [next(given) if isinstance(value, Tensor) and not fixed else value for value in values]
                return pytree.tree_unflatten(filled, spec)

            start = time.perf_counter()
            if new and not fixed and self._known and self.mode is not False and self.ranks.index == 0:
                warnings.warn(
                    f"data of new shapes, {[tuple(leaf.shape) for leaf in leaves]}: the step is prepared again",
                    stacklevel=6,
                )
            self._known[key] = self._prepare(arguments, state, num_particles, leaves, self.block if fixed else 1)
            self.seconds += time.perf_counter() - start
        run = self._known[key]
        return lambda state, rates, draws: run(state, rates, draws, leaves)

    def _prepare(
        self, arguments: Callable[[Leaves], Any], state: State, num_particles: int, leaves: Leaves, block: int
    ) -> PlainSteps | GraphSteps:
        def step(state: State, learning_rate: Tensor, draws: Draws, leaves: Leaves) -> tuple[State, Tensor]:
            args, kwargs = arguments(leaves)
            elbo, surrogate = self.objective.estimate(self.program, draws, args, kwargs)
            grads = torch.autograd.grad(-surrogate, self.params, allow_unused=True, materialize_grads=True)
            shared = self.ranks.mean(torch.cat([elbo.view(1), *(grad.reshape(-1) for grad in grads)]))
            return self.adam.update(state, shared[0], shared[1:], learning_rate), shared[0]

        plain = PlainSteps(step, self.params)
        self.form, self.reason = "plain", "compile=False"
        if self.mode is False:
            return plain
        if self.mode == "auto" and self.num_steps < MIN_STEPS_TO_RECORD:
            self.reason = f"{self.num_steps} steps are too few for recording to pay"
            return plain
        self.program.structure(*arguments(leaves))  # a first run draws: here, as where steps are plain
        # The processes must take the same form, for each rounds in its own way; none waits for another until all know.
        with self.ranks.rehearsal():
            forms, reason, failed = self._rehearse(plain, step, arguments, state, num_particles, leaves, block)
        outcomes = self.ranks.gather((len(forms) - 1, reason, failed))
        reached, self.reason, failed = min(outcomes, key=lambda outcome: outcome[0])
        self.form = _FORMS[reached]
        if failed and self.ranks.index == 0:
            warnings.warn(
                f"the step runs {self.form}, not compiled: {self.reason} ({_ADVICE[self.form]})", stacklevel=6
            )
        return forms[reached]

    def _rehearse(
        self,
        plain: PlainSteps,
        step: Step,
        arguments: Callable[[Leaves], Any],
        state: State,
        num_particles: int,
        leaves: Leaves,
        block: int,
    ) -> tuple[list[PlainSteps | GraphSteps], str, bool]:
        """Return the forms from plain on as far as it goes, why no further, and whether that is a failure."""
        forms: list[PlainSteps | GraphSteps] = [plain]
        vectorized = self.program.vectorized
        try:
            with torch.random.fork_rng():  # a recorded fit has the draws of a plain one
                draws = self.program.draw(num_particles, *arguments(leaves))
            graph = GraphSteps(step, self.params, state, draws, leaves)
            if not self.program.vectorized:
                raise GraphError("the model cannot be batched over draws")
            graph.verify()
            forms.append(graph)
            if self.mode == "auto" and not graph.pays_to_compile(self.num_steps):
                too_long = f"compiling {graph.size} operations takes too long to pay within {self.num_steps} steps"
                return forms, too_long, False
            compiled = copy(graph)
            compiled.compile(block)
            compiled.verify()
            forms.append(compiled)
        except GraphError as error:
            return forms, str(error), True
        finally:
            self.program.vectorized = vectorized  # what recording could not batch, a plain step can
        return forms, "", False
