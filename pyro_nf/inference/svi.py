"""FlowSVI: fit a guide, stop when it is done, keep the best."""

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.evaluation import explained
from pyro_nf.inference.loop import StepFit
from pyro_nf.inference.minibatches import Fault, Minibatches, faults_in_words
from pyro_nf.inference.options import StepOptions, checked_callbacks
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.result import FitResult, Status
from pyro_nf.inference.staged.fit import fit_in_stages
from pyro_nf.inference.staged.guide import StagedGuide
from pyro_nf.inference.staged.plan import DEFAULT, Plan
from pyro_nf.inference.watch import Callback, Watch
from pyro_nf.interface.arguments import check_flag, unpacked
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.program import BoundProgram, Program

# Steps that leave room for stages.
_MIN_STAGED = 3000


class FlowSVI:
    """Stochastic variational inference that stops by itself, for any Pyro guide with reparametrised draws.

    Each step takes the gradient of the objective over `num_particles` draws, batched by `vmap`, and updates all
    parameters of model and guide by Adam with clipping; a step with a non-finite loss or gradient changes nothing and
    is counted. The ELBO of the last `eval_every` steps, each on draws of its own, is watched: the parameters of the
    best such block, averaged over its steps, are kept, and a plateau starts the cool-down that ends the run.

    An `AutoFlow` is fitted in stages. "normal": L-BFGS runs from eight points, and from the best mode (or from the
    guide's own start, where the modes are worse) natural gradients to the nearest normal. "map", up to 100 coordinates:
    the triangular map of that normal, of second order, that is nearest. "flow": in coordinates in which the normal is
    the standard one, all of the flow; "flow, longer" goes on at a lower rate. Each stage is measured by the importance
    weights of 5,000 fresh draws, and what is better is kept; the first whose divergence from the posterior is below
    0.005 nats (a normal's below 0.001, a map's below 0.002), and whose effective draws are more than 98.5%, ends the
    fit. "tails": where k-hat is then 0.2 or higher, the base becomes a mixture with a wider normal, if that lowers
    k-hat by 0.1 and costs less than 0.003 nats. `result.stages` has the figures. Where a draw of the model takes much
    work, steps have fewer draws. A fit with a `learning_rate`, an `objective` or a `checkpoint`, with `max_steps` below
    3,000, of a model with parameters of its own, by minibatches or on several processes is a single stage from where
    the guide is.

    Where `torch.distributed` is initialised (`torchrun`), the processes share the draws of each step, or have
    minibatches of their own, and average the gradient: their parameters stay equal. All make the same calls, with the
    same model, guide and options; the first one shows the progress bar, warns, and writes and reads the checkpoint, and
    a callback that ends the run on one ends it on all. Where one process ends or hangs the others raise, at the latest
    after the `timeout` of `init_process_group`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide: ours, Pyro's, or hand-written.
        objective: What to maximise; `None` for `ELBO()`.
        num_particles: Draws a step. Many fit better and cost a small model little; where each draw runs a network over
            a minibatch, take a few.
        learning_rate: Adam's rate between warm-up and cool-down. `None` tries four, from 0.1 to 0.003, for 100 steps
            each from the start, and takes a third of the one that came furthest (in stages, theirs are fixed).
        weight_decay: Decoupled decay of every parameter (AdamW).
        max_steps: Upper bound of the run.
        eval_every: Steps between evaluations (in stages, theirs are fixed).
        eval_particles: Draws of the final evaluation.
        clip_norm: Where gradients are usually longer than this, all are scaled down; single long ones are cut.
        num_starts: Before the first step, let the guide look for modes from so many points and begin there, if it can
            (`AutoFlow.warm_start`); the result says whether they agree. 0 begins where the guide is, unless the fit is
            one in stages.
        compile: Whether to record a step as a graph of tensor operations and compile it, which takes from ten seconds
            to minutes and makes small models many times faster. It is compared with the plain step first; where that
            fails, or the model cannot be recorded, a warning says why and the run goes on without. "auto" does as much
            of it as pays within `max_steps`, by an estimate from the number of operations.
        checkpoint: A file to write the fit's whole state to at each evaluation, for `resume` (a fit to minibatches
            cannot be resumed).
        callbacks: Called with each `Evaluation`, one at the end of the first stages too, while the guide holds the
            state that was reached; one that returns `True` ends the run.
        max_seconds: When to end with the best state until then, in seconds from the call. A step, and what recording
            it takes, is not cut off. `None` for no limit.
        plan: The stages of a fit in stages (`pyro_nf.inference.staged`), `None` for those above.
        seed: Makes the run reproducible bit for bit on one machine, and leaves the global random state as it was.
            `None` draws from the global state.
        progress: Whether to show a progress bar: the stage, the ELBO, how far the guide was from the posterior when it
            was last measured, and the seconds left.

    Raises:
        ValueError: If an option is not of its kind, or out of range; the sentence says what is accepted.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.inference import FlowSVI
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.5, 0.3))
        >>> guide = AutoFlow(model)
        >>> result = FlowSVI(model, guide, seed=0, progress=False, max_steps=600).run()
        >>> abs(result.elbo) < 0.01
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        objective: ELBO | None = None,
        num_particles: int = 256,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_steps: int = 10_000,
        eval_every: int = 100,
        eval_particles: int = 1000,
        clip_norm: float = 10.0,
        num_starts: int = 0,
        compile: bool | Literal["auto"] = "auto",  # noqa: A002 - as torch calls it
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callback] = (),
        max_seconds: float | None = None,
        plan: Plan | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        self.options = StepOptions(
            objective=ELBO() if objective is None else objective,
            num_particles=num_particles,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_steps=max_steps,
            eval_every=eval_every,
            eval_particles=eval_particles,
            clip_norm=clip_norm,
            num_starts=num_starts,
            compile=compile,
            checkpoint=checkpoint,  # type: ignore[arg-type]
            max_seconds=max_seconds,
            seed=seed,
        )
        if self.options.num_starts and not hasattr(guide, "warm_start"):
            raise ValueError(f"num_starts must be 0 for a guide without warm_start; got a {type(guide).__name__}")
        self.progress = check_flag("progress", progress)
        self.callbacks = checked_callbacks(callbacks)
        self.program = Program(model, guide)
        self._own_objective = objective is None
        self.plan = _checked_plan(plan, guide)
        if plan is not None and (asked := self._single()):
            raise ValueError(f"plan must be None with {asked}, which makes the fit a single stage; got a Plan")

    @one_at_a_time
    def run(self, *args: Any, **kwargs: Any) -> FitResult:
        """Fit to the model's arguments, from the guide's present state, and leave the best state in the guide.

        Ctrl-C ends the run and returns the best state until then; with several processes it leaves that state in the
        guide and is raised, as is the end of another process. Fits that several threads of a process ask for take
        turns.

        Raises:
            ValueError: If the pair cannot be fitted by reparametrised draws, the guide was made of a model with other
                latents, or the data hold NaN.
        """
        program = self._bound(args, kwargs)
        with self._watch() as watch:
            result = self._in_stages(program, watch)
            if result is None:
                result = StepFit(self.program, itertools.repeat(program), self.options, watch).run()
            return explained(result, program)

    @one_at_a_time
    def run_batches(self, batches: Iterable[Any]) -> FitResult:
        """Fit to minibatches, one for each step, over and over.

        Args:
            batches: What a `torch.utils.data.DataLoader` is: each iteration over it gives the minibatches of an epoch,
                as tuples or lists of the model's arguments, dictionaries of keyword arguments, one argument, or
                `Arguments`.
                The model scales the likelihood to the whole data itself (`pyro.plate(name, size, len(batch))`). With
                several processes each has batches of its own.
                Each of the first pass, up to 5,000, is checked before its step, by one run of model and guide. Later
                passes may hold others, drawn or augmented anew: where their data are NaN, their steps are skipped, and
                the result says so, which is then not converged.

        Raises:
            ValueError: If there are no batches, or the data of one of the first pass hold NaN: the sentence says which
                one; else as `run`.

        Warns:
            UserWarning: If minibatches of later passes were skipped.
        """
        with self._watch() as watch:
            data = Minibatches(batches, self.program)
            result = StepFit(self.program, data, self.options, watch, fixed=False).run()
            return _with_faults(result, list(itertools.chain(*ProcessGroup().gather(data.faults))))

    @one_at_a_time
    def resume(self, *args: Any, **kwargs: Any) -> FitResult:
        """Go on with the run that wrote the checkpoint, to the result that it would have had, bit for bit.

        Raises:
            ValueError: If there is no checkpoint, or one of other parameters or of another number of processes; else as
                `run`.
        """
        path = self.options.checkpoint
        if path is None or not ProcessGroup().from_first(path.exists):
            got = None if path is None else str(path)
            raise ValueError(f"checkpoint must name a file that a run has written; got {got!r}")
        program = self._bound(args, kwargs)
        with self._watch() as watch:
            return StepFit(self.program, itertools.repeat(program), self.options, watch).run(resume=path)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundProgram:
        args, kwargs = unpacked(args, kwargs)
        return self.program.bind(*args, **kwargs)

    def _watch(self) -> AbstractContextManager[Watch]:
        ranks = ProcessGroup()
        shown = self.progress and ranks.index == 0
        # Of several processes each is at another step, or runs on.
        return Watch(self.callbacks, self.options.max_seconds, shown).looking_out(for_interrupts=ranks.size == 1)

    def _in_stages(self, program: BoundProgram, watch: Watch) -> FitResult | None:
        """Fit in stages, unless something that the user asked for is of a single one."""
        guide = self.program.guide
        if self._single() or ProcessGroup().size > 1 or not isinstance(guide, StagedGuide):
            return None
        return fit_in_stages(program, guide, self.options, watch, self.plan)

    def _single(self) -> str:
        """Name the option that makes the fit a single stage, if there is one."""
        options = self.options
        asked = {
            "a learning_rate": options.learning_rate is not None,
            "a checkpoint": options.checkpoint is not None,
            "an objective": not self._own_objective,
            f"max_steps below {_MIN_STAGED:,}": options.max_steps < _MIN_STAGED,
        }
        return next((name for name, is_asked in asked.items() if is_asked), "")


def _checked_plan(plan: Any, guide: Callable[..., Any]) -> Plan:
    if plan is None:
        return DEFAULT
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan of stages, or None; got {plan!r}: Plan((Normal(), ...)) makes one")
    if not isinstance(guide, StagedGuide):
        kind = type(guide).__name__
        raise ValueError(f"plan must be None for a guide that is not fitted in stages; got a {kind}: take an AutoFlow")
    return plan


def _with_faults(result: FitResult, faults: list[Fault]) -> FitResult:
    """Say in the result which minibatches had no data to fit to: what comes without them is no fit to all the data."""
    if not faults:
        return result
    reason = f"{faults_in_words(faults, result.steps)} ({result.stop_reason.removeprefix('converged: ')})"
    warnings.warn(reason, stacklevel=3)
    status = Status.PLATEAU_NOT_REACHED if result.status is Status.CONVERGED else result.status
    return dataclasses.replace(result, status=status, stop_reason=f"not converged: {reason}")
