"""FlowSVI: fit a guide, stop when it is done, keep the best."""

import copy
import dataclasses
import itertools
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.improper import flat_directions
from pyro_nf.approximations.pairs import check_pair, paired_density
from pyro_nf.flows import unpaced
from pyro_nf.inference.checkpoint import Progress, random_state, set_random_state
from pyro_nf.inference.elbo import ELBO, CoordinateELBO
from pyro_nf.inference.execution import Execution, Steps, is_now_and_then
from pyro_nf.inference.fingerprint import Identity
from pyro_nf.inference.minibatches import Call, Fault, Minibatches, faults_in_words
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.process_group import Ranks
from pyro_nf.inference.result import Evaluation, FitResult, Status
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.inference.staged.chain import Staged, StagePlan, fit_in_stages
from pyro_nf.inference.steps import MAX_UNROLL, read, write
from pyro_nf.inference.watch import Callback, Watch
from pyro_nf.interface.arguments import (
    check_choice,
    check_flag,
    check_number,
    check_whole_number,
    explain_failure,
    named_arguments,
    unpacked,
)
from pyro_nf.interface.untrusted import check_writable
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.coordinates import names_of
from pyro_nf.programs.matching import matched_spec, warn_of_mismatches
from pyro_nf.programs.program import Program, ProgramSpec, Randomness, TracePair
from pyro_nf.programs.sites import is_data
from pyro_nf.programs.traces import guide_log_prob, in_words, log_prob_sum

# Non-finite steps in a row that end a run: by then no draw of the guide has a density that can be used.
_MAX_RUN_SKIPPED = 100
# Normals that are drawn at once, for many steps of a small model.
_MAX_NOISE = 2**22
# Minibatches of the first evaluation and the last ones, whose steps are plain and so slow.
_MAX_EVAL_BATCHES = 100
# Draws that are looked at, at most, where some have no density.
_NUM_SUSPECTS = 20_000
# Options that a checkpoint is of: with others, its fit would have been another one.
_OPTIONS = ("num_particles", "learning_rate", "weight_decay", "eval_every", "clip_norm", "seed")
# Coordinates up to which directions are looked for along which a posterior is improper.
_MAX_IMPROPER_DIM = 500
# Steps that leave room for stages.
_MIN_STAGED = 3000
# In stages: numbers that the model makes in a step, at most, and draws that are taken in any case.
_MAX_WORK, _MIN_STAGED_PARTICLES = 2**23, 64
# Learning rates that are tried, for how many steps, and how far below the best of them the fit stays: what rises
# fastest at first is too coarse near the end.
_RATES, _TRIAL_STEPS, _CAUTION = (0.1, 0.03, 0.01, 0.003), 100, 1 / 3

# Fewer steps than this say little of an ELBO.
_FEW_STEPS = 10


class FlowSVI:
    """Stochastic variational inference that stops by itself, for any Pyro guide with reparametrised draws.

    Each step takes the gradient of the objective over `num_particles` draws, batched by `vmap`, and updates all
    parameters of model and guide by Adam with clipping; a step with a non-finite loss or gradient changes nothing and
    is counted. The ELBO of the last `eval_every` steps, each on draws of its own, is watched: the parameters of the
    best such block, averaged over its steps, are kept, and a plateau starts the cool-down that ends the run.

    An `AutoFlow` is fitted in stages. "normal": climbs from eight points, and from the best mode (or from the guide's
    own start, where the modes are worse) natural gradients to the normal that is nearest to the posterior. "curve", up
    to 100 coordinates: the triangular map of that normal, of second order, that is nearest. "flow": in coordinates in
    which the normal is the standard one, all of the flow; "flow, longer" goes on at a lower rate. Each stage is
    measured by the importance weights of 5,000 fresh draws, and what is better is kept; the first whose divergence from
    the posterior is below 0.005 nats (a normal's below 0.001, a curve's below 0.002), and whose effective draws are
    more than 98.5%, ends the fit. "tails": where k-hat is then 0.2 or higher, a share of the base gets wider, if that
    lowers k-hat by 0.1 and costs less than 0.003 nats. `result.stages` has the figures. Where a draw of the model takes
    much work, steps have fewer draws. A fit with a `learning_rate`, an `objective` or a `checkpoint`, with `max_steps`
    below 3,000, of a model with parameters of its own, by minibatches or on several processes is a single stage from
    where the guide is.

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
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        self.num_particles = check_whole_number("num_particles", num_particles)
        self.learning_rate = None if learning_rate is None else check_number("learning_rate", learning_rate, above=0)
        self.weight_decay = check_number("weight_decay", weight_decay, least=0)
        self.max_steps = check_whole_number("max_steps", max_steps)
        self.eval_every = check_whole_number("eval_every", eval_every)
        self.eval_particles = check_whole_number("eval_particles", eval_particles)
        self.clip_norm = check_number("clip_norm", clip_norm, above=0)
        self.num_starts = check_whole_number("num_starts", num_starts, least=0)
        if self.num_starts and not hasattr(guide, "warm_start"):
            raise ValueError(f"num_starts must be 0 for a guide without warm_start; got a {type(guide).__name__}")
        self.compile: bool | Literal["auto"] = check_choice("compile", compile, (True, False, "auto"))
        self.max_seconds = None if max_seconds is None else check_number("max_seconds", max_seconds, above=0)
        self.seed = None if seed is None else check_whole_number("seed", seed, least=0)
        self.progress = check_flag("progress", progress)
        self.callbacks = _checked_callbacks(callbacks)
        self.checkpoint = None if checkpoint is None else _checked_path(checkpoint)
        self.program = Program(model, guide)
        self._own_objective = objective is None
        self.objective = ELBO() if objective is None else _checked_objective(objective)

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
        args, kwargs = unpacked(args, kwargs)
        with self._watch() as watch:
            staged = self._in_stages(args, kwargs, watch)
            result = staged or self._run(itertools.repeat((args, kwargs)), fixed=True, watch=watch)
            return self._explained(result, args, kwargs)

    def _watch(self) -> AbstractContextManager[Watch]:
        ranks = Ranks()
        shown = self.progress and ranks.index == 0
        # Of several processes each is at another step, or runs on.
        return Watch(self.callbacks, self.max_seconds, shown).looking_out(for_interrupts=ranks.size == 1)

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
            result = self._run(data, fixed=False, watch=watch)
            return _with_faults(result, list(itertools.chain(*Ranks().gather(data.faults))))

    @one_at_a_time
    def resume(self, *args: Any, **kwargs: Any) -> FitResult:
        """Go on with the run that wrote the checkpoint, to the result that it would have had, bit for bit.

        Raises:
            ValueError: If there is no checkpoint, or one of other parameters or of another number of processes; else as
                `run`.
        """
        if self.checkpoint is None or not Ranks().from_first(self.checkpoint.exists):
            got = None if self.checkpoint is None else str(self.checkpoint)
            raise ValueError(f"checkpoint must name a file that a run has written; got {got!r}")
        args, kwargs = unpacked(args, kwargs)
        with self._watch() as watch:
            return self._run(itertools.repeat((args, kwargs)), fixed=True, watch=watch, resume=self.checkpoint)

    def _in_stages(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch | None = None) -> FitResult | None:
        """Fit in stages, unless something that the user asked for is of a single one."""
        asked = self.learning_rate is not None or self.checkpoint is not None or not self._own_objective
        if asked or self.max_steps < _MIN_STAGED or Ranks().size > 1 or not isinstance(self.program.guide, Staged):
            return None

        watch = Watch() if watch is None else watch
        before = random_state()
        try:
            if self.seed is not None:
                torch.manual_seed(self.seed)  # before the first run, which makes the guide's networks
            structure = self._structure(args, kwargs)
            trained = any(site["type"] == "param" for site in structure.traces.model.nodes.values())
            if structure.subsamples or trained or self.program.own_randomness():
                return None
            self.program.check_data()
            self._warn_of_nothing_observed(args, kwargs)
            density, improper = self._proper_density(args, kwargs)
            fit = self._stage_fit(density, args, kwargs, watch)
            result = fit_in_stages(
                fit, self.program, density, self.num_starts, self.max_steps, args, kwargs, watch, self.num_particles
            )
            notes = (*self._notes(args, kwargs), *improper)
            return None if result is None else dataclasses.replace(result, notes=notes)
        finally:
            if self.seed is not None:
                set_random_state(before)

    def _proper_density(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Density, list[str]]:
        """Return the density that stages fit, and a sentence if it is one only once improper directions are left out.

        Along these the guide gets a standard normal; along all others it is fitted to the posterior.
        """
        guide: Any = self.program.guide
        density = paired_density(self.program.model, guide, args, kwargs)
        with torch.random.fork_rng(), torch.no_grad():
            dim = guide.get_posterior().event_shape[0]
            if dim > _MAX_IMPROPER_DIM:
                return density, []
            points = guide.get_posterior().sample((2 * dim + 10,))
            found = flat_directions(density.gradients, points)
        if not found:
            return density, []
        proper = Density(found.made_proper(density.log_density), self.program.num_numbers)
        return proper, [found.describe(names_of(guide.latent_sites()))]

    def _stage_fit(
        self, density: Density, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch
    ) -> Callable[[StagePlan], FitResult]:
        """Return what fits the guide as it is by steps, as a stage's plan says."""
        guide: Any = self.program.guide
        svi = copy.copy(self)
        svi.num_starts = 0
        executions: dict[str, Execution] = {}

        def fit(plan: StagePlan) -> FitResult:
            svi.learning_rate, svi.max_steps, svi.eval_every = plan.learning_rate, plan.max_steps, plan.eval_every
            svi.seed = None if self.seed is None else self.seed + plan.number
            affordable = max(_MIN_STAGED_PARTICLES, _MAX_WORK // max(density.work, 1))
            svi.num_particles = min(self.num_particles, density.size if density.is_long else affordable)
            if density.vectorized and guide.get_posterior().has_rsample:
                svi.objective = CoordinateELBO(guide.get_posterior, density)
            stem = plan.name.partition(",")[0]

            def execution(*given: Any) -> Execution:
                """What the stage before used, where this one goes on with it: its step is recorded already."""
                return executions.get(stem) or executions.setdefault(stem, Execution(*given))

            data = itertools.repeat((args, kwargs))
            here = watch.after(plan.steps_before)
            return svi._run(data, fixed=True, watch=here, make_execution=execution, plan=plan)

        return fit

    def _run(
        self,
        data: Iterator[Call],
        fixed: bool,
        watch: Watch,
        resume: Path | None = None,
        make_execution: Callable[..., Execution] = Execution,
        plan: StagePlan | None = None,
    ) -> FitResult:
        ranks = Ranks()
        before = random_state()
        try:
            ranks.seed(self.seed)
            first = next(data)
            self._structure(*first)  # which makes the guide's flows
            # Here the learning rate is found for the parameters as they are.
            with unpaced(self.program.guide):
                return self._fit(first, data, fixed, ranks, watch, resume, make_execution, plan)
        finally:
            if self.seed is not None:
                set_random_state(before)

    def _fit(
        self,
        first: Call,
        data: Iterator[Call],
        fixed: bool,
        ranks: Ranks,
        watch: Watch,
        resume: Path | None,
        make_execution: Callable[..., Execution],
        plan: StagePlan | None,
    ) -> FitResult:
        start = time.perf_counter()
        args, kwargs = first
        params = self._params(args, kwargs)
        if plan is None:  # a stage's data are known
            self._warn_of_nothing_observed(args, kwargs)
        if plan is None and fixed:
            self.program.check_data()
        starts = None
        if self.num_starts and resume is None:
            starts = self._start_at_modes(args, kwargs, watch)
        ranks.part()
        flat = _shared(ranks, params)
        identity = self._identity(params, ranks, args, kwargs, fixed)
        resumed = None if resume is None else Progress.load(resume, flat, ranks, identity)
        adam = GuardedAdam(self.clip_norm, self.weight_decay)
        execution = make_execution(
            self.compile, self.program, self.objective, adam, params, ranks, self.max_steps, self.eval_every
        )
        steps = _Steps(execution, ranks.share(self.num_particles), data, args, kwargs, fixed, watch)
        fit: Progress | None = None
        status, said, earlier = Status.INTERRUPTED, "", 0.0
        try:
            self.objective.start_block(self.objective.annealing_steps, math.inf, flat)
            steps.prepare(State.start(flat))
            if resumed is None:
                fit = self._begin(steps, params, flat, ranks)
            else:
                fit, random = resumed
                fit.schedule.set_max_steps(self.max_steps, fit.steps)
                set_random_state(random)
            earlier = fit.seconds
            name = "steps" if plan is None else plan.name
            status, said = self._go(fit, steps, params, flat, ranks, identity, name, start - earlier)
        except KeyboardInterrupt:
            if ranks.size > 1:  # the others are at another step, or run on
                raise
            watch.interrupt()
        finally:
            write(flat if fit is None else fit.best[0], params)
        if fit is None:
            fit = Progress(State.start(flat), PlateauSchedule(math.nan, self.max_steps))
            fit.observe(self._evaluate(0, ranks, args, kwargs), torch.stack([flat, flat]))
        fit.seconds = earlier + time.perf_counter() - start
        return self._result(fit, status, said, steps, params, starts)

    def _result(
        self, fit: Progress, status: Status, said: str, steps: "_Steps", params: Sequence[Tensor], starts: Any
    ) -> FitResult:
        """Leave the best state in the guide, evaluate it, and say how the fit ended."""
        execution, before = steps.execution, time.perf_counter()
        final = self._choose(fit, params, execution.ranks, steps.args, steps.kwargs)
        if status is Status.CONVERGED and not math.isfinite(final.elbo):
            status, said = Status.PLATEAU_NOT_REACHED, "not converged: the best state has draws without a density"
        return FitResult(
            elbo=final.elbo,
            elbo_mcse=final.mcse,
            status=status,
            stop_reason=said or self._sentence(status, steps.watch.steps_before + fit.steps, fit.schedule.plateau_step),
            notes=self._notes(steps.args, steps.kwargs),
            steps=fit.steps,
            best_step=fit.best_evaluation.step,
            plateau_step=fit.schedule.plateau_step,
            num_skipped=int(fit.state.num_skipped),
            seconds=fit.seconds + time.perf_counter() - before,
            learning_rate=fit.schedule.learning_rate,
            execution=execution.form,
            execution_reason=execution.reason,
            compile_seconds=execution.seconds,
            path_gradient=self.objective.path_gradient,
            stages=(),
            starts=starts,
            history=torch.cat([fit.state.params.new_empty(0), *fit.history]),
            evaluations=tuple(fit.evaluations),
            model=self.program.model,
            guide=self.program.guide,
            args=steps.args if steps.fixed else None,
            kwargs=steps.kwargs if steps.fixed else {},
        )

    def _identity(
        self, params: Sequence[Tensor], ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: bool
    ) -> Identity:
        """Return what a checkpoint of this fit is known by, once it is known that one can be written."""
        path = self.checkpoint
        if path is not None:
            ranks.from_first(lambda: check_writable("checkpoint", path))
        options = {name: getattr(self, name) for name in _OPTIONS}
        return Identity(self.program, params, self.objective, options, args, kwargs, fixed)

    def _begin(self, steps: "_Steps", params: Sequence[Tensor], flat: Tensor, ranks: Ranks) -> Progress:
        """Find the learning rate, and evaluate the guide as it is."""
        state = State.start(flat)
        try:
            rate = self._find_rate(steps, state) if self.learning_rate is None else self.learning_rate
        finally:
            write(flat, params)
        fit = Progress(state, PlateauSchedule(rate, self.max_steps))
        fit.observe(self._evaluate(0, ranks, steps.args, steps.kwargs), torch.stack([flat, flat]))
        return fit

    def _go(
        self,
        fit: Progress,
        steps: "_Steps",
        params: Sequence[Tensor],
        flat: Tensor,
        ranks: Ranks,
        identity: Identity,
        name: str,
        start: float,
    ) -> tuple[Status, str]:
        """Take steps until the schedule or something else ends them; return what does, and a sentence if it needs one.

        `start` is the time at which the fit would have begun, had all of it been now.
        """
        watch, said = steps.watch, ""
        while fit.steps < fit.schedule.last_step and not ranks.any(watch.ended is not None):
            num_steps = min(self.eval_every, fit.schedule.last_step - fit.steps)
            self.objective.start_block(fit.steps, fit.scatter(self.num_particles), flat)
            rates = fit.schedule.rates(fit.steps, num_steps, flat)
            if isinstance(steps.data, Minibatches):
                steps.data.start_block()
            state, elbos = steps.take(fit.state.restart_average(), rates, self._is_due(fit), fit, name)
            if isinstance(steps.data, Minibatches):
                steps.data.find_faults(elbos)
            if len(elbos) < min(num_steps, _FEW_STEPS) and fit.history:
                break  # at the end of its time
            if not len(elbos):
                break
            fit.state = state
            fit.history.append(elbos)
            fit.observe(_of_steps(fit.steps, elbos), torch.stack([fit.state.average, fit.state.params]))
            fit.schedule.observe([e for e in fit.evaluations if e.step >= self.objective.annealing_steps])
            fit.seconds = time.perf_counter() - start
            if self.checkpoint is not None:
                fit.save(self.checkpoint, ranks, identity)
            watch.report(name, fit.steps, fit.schedule.last_step, fit.evaluations[-1].elbo)
            write(fit.state.params, params)
            if fit.steps >= fit.schedule.last_step:
                said = steps.changed(fit.state)
            stops = watch.ask(fit.evaluations[-1])
            if fit.state.run_skipped >= _MAX_RUN_SKIPPED:
                return Status.FAILED, self._blame(ranks, steps.args, steps.kwargs)
            if ranks.any(stops):
                return Status.STOPPED, ""
        if fit.steps < fit.schedule.last_step:
            return watch.ended or Status.TIME, ""
        if said:
            return Status.PLATEAU_NOT_REACHED, (
                f"not converged: at the end the model has {said}, and nobody knows since which step: pass compile=False"
            )
        plateau = fit.schedule.plateau_step is not None
        return (Status.CONVERGED if plateau else Status.PLATEAU_NOT_REACHED), ""

    def _is_due(self, fit: Progress) -> bool:
        """Whether the next block's step is compared with the plain one first.

        Callbacks and objectives of the user's may change what a step does at any time; otherwise now and then will do.
        """
        own = type(self.objective).__module__ != ELBO.__module__
        return bool(self.callbacks) or own or is_now_and_then(len(fit.evaluations))

    def _sentence(self, status: Status, step: int, plateau_step: int | None) -> str:
        """Say how a single fit ended."""
        return {
            Status.CONVERGED: f"converged: the ELBO reached a plateau at step {plateau_step}",
            Status.PLATEAU_NOT_REACHED: f"not converged: the ELBO reached no plateau within max_steps={self.max_steps}",
            Status.INTERRUPTED: f"interrupted after step {step}",
            Status.STOPPED: f"stopped by a callback at step {step}",
            Status.TIME: f"out of time: max_seconds={self.max_seconds} were over after step {step}",
        }.get(status, status.value)

    def _start_at_modes(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch) -> Any:
        guide: Any = self.program.guide
        if not isinstance(guide, Staged):
            return guide.warm_start(*args, num_starts=self.num_starts, **kwargs)
        density = paired_density(self.program.model, guide, args, kwargs)
        return guide.start_at_modes(density, self.num_starts, watch.report)

    def _structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProgramSpec:
        """The pair's structure; where the model fails on arguments that are no tensors, say which these are."""
        try:
            structure = matched_spec(self.program)
            for name, site in structure.traces.model.nodes.items():
                if is_data(site) and not isinstance(site["value"], (Tensor, numbers.Number)):
                    kind = type(site["value"]).__name__
                    raise ValueError(f"site {name!r} observes a {kind}: it must be a tensor, torch.as_tensor(...)")
            return structure
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            explain_failure(self.program.model, args, kwargs, error)
            raise

    def _notes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        nodes = self.program.spec.traces.model.nodes.values()
        return () if any(map(is_data, nodes)) else ("the model observes nothing: this is its prior",)

    def _warn_of_nothing_observed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        missing = [name for name, value in named_arguments(self.program.model, args, kwargs).items() if value is None]
        if missing and self._notes(args, kwargs):
            warnings.warn(
                f"{' and '.join(missing)} is None, and the model observes nothing: the fit is one to its prior. Pass "
                "the data, if there are any",
                stacklevel=4,
            )

    def _find_rate(self, steps: "_Steps", state: State) -> float:
        """Try each learning rate from the start, and return one below that whose last steps have the highest ELBO."""
        reached = {}
        for number, rate in enumerate(_RATES):
            rates = PlateauSchedule(rate, self.max_steps).rates(0, _TRIAL_STEPS, state.params)
            shown = f"learning rate {number + 1} of {len(_RATES)}"
            elbos = steps.take(state, rates, False, None, shown)[1]
            if len(elbos) < _TRIAL_STEPS:
                return math.nan  # there is no time to use it
            last = elbos[_TRIAL_STEPS // 2 :]
            reached[rate] = float(last.mean()) if last.isfinite().all() else -math.inf
        return _CAUTION * max(reached, key=lambda rate: reached[rate])

    def _params(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The unconstrained tensors of every parameter that the objective touches."""
        self._structure(args, kwargs)
        if isinstance(self.program.guide, Staged):
            check_pair(self.program, self.program.guide)
        warn_of_mismatches(self.program)
        with poutine.trace(param_only=True) as capture, torch.no_grad():
            ELBO().estimate(self.program, self.program.draw(1), args, kwargs)
        params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        params = list({id(p): p for p in params if p.requires_grad}.values())
        if not params:
            raise ValueError("neither model nor guide has a parameter to fit")
        return params

    def _choose(
        self, fit: Progress, params: Sequence[Tensor], ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Evaluation:
        """Leave the best block's average or its last state in the guide, whichever is better; return its evaluation."""
        found = []
        same = random_state()  # on the same draws and minibatches, whose noise may hide the difference
        for candidate in fit.best:
            set_random_state(same)
            write(candidate, params)
            found.append(self._evaluate(fit.best_evaluation.step, ranks, args, kwargs))
        chosen = int(found[1].elbo > found[0].elbo)
        write(fit.best[chosen], params)
        return found[chosen]

    def _evaluate(self, step: int, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        """Evaluate on fresh draws, and on fresh minibatches where a plate is subsampled."""

        def elbo(particle: TracePair) -> dict[str, Tensor]:
            return {"elbo": log_prob_sum(particle.model) - guide_log_prob(particle.guide)}

        if not self.program.spec.subsamples:
            number = ranks.share(self.eval_particles)
            values = self.program.vmap_in_chunks(elbo, number)["elbo"]
        else:
            # Draws of one minibatch share its noise: the minibatches are what is averaged.
            particles = ranks.share(self.num_particles)
            with torch.no_grad():
                number = min(self.eval_every, _MAX_EVAL_BATCHES)
                # As epochs, in which the noise of minibatches cancels.
                draws = self.program.draw(particles, args, kwargs, number)
                batches = [self.program.vmap_traces(elbo, draws.step(i))["elbo"] for i in range(number)]
                values = torch.stack([batch.mean() for batch in batches])
        mean = ranks.mean(values.mean())
        variance = ranks.mean((values - mean).square().mean())
        return _evaluation(step, float(mean), float(variance), ranks.size * len(values))

    def _explained(self, result: FitResult, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FitResult:
        """Say why draws of the fitted guide have no density, if some have none: what rests on them is not converged."""
        if math.isfinite(result.elbo) or Ranks().size > 1:
            return result
        with torch.random.fork_rng():
            reasons = in_words(self.program.without_density(_NUM_SUSPECTS))
        if result.status in (Status.CONVERGED, Status.PLATEAU_NOT_REACHED):
            status, start = Status.PLATEAU_NOT_REACHED, "not converged"
        else:
            status, start = result.status, result.stop_reason
        return dataclasses.replace(result, status=status, stop_reason=f"{start}: {reasons}")

    def _blame(self, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say which sites have no finite density."""

        def broken(particle: TracePair) -> dict[str, Tensor]:
            sites = [site for trace in particle for site in trace.nodes.values() if site["type"] == "sample"]
            guide_log_prob(particle.model), guide_log_prob(particle.guide)
            return {site["name"]: ~torch.as_tensor(site["log_prob_sum"]).isfinite() for site in sites}

        found = self.program.vmap_in_chunks(broken, self.num_particles)
        broken_here = [name for name, flags in found.items() if bool(flags.any())]
        # A dictionary, for its order: each name once.
        names = list(dict.fromkeys(itertools.chain(*ranks.gather(broken_here)))) or ["the gradient alone"]
        return (
            f"failed: {_MAX_RUN_SKIPPED} steps in a row had a non-finite loss or gradient; "
            f"sites without a finite density: {', '.join(names)}"
        )


@dataclass
class _Steps:
    """The steps of a fit: takes as many as are asked for, unless the watch ends them.

    Attributes:
        execution: Makes the steps.
        particles: Draws a step.
        data: The model's arguments of the steps after this one.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        fixed: Whether these are the same all through.
        watch: Looked at between steps.
    """

    execution: Execution
    particles: int
    data: Iterator[Call]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fixed: bool
    watch: Watch
    _pace: int = MAX_UNROLL

    def prepare(self, state: State, check: bool = False) -> Steps:
        """Return the step for the present data; before it is needed, it is prepared where a seed wants it to be."""
        return self.execution.steps(state, self.particles, self.args, self.kwargs, self.fixed, check)

    def changed(self, state: State) -> str:
        """Say how the plain step differs from the one that was taken, if it does."""
        if not self.fixed:
            return ""  # compared as batches come
        return self.execution.changed(state, self.particles, self.args, self.kwargs)

    def take(self, state: State, rates: Tensor, check: bool, fit: Progress | None, name: str) -> tuple[State, Tensor]:
        """Take as many steps as there are rates, or as time allows; return the state and the ELBOs."""
        program = self.execution.program
        values: list[Tensor] = []
        total = len(rates)
        while rates.numel() and self._goes_on(values, total, fit, name):
            steps = self.prepare(state, check)
            check = False
            structure = program.spec
            noise = max(1, self.particles * structure.noise_dim)
            at_once = max(1, _MAX_NOISE // noise // MAX_UNROLL) * MAX_UNROLL if self.fixed else 1
            # Whole epochs, where there is room: the noise of their minibatches cancels in a block's average.
            epoch = max((size // part * MAX_UNROLL for size, part in structure.subsamples.values()), default=1)
            at_once = at_once // epoch * epoch or at_once
            now, rates = rates.tensor_split((at_once,))
            draws = program.draw(self.particles, self.args, self.kwargs, len(now))
            state, elbos = self._some(steps, state, now, draws)
            values.append(elbos)
            if len(elbos) < len(now):
                break
            self.args, self.kwargs = next(self.data)
        return state, torch.cat([rates.new_empty(0), *values])

    def _goes_on(self, values: list[Tensor], total: int, fit: Progress | None, name: str) -> bool:
        if self.execution.ranks.size > 1:  # which look at their clocks between blocks, together
            return True
        if fit is None:
            return self.watch.report(name, sum(map(len, values)), total, math.nan)
        done = fit.steps + sum(map(len, values))
        return self.watch.report(name, done, fit.schedule.last_step, fit.evaluations[-1].elbo)

    def _some(self, steps: Steps, state: State, rates: Tensor, draws: Randomness) -> tuple[State, Tensor]:
        """Take steps, in parts between which the watch is looked at: results are the same in whatever parts."""
        if self.execution.ranks.size > 1:
            return steps(state, rates, draws)
        values: list[Tensor] = []
        done = 0
        while done < len(rates) and (not done or self.watch.ended is None):
            begin = time.perf_counter()
            part = slice(done, done + self._pace)
            indices = {name: rows[part] for name, rows in draws.indices.items()}
            state, elbos = steps(state, rates[part], Randomness(draws.noise[part], indices))
            values.append(elbos)
            done += len(elbos)
            self._pace = self.watch.num_steps(len(elbos), time.perf_counter() - begin, MAX_UNROLL)
        return state, torch.cat(values)


def _shared(ranks: Ranks, params: Sequence[Tensor]) -> Tensor:
    """Return the first process's parameters side by side, written on all."""
    shapes = ranks.gather([tuple(param.shape) for param in params])
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"model and guide must be the same on all processes; got parameters of shapes {shapes}")
    flat = ranks.of_first(read(params))
    write(flat, params)
    return flat


def _checked_objective(objective: Any) -> ELBO:
    if not isinstance(objective, ELBO):
        raise ValueError(
            "objective must be one of pyro_nf.inference.elbo, such as ELBO(), or None for that; got "
            f"{type(objective).__module__}.{type(objective).__qualname__}"
        )
    return objective


def _checked_path(checkpoint: Any) -> Path:
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(f"checkpoint must be a file's path, or None; got {checkpoint!r}")
    path = Path(os.fsdecode(checkpoint))
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint must be a path in a folder that exists; got {str(path)!r}: make the folder first")
    if path.is_dir():
        raise ValueError(f"checkpoint must be a file's path; got the folder {str(path)!r}: name a file in it")
    return path


def _checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    given = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    if not isinstance(callbacks, Iterable) or not all(map(callable, given)):
        raise ValueError(f"callbacks must be a list of functions of an Evaluation; got {callbacks!r}")
    return given


def _with_faults(result: FitResult, faults: list[Fault]) -> FitResult:
    """Say in the result which minibatches had no data to fit to: what comes without them is no fit to all the data."""
    if not faults:
        return result
    reason = f"{faults_in_words(faults, result.steps)} ({result.stop_reason.removeprefix('converged: ')})"
    warnings.warn(reason, stacklevel=3)
    status = Status.PLATEAU_NOT_REACHED if result.status is Status.CONVERGED else result.status
    return dataclasses.replace(result, status=status, stop_reason=f"not converged: {reason}")


def _of_steps(step: int, elbos: Tensor) -> Evaluation:
    """Evaluate by the ELBOs of steps: of the finite ones, unless these are few."""
    finite = elbos[elbos.isfinite()]
    if 2 * len(finite) < len(elbos):
        return Evaluation(step, -math.inf, math.inf)
    return _evaluation(step, float(finite.mean()), float(finite.var(correction=0)), len(finite))


def _evaluation(step: int, mean: float, variance: float, number: int) -> Evaluation:
    """Mean and standard error of independent estimates; minus infinity if one of them is not finite."""
    if not math.isfinite(mean):
        return Evaluation(step, -math.inf, math.inf)
    return Evaluation(step, mean, math.sqrt(variance / max(number - 1, 1)))
