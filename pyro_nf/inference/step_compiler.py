"""How the steps of a fit run: plain, recorded as a graph, or compiled."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_nf.compiler import trees
from pyro_nf.compiler.recording import GraphError
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.steps import MIN_STEPS_TO_RECORD, GraphSteps, Leaves, PlainSteps, Step
from pyro_nf.programs.calls import signature
from pyro_nf.programs.program import BoundProgram, Program, Randomness

Steps = Callable[[State, Tensor, Randomness], tuple[State, Tensor]]
"""`(state, learning rates, draws) -> (state, ELBOs)`, as many steps as there are rates."""

_FORMS = ("plain", "recorded", "compiled")
# How often a step is recorded anew, where the plain one is no longer what was recorded.
_MAX_RENEWALS = 3
_ADVICE = {
    "plain": "usual causes are .item(), a Python `if` on a tensor, and shapes that depend on values: use torch.where "
    "and masks",
    "recorded": "the compiler needs a C++ compiler, g++ or clang, on the machine",
}


class StepCompiler:
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
        ranks: ProcessGroup,
        num_steps: int,
        block: int,
    ) -> None:
        self.mode, self.program, self.objective, self.adam = mode, program, objective, adam
        self.params, self.ranks, self.num_steps, self.block = params, ranks, num_steps, block
        self.form, self.reason, self.seconds = "plain", "", 0.0
        self._known: dict[Any, PlainSteps | GraphSteps] = {}
        self._uses: Counter[Any] = Counter()
        self._seen: set[Any] = set()
        self._num_renewals = 0

    def continued(self, num_steps: int, block: int) -> "StepCompiler":
        """Return one for a fit that goes on with the same steps: what was recorded is kept, its time is not its own."""
        twin = copy(self)
        twin.num_steps, twin.block, twin.seconds = num_steps, block, 0.0
        return twin

    def steps(
        self,
        state: State,
        num_particles: int,
        pair: BoundProgram,
        fixed: bool,
        check: bool = False,
    ) -> Steps:
        """Return the steps for these arguments of the model.

        What a model computes in Python, from its own attributes or from data, is part of a recorded step as it was when
        that was recorded. So the step is compared with the plain one: where `check` asks for it and, of data that are
        not fixed, at the second, third, fifth, eighth ... use of a recorded step. Where they differ it is recorded
        anew; from the fourth time on, all steps run plain, with one warning.

        Args:
            state: A state of the fit.
            num_particles: Draws a step.
            pair: Model and guide with their arguments.
            fixed: Whether these arguments are the same all through the fit: their values may be part of the graph.
                Else one graph serves all tensors of their shapes.
            check: Whether to compare a step that is known with the plain one.
        """
        values, spec = trees.flatten((pair.args, pair.kwargs))
        leaves = () if fixed else tuple(value for value in values if isinstance(value, Tensor))

        def bound(leaves: Leaves) -> BoundProgram:
            if fixed:  # the objects themselves, whose contents may change
                return pair
            given = iter(leaves)
            args, kwargs = trees.unflatten(
                [next(given) if isinstance(value, Tensor) else value for value in values], spec
            )
            return pair.program.bind(*args, **kwargs)

        # An objective may change its form between blocks of steps.
        key = (self.objective.path_gradient, None if fixed else signature(pair.args, pair.kwargs))
        self._uses[key] += 1
        if check:
            self.objective.refresh()
        new = key not in self._known
        due = not new and self.mode is not False and (check or (not fixed and is_now_and_then(self._uses[key])))
        # All processes compare and prepare when one has to, for they choose the form together; none asks where plain
        # steps are all that is wanted.
        anywhere: Callable[[bool], bool] = bool if self.mode is False else self.ranks.any
        if (new or due) if fixed else anywhere(new or due):
            start = time.perf_counter()
            changed = "" if new else self._change(key, state, num_particles, pair, leaves)
            if anywhere(bool(changed)):
                self._renew(changed)
            if anywhere(key not in self._known):
                self._warn_of_shapes(key, leaves)
                self._known[key] = self._prepare(bound, state, num_particles, leaves, self.block if fixed else 1)
            self.seconds += time.perf_counter() - start
        run = self._known[key]
        return lambda state, rates, draws: run(state, rates, draws, leaves)

    def changed(self, state: State, num_particles: int, pair: BoundProgram) -> str:
        """Say how the plain step differs from the one that was taken last, whose data are fixed, if it does."""
        self.objective.refresh()
        changed = self._change((self.objective.path_gradient, None), state, num_particles, pair, ())
        found = [said for said in self.ranks.gather(changed) if said]
        return found[0] if found else ""

    def _change(
        self,
        key: Any,
        state: State,
        num_particles: int,
        pair: BoundProgram,
        leaves: Leaves,
    ) -> str:
        """Say how the plain step differs from a known one, on draws that no other step has."""
        run = self._known.get(key)
        if not isinstance(run, GraphSteps):
            return ""
        with self.ranks.no_sync(), torch.random.fork_rng():
            torch.manual_seed(self._uses[key])
            draws = pair.draw(num_particles)
            return run.difference(state.params, draws, leaves)

    def _renew(self, changed: str) -> None:
        """Forget what was recorded: all of it, for what has changed may be part of it."""
        self._known.clear()
        self._uses.clear()  # and compare as often as at first
        self._num_renewals += 1
        if self._num_renewals > _MAX_RENEWALS and self.ranks.index == 0:
            warnings.warn(
                f"the step runs plain from here on, which is slower: recorded {self._num_renewals} times, it is once "
                f"more not what the model does, which has {changed or 'another result on one of the processes'} (what "
                "changes during a fit should be a tensor, changed in place; what is computed from data, tensors too)",
                stacklevel=7,
            )

    def _warn_of_shapes(self, key: Any, leaves: Leaves) -> None:
        unseen = key not in self._seen
        self._seen.add(key)
        if unseen and leaves and self._known and self.mode is not False and self.ranks.index == 0:
            warnings.warn(
                f"data of new shapes, {[tuple(leaf.shape) for leaf in leaves]}: the step is prepared again",
                stacklevel=7,
            )

    def _prepare(
        self, bound: Callable[[Leaves], BoundProgram], state: State, num_particles: int, leaves: Leaves, block: int
    ) -> PlainSteps | GraphSteps:
        def step(state: State, learning_rate: Tensor, draws: Randomness, leaves: Leaves) -> tuple[State, Tensor]:
            elbo, surrogate = self.objective.estimate(bound(leaves), draws)
            shared = self.ranks.mean(torch.cat([elbo.view(1), *_gradients(surrogate, self.params)]))
            new = self.adam.update(state, shared[0], shared[1:], learning_rate)
            if not all(param.requires_grad for param in self.params):
                new = new.hold(state, _free(self.params))
            return new, shared[0]

        plain = PlainSteps(step, self.params)
        self.form, self.reason = "plain", "compile=False"
        if self.mode is False:
            return plain
        if self._num_renewals > _MAX_RENEWALS:
            self.reason = "what the model does in Python has changed too often to be recorded again"
            return plain
        if self.mode == "auto" and self.num_steps < MIN_STEPS_TO_RECORD:
            self.reason = f"{self.num_steps} steps are too few for recording to pay"
            return plain
        bound(leaves).spec  # noqa: B018 - a first run draws: here, as where steps are plain
        # The processes must take the same form, for each rounds in its own way; none waits for another until all know.
        with self.ranks.no_sync():
            forms, reason, failed = self._rehearse(plain, step, bound, state, num_particles, leaves, block)
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
        bound: Callable[[Leaves], BoundProgram],
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
                draws = bound(leaves).draw(num_particles)
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


def _gradients(surrogate: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of minus the surrogate by each parameter, flat; zero for one that is frozen by now."""
    trained = [param for param in params if param.requires_grad]
    grads = iter(torch.autograd.grad(-surrogate, trained, allow_unused=True, materialize_grads=True) if trained else ())
    return [(next(grads) if param.requires_grad else torch.zeros_like(param)).reshape(-1) for param in params]


def _free(params: Sequence[Tensor]) -> Tensor:
    """Return which entries of the parameters, side by side, are trained."""
    return torch.cat([torch.full_like(param, param.requires_grad, dtype=torch.bool).reshape(-1) for param in params])


def is_now_and_then(number: int) -> bool:
    """Whether this is one of 2, 3, 5, 8, 13, ..., Fibonacci's numbers: ever rarer, and in step with no period."""
    five = 5 * number * number
    return number > 1 and any(math.isqrt(square) ** 2 == square for square in (five - 4, five + 4))
