"""A fit by steps of Adam, from where model and guide are: one object for one fit."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_nf.approximations.approximation import start_at_modes
from pyro_nf.approximations.pairs import check_pair, paired_density
from pyro_nf.flows import unpaced
from pyro_nf.inference.checkpoint import Progress, random_state, set_random_state
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.evaluation import (
    checked_spec,
    evaluate,
    evaluation_of_steps,
    notes,
    sites_without_density,
    trained_parameters,
    warn_of_nothing_observed,
)
from pyro_nf.inference.fingerprint import Identity
from pyro_nf.inference.minibatches import Minibatches
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.options import StepOptions
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.result import Evaluation, FitResult, Status
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.inference.staged.guide import StagedGuide
from pyro_nf.inference.step_compiler import StepCompiler, is_now_and_then
from pyro_nf.inference.step_runner import StepRunner
from pyro_nf.inference.steps import read, write
from pyro_nf.inference.watch import Watch
from pyro_nf.interface.untrusted import check_writable
from pyro_nf.programs.matching import warn_of_mismatches
from pyro_nf.programs.program import BoundProgram, Program

# Non-finite steps in a row that end a run: by then no draw of the guide has a density that can be used.
_MAX_RUN_SKIPPED = 100
# Learning rates that are tried, for how many steps, and how far below the best of them the fit stays: what rises
# fastest at first is too coarse near the end.
_RATES, _TRIAL_STEPS, _CAUTION = (0.1, 0.03, 0.01, 0.003), 100, 1 / 3
# Fewer steps than this say little of an ELBO.
_FEW_STEPS = 10

MakeCompiler = Callable[..., StepCompiler]


class StepFit:
    """A fit by steps, from the guide's present state to its best one.

    Args:
        program: Model and guide.
        data: Both with their arguments, for one step after another.
        options: What the fit is to do.
        watch: What is shown and heeded on the way.
        fixed: Whether the arguments are the same all through.
        name: What the steps are called on the progress bar.
        is_stage: Whether this is a part of a staged fit, which has looked at the data already.
        make_compiler: Makes what makes the steps.
    """

    def __init__(
        self,
        program: Program,
        data: Iterator[BoundProgram],
        options: StepOptions,
        watch: Watch,
        *,
        fixed: bool = True,
        name: str = "steps",
        is_stage: bool = False,
        make_compiler: MakeCompiler = StepCompiler,
    ) -> None:
        self.program, self.data, self.options, self.watch = program, data, options, watch
        self.fixed, self.name, self.is_stage, self.make_compiler = fixed, name, is_stage, make_compiler
        self.ranks = ProcessGroup()

    def run(self, resume: Path | None = None) -> FitResult:
        """Fit, and leave the best state in the guide.

        Args:
            resume: A checkpoint to go on from.
        """
        before = random_state()
        try:
            self.ranks.seed(self.options.seed)
            first = next(self.data)
            checked_spec(first)  # which makes the guide's flows
            # Here the learning rate is found for the parameters as they are.
            with unpaced(self.program.guide):
                return self._fit(first, resume)
        finally:
            if self.options.seed is not None:
                set_random_state(before)

    def _fit(self, first: BoundProgram, resume: Path | None) -> FitResult:
        begin = time.perf_counter()
        options, ranks = self.options, self.ranks
        params = self._params(first)
        starts = self._start_at_modes(first) if options.num_starts and resume is None else None
        ranks.reseed_by_rank()
        flat = _shared(ranks, params)
        identity = self._identity(first, params)
        resumed = None if resume is None else Progress.load(resume, flat, ranks, identity)
        steps = self._steps(first, params)
        fit: Progress | None = None
        status, said, earlier = Status.INTERRUPTED, "", 0.0
        try:
            options.objective.start_block(options.objective.annealing_steps, math.inf, flat)
            steps.prepare(State.start(flat))
            fit = self._begin(steps, params, flat) if resumed is None else self._go_on(*resumed)
            earlier = fit.seconds
            status, said = self._go(fit, steps, params, flat, identity, begin - earlier)
        except KeyboardInterrupt:
            if ranks.size > 1:  # the others are at another step, or run on
                raise
            self.watch.interrupt()
        finally:
            write(flat if fit is None else fit.best[0], params)
        if fit is None:
            fit = Progress(State.start(flat), PlateauSchedule(math.nan, options.max_steps))
            fit.observe(self._evaluate(first, 0), torch.stack([flat, flat]))
        fit.seconds = earlier + time.perf_counter() - begin
        return self._result(fit, status, said, steps, params, starts)

    def _params(self, first: BoundProgram) -> list[Tensor]:
        """Return what is trained, once it is known that the guide is one of the model and the data are data."""
        if isinstance(self.program.guide, StagedGuide):
            check_pair(first)
        warn_of_mismatches(first)
        params = trained_parameters(first)
        if not self.is_stage:
            warn_of_nothing_observed(first)
            if self.fixed:
                first.check_data()
        return params

    def _start_at_modes(self, first: BoundProgram) -> Any:
        guide: Any = self.program.guide
        number = self.options.num_starts
        if not isinstance(guide, StagedGuide):
            return guide.warm_start(*first.args, num_starts=number, **first.kwargs)
        density = paired_density(first)
        starts, found = start_at_modes(guide.approximation(), density, number, self.watch.report)
        guide.take_over(found)
        return starts

    def _identity(self, first: BoundProgram, params: Sequence[Tensor]) -> Identity:
        """Return what a checkpoint of this fit is known by, once it is known that one can be written."""
        path = self.options.checkpoint
        if path is not None:
            self.ranks.from_first(lambda: check_writable("checkpoint", path))
        return Identity(first, params, self.options.objective, self.options.of_a_checkpoint(), self.fixed)

    def _steps(self, first: BoundProgram, params: Sequence[Tensor]) -> StepRunner:
        options = self.options
        adam = GuardedAdam(options.clip_norm, options.weight_decay)
        compiler = self.make_compiler(
            options.compile,
            self.program,
            options.objective,
            adam,
            params,
            self.ranks,
            options.max_steps,
            options.eval_every,
        )
        particles = self.ranks.share(options.num_particles)
        return StepRunner(compiler, particles, self.data, first, self.fixed, self.watch)

    def _begin(self, steps: StepRunner, params: Sequence[Tensor], flat: Tensor) -> Progress:
        """Find the learning rate, and evaluate the guide as it is."""
        state = State.start(flat)
        try:
            rate = self._find_rate(steps, state) if self.options.learning_rate is None else self.options.learning_rate
        finally:
            write(flat, params)
        fit = Progress(state, PlateauSchedule(rate, self.options.max_steps))
        fit.observe(self._evaluate(steps.program, 0), torch.stack([flat, flat]))
        return fit

    def _go_on(self, fit: Progress, random: list[Tensor]) -> Progress:
        """Return a resumed fit as it was, but for its upper bound of steps."""
        fit.schedule.set_max_steps(self.options.max_steps, fit.steps)
        set_random_state(random)
        return fit

    def _go(
        self,
        fit: Progress,
        steps: StepRunner,
        params: Sequence[Tensor],
        flat: Tensor,
        identity: Identity,
        begin: float,
    ) -> tuple[Status, str]:
        """Take steps until the schedule or something else ends them; return what does, and a sentence if it needs one.

        `begin` is the time at which the fit would have begun, had all of it been now.
        """
        watch, ranks, said = self.watch, self.ranks, ""
        while fit.steps < fit.schedule.last_step and not ranks.any(watch.ended is not None):
            if not self._block(fit, steps, flat):
                break  # at the end of its time
            fit.seconds = time.perf_counter() - begin
            if self.options.checkpoint is not None:
                fit.save(self.options.checkpoint, ranks, identity)
            watch.report(self.name, fit.steps, fit.schedule.last_step, fit.evaluations[-1].elbo)
            write(fit.state.params, params)
            if fit.steps >= fit.schedule.last_step:
                said = steps.changed(fit.state)
            stops = watch.ask(fit.evaluations[-1])
            if fit.state.run_skipped >= _MAX_RUN_SKIPPED:
                return Status.FAILED, self._blame(steps.program)
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

    def _block(self, fit: Progress, steps: StepRunner, flat: Tensor) -> bool:
        """Take the steps up to the next evaluation and note them; return whether there were enough to note."""
        objective, data = self.options.objective, self.data
        num_steps = min(self.options.eval_every, fit.schedule.last_step - fit.steps)
        objective.start_block(fit.steps, fit.log_weight_std(self.options.num_particles), flat)
        rates = fit.schedule.rates(fit.steps, num_steps, flat)
        if isinstance(data, Minibatches):
            data.start_block()
        state, elbos = steps.take(fit.state.restart_average(), rates, self._is_due(fit), fit, self.name)
        if isinstance(data, Minibatches):
            data.find_faults(elbos)
        if not len(elbos) or (len(elbos) < min(num_steps, _FEW_STEPS) and fit.history):
            return False
        fit.state = state
        fit.history.append(elbos)
        fit.observe(evaluation_of_steps(fit.steps, elbos), torch.stack([fit.state.average, fit.state.params]))
        fit.schedule.observe([e for e in fit.evaluations if e.step >= objective.annealing_steps])
        return True

    def _is_due(self, fit: Progress) -> bool:
        """Whether the next block's step is compared with the plain one first.

        Callbacks and objectives of the user's may change what a step does at any time; otherwise now and then will do.
        """
        own = type(self.options.objective).__module__ != ELBO.__module__
        return bool(self.watch.callbacks) or own or is_now_and_then(len(fit.evaluations))

    def _find_rate(self, steps: StepRunner, state: State) -> float:
        """Try each learning rate from the start, and return one below that whose last steps have the highest ELBO."""
        reached = {}
        for number, rate in enumerate(_RATES):
            rates = PlateauSchedule(rate, self.options.max_steps).rates(0, _TRIAL_STEPS, state.params)
            shown = f"learning rate {number + 1} of {len(_RATES)}"
            elbos = steps.take(state, rates, False, None, shown)[1]
            if len(elbos) < _TRIAL_STEPS:
                return math.nan  # there is no time to use it
            last = elbos[_TRIAL_STEPS // 2 :]
            reached[rate] = float(last.mean()) if last.isfinite().all() else -math.inf
        return _CAUTION * max(reached, key=lambda rate: reached[rate])

    def _evaluate(self, program: BoundProgram, step: int) -> Evaluation:
        options = self.options
        return evaluate(program, self.ranks, step, options.eval_particles, options.num_particles, options.eval_every)

    def _choose(self, program: BoundProgram, fit: Progress, params: Sequence[Tensor]) -> Evaluation:
        """Leave the best block's average or its last state in the guide, whichever is better; return its evaluation."""
        found = []
        same = random_state()  # on the same draws and minibatches, whose noise may hide the difference
        for candidate in fit.best:
            set_random_state(same)
            write(candidate, params)
            found.append(self._evaluate(program, fit.best_evaluation.step))
        chosen = int(found[1].elbo > found[0].elbo)
        write(fit.best[chosen], params)
        return found[chosen]

    def _result(
        self, fit: Progress, status: Status, said: str, steps: StepRunner, params: Sequence[Tensor], starts: Any
    ) -> FitResult:
        """Leave the best state in the guide, evaluate it, and say how the fit ended."""
        compiler, before = steps.compiler, time.perf_counter()
        final = self._choose(steps.program, fit, params)
        if status is Status.CONVERGED and not math.isfinite(final.elbo):
            status, said = Status.PLATEAU_NOT_REACHED, "not converged: the best state has draws without a density"
        return FitResult(
            elbo=final.elbo,
            elbo_mcse=final.mcse,
            status=status,
            stop_reason=said or self._sentence(status, self.watch.steps_before + fit.steps, fit.schedule.plateau_step),
            notes=notes(steps.program),
            steps=fit.steps,
            best_step=fit.best_evaluation.step,
            plateau_step=fit.schedule.plateau_step,
            num_skipped=int(fit.state.num_skipped),
            seconds=fit.seconds + time.perf_counter() - before,
            learning_rate=fit.schedule.learning_rate,
            execution=compiler.form,
            execution_reason=compiler.reason,
            compile_seconds=compiler.seconds,
            path_gradient=self.options.objective.path_gradient,
            stages=(),
            starts=starts,
            history=torch.cat([fit.state.params.new_empty(0), *fit.history]),
            evaluations=tuple(fit.evaluations),
            model=self.program.model,
            guide=self.program.guide,
            args=steps.program.args if self.fixed else None,
            kwargs=steps.program.kwargs if self.fixed else {},
        )

    def _sentence(self, status: Status, step: int, plateau_step: int | None) -> str:
        """Say how the fit ended."""
        bound = self.options.max_steps
        return {
            Status.CONVERGED: f"converged: the ELBO reached a plateau at step {plateau_step}",
            Status.PLATEAU_NOT_REACHED: f"not converged: the ELBO reached no plateau within max_steps={bound}",
            Status.INTERRUPTED: f"interrupted after step {step}",
            Status.STOPPED: f"stopped by a callback at step {step}",
            Status.TIME: f"out of time: max_seconds={self.options.max_seconds} were over after step {step}",
        }.get(status, status.value)

    def _blame(self, program: BoundProgram) -> str:
        """Say which sites have no finite density."""
        names = sites_without_density(program, self.ranks, self.options.num_particles) or ["the gradient alone"]
        return (
            f"failed: {_MAX_RUN_SKIPPED} steps in a row had a non-finite loss or gradient; "
            f"sites without a finite density: {', '.join(names)}"
        )


def _shared(ranks: ProcessGroup, params: Sequence[Tensor]) -> Tensor:
    """Return the first process's parameters side by side, written on all."""
    shapes = ranks.gather([tuple(param.shape) for param in params])
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"model and guide must be the same on all processes; got parameters of shapes {shapes}")
    flat = ranks.broadcast(read(params))
    write(flat, params)
    return flat
