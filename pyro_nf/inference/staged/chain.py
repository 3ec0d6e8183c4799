"""The stages of a plan one after another: each measured, the best kept, and the account of them all."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.diagnostics.weights import WeightSummary
from pyro_nf.inference.result import Evaluation, FitResult, StageResult, Status
from pyro_nf.inference.staged.measure import NUM_DRAWS, Known, gap, is_better, is_good, measure
from pyro_nf.inference.staged.plan import Plan
from pyro_nf.inference.staged.stage import Fitted, Problem, Stage
from pyro_nf.inference.watch import Watch

Show = Callable[[Approximation], None]
"""Gives an approximation to the guide, for callbacks to see."""

_EARLY = (Status.INTERRUPTED, Status.STOPPED, Status.TIME, Status.FAILED)


class Attempt(NamedTuple):
    """What came of a stage.

    Attributes:
        name: The stage's name.
        fitted: What it has come to.
        account: The account of its steps.
        found: Importance weights of fresh draws; `None` if they are not finite.
        seconds: Wall time.
        kept: Whether it was better than all before it.
    """

    name: str
    fitted: Fitted
    account: FitResult
    found: WeightSummary | None
    seconds: float
    kept: bool


class Chain:
    """A staged fit on its way.

    What ends it early, Ctrl-C, a callback or the clock, ends it with the best until then. A stage that is worse than
    what was there before is dropped, the first one too.

    Args:
        problem: What is fitted.
        start: Where the guide is.
        account: An account of no steps, to be filled in.
        max_steps: Upper bound of all steps together.
        num_particles: Draws of a step, by which the time that a stage takes is estimated.
        watch: What is shown and heeded on the way.
        show: Gives an approximation to the guide.

    Attributes:
        attempts: All stages so far.
        best: The best of them, or the start.
        ended: What ended the chain before its time, if anything did.
    """

    def __init__(
        self,
        problem: Problem,
        start: Approximation,
        account: FitResult,
        max_steps: int,
        num_particles: int,
        watch: Watch,
        show: Show,
    ) -> None:
        self.max_steps, self.watch = max_steps, watch
        self.attempts: list[Attempt] = []
        self.ended: Status | None = None
        nothing = torch.empty(0)
        self.best = Attempt("start", Fitted(start, nothing), account, None, 0.0, True)
        self._problem, self._num_particles, self._show, self._blank = problem, num_particles, show, account
        self._begin = time.perf_counter()
        self._seconds_per_point = 0.0

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return sum(attempt.account.steps for attempt in self.attempts)

    def run(self, plan: Plan) -> FitResult:
        """Go through the plan, and return the account of all stages together."""
        for stage in plan.stages:
            if not stage.applies(self.best.fitted.approximation):
                continue
            if self.num_steps >= self.max_steps or not self._has_time_for(stage):
                break
            if self._attempt(stage) or self.ended is not None:
                break
        if not self.attempts:  # nothing applied
            self._measure_best()
            self._add(self.best)
        for stage in plan.finish:
            if self.ended is None and stage.applies(self.best.fitted.approximation):
                self._finish(stage)
        return self._result(plan)

    def _has_time_for(self, stage: Stage) -> bool:
        """Whether the time that is left is enough for what a stage does before it is measured first."""
        if not self.attempts or self._seconds(stage) < self.watch.seconds_left:
            return True
        self.ended = Status.TIME
        return False

    def _seconds(self, stage: Stage) -> float:
        return self._seconds_per_point * stage.num_points(self._num_particles)

    def _attempt(self, stage: Stage) -> bool:
        """Fit a stage, measure it, and keep it if it is better; return whether it is good enough."""
        start = time.perf_counter()
        try:
            fitted = self._fit(stage)
            if fitted is None:
                return False
            found, known = self._measured(fitted.approximation)
            account = fitted.steps
            if account is None:  # steps of an optimizer have evaluations of their own
                account = self._without_optimizer(fitted, found)
                self._show(fitted.approximation)
                if self.watch.after(self.num_steps).ask(account.evaluations[0]):
                    self.ended = Status.STOPPED
            if self._has_changed(known):
                found, _ = self._measured(fitted.approximation)
                self._measure_best()
            kept = self._is_better(fitted, found)
        except KeyboardInterrupt:  # the stage is lost, which may be anywhere
            self.watch.interrupt()
            if not self.attempts:
                self._measure_best()
                self._add(self.best)
            self.ended = Status.INTERRUPTED
            return False
        self._add(Attempt(stage.name, fitted, account, found, time.perf_counter() - start, kept))
        if self.best.found is not None:
            self.watch.note_gap(gap(self.best.found))
        self.ended = self.ended or (account.status if account.status in _EARLY else self.watch.ended)
        return kept and is_good(found, stage.max_gap)

    def _finish(self, stage: Stage) -> None:
        """Let a stage go over the best, where it can be better still and there is time."""
        found, start = self.best.found, time.perf_counter()
        if found is None or found.khat < 0 or self._seconds(stage) > self.watch.seconds_left:
            return
        try:
            fitted = self._fit(stage)
            if fitted is None:
                return
            found = fitted.weights or self._measured(fitted.approximation)[0]
        except KeyboardInterrupt:
            self.watch.interrupt()
            return
        none = self.best.account.history[:0]
        account = dataclasses.replace(self.best.account, steps=0, history=none, evaluations=())
        kept = fitted.weights is not None or is_better(found, self.best.found)
        self._add(Attempt(stage.name, fitted, account, found, time.perf_counter() - start, kept))

    def _fit(self, stage: Stage) -> Fitted | None:
        train = partial(self._problem.train, number=len(self.attempts), steps_before=self.num_steps)
        problem = self._problem._replace(report=partial(_report, self.watch, stage.name), train=train)
        return stage.fit(problem, self.best.fitted.approximation)

    def _is_better(self, fitted: Fitted, found: WeightSummary | None) -> bool:
        """Whether an approximation is better than the best before."""
        if self.attempts:
            return is_better(found, self.best.found)
        # A search for modes has measured the guide as it started by few draws: by many only where it may be better.
        before = math.inf if fitted.starts is None else fitted.starts.elbo
        if found is not None and not before > found.inner_elbo:
            return True
        with torch.random.fork_rng():  # what comes next has the draws that it has where this is not asked
            self._measure_best()
        return is_better(found, self.best.found) or self.best.found is None

    def _measure_best(self) -> None:
        """Measure the best, as the model is now."""
        self.best = self.best._replace(found=self._measured(self.best.fitted.approximation)[0])

    def _measured(self, approximation: Approximation) -> tuple[WeightSummary | None, Known]:
        start = time.perf_counter()
        measured = measure(self._problem.density, approximation.posterior())
        # With their gradients points take some three times as long.
        self._seconds_per_point = 3 * (time.perf_counter() - start) / NUM_DRAWS
        return measured

    def _has_changed(self, known: Known) -> bool:
        """Whether the model is no longer what was measured, as a callback may have made it; record it anew then."""
        if not self.watch.callbacks:
            return False
        density = self._problem.density
        points = known.points[: density.size]
        density.renew(points)
        return not torch.allclose(density.values(points), known.log_p[: len(points)], 1e-3, equal_nan=True)

    def _add(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        if attempt.kept:
            self.best = attempt

    def _without_optimizer(self, fitted: Fitted, found: WeightSummary | None) -> FitResult:
        """Return the account of a stage that took no steps of an optimizer."""
        steps = len(fitted.history)
        figures = (-math.inf, math.inf) if found is None else (found.elbo, found.elbo_mcse)
        return dataclasses.replace(
            self._blank,
            steps=steps,
            best_step=steps,
            starts=fitted.starts,
            history=fitted.history,
            evaluations=(Evaluation(steps, *figures),),
        )

    def _result(self, plan: Plan) -> FitResult:
        """Return what all stages together have come to."""
        accounts = [attempt.account for attempt in self.attempts]
        place = next((i for i, attempt in enumerate(self.attempts) if attempt is self.best), 0)
        status, reason = self._outcome(plan)
        found = self.best.found
        return dataclasses.replace(
            self.best.account,
            elbo=-math.inf if found is None else found.elbo,
            elbo_mcse=math.inf if found is None else found.elbo_mcse,
            status=status,
            stop_reason=reason,
            steps=self.num_steps,
            best_step=sum(account.steps for account in accounts[:place]) + self.best.account.best_step,
            num_skipped=sum(account.num_skipped for account in accounts),
            seconds=time.perf_counter() - self._begin,
            compile_seconds=sum(account.compile_seconds for account in accounts),
            stages=tuple(map(_stage, self.attempts)),
            starts=accounts[0].starts,
            history=torch.cat([account.history for account in accounts]),
            evaluations=tuple(_chained(accounts)),
        )

    def _outcome(self, plan: Plan) -> tuple[Status, str]:
        """How the chain ended, and the sentence that says so."""
        ended = self.ended or self.watch.ended
        found, step = self.best.found, self.num_steps
        distance = "" if found is None else f"the divergence from the posterior is {gap(found):.4f} nats by the weights"
        if is_good(found, plan.max_gap) and ended not in (Status.INTERRUPTED, Status.STOPPED):
            return Status.CONVERGED, f"converged: {distance}"
        if ended is Status.FAILED:
            return ended, self.attempts[-1].account.stop_reason
        early = {
            Status.INTERRUPTED: f"interrupted after step {step}",
            Status.STOPPED: f"stopped by a callback at step {step}",
            Status.TIME: f"out of time: max_seconds={self.watch.max_seconds} left none for more after step {step}",
        }
        if ended in early:
            return ended, f"{early[ended]}; {distance}" if distance else early[ended]
        last = next((attempt for attempt in reversed(self.attempts) if attempt.fitted.steps is not None), None)
        if last is not None and last.account.converged:
            return Status.CONVERGED, f"converged: the ELBO reached a plateau in stage {last.name!r}"
        where = f"max_steps={self.max_steps}" if step >= self.max_steps else f"the {step} steps of its stages"
        return Status.PLATEAU_NOT_REACHED, f"not converged: the ELBO reached no plateau within {where}"


def _report(watch: Watch, stage: str, what: str, done: int, total: int, elbo: float) -> bool:
    """Report a part of a stage by the names of both."""
    return watch.report(f"{stage}: {what}", done, total, elbo)


def _stage(attempt: Attempt) -> StageResult:
    found = attempt.found
    figures = (
        (-math.inf, math.inf, math.inf, 0.0, math.inf)
        if found is None
        else (found.elbo, found.elbo_mcse, gap(found), found.ess_fraction, found.khat)
    )
    return StageResult(attempt.name, *figures, attempt.account.steps, attempt.seconds, attempt.kept)


def _chained(accounts: list[FitResult]) -> Iterator[Evaluation]:
    """Evaluations of all stages, their steps counted on."""
    before = 0
    for account in accounts:
        yield from (evaluation._replace(step=before + evaluation.step) for evaluation in account.evaluations)
        before += account.steps
