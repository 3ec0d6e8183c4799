"""A fit that needs no tuning: stages, each measured, as many as the posterior needs."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import Starts
from pyro_nf.diagnostics.weights import WeightSummary, summarise
from pyro_nf.distributions import FlowDistribution
from pyro_nf.inference.result import Evaluation, FitResult, Stage, Status
from pyro_nf.inference.watch import Watch
from pyro_nf.interface.waits import Report
from pyro_nf.programs.program import Program

# A stage is good enough if its divergence from the posterior is below this, in nats, and its effective draws more than
# this part, by the weights of so many draws. (k-hat scatters, and is high where flat weights have a thin long tail.)
# What takes next to no time has to be better: a curve after the normal costs nothing, and tails are easier behind a
# flow.
_GOOD_GAP, _GOOD_ESS, _NUM_DRAWS = 0.005, 0.985, 5000
_GOOD_GAPS = {"normal": 0.001, "curve": 0.002}
# Learning rate, most steps, and steps between evaluations of each stage. Coordinates in which the posterior is nearly
# standard make rates universal; a flow's networks want a lower one.
_PLAN = {"affine": (0.03, 400, 50), "flow": (0.006, 2000, 100), "flow, longer": (0.003, 4000, 200)}
_NUM_STARTS = 8
# Stages without steps of that kind, and points at which they take gradients.
_POINTS = {"normal": 40 * 128, "curve": 30 * 256 + 2048}
# A k-hat below which the weights' tail is light, by a margin for its scatter, as the median of so many sets of draws;
# the shares of wide draws that are tried for it, how much ELBO they may cost, in nats, and how much they must gain.
_LIGHT_TAIL, _NUM_SETS, _SHARES, _PRICE, _GAIN = 0.2, 3, (0.03, 0.05, 0.1), 0.003, 0.1


@runtime_checkable
class Staged(Protocol):
    """A guide that can be fitted in stages; `AutoFlow` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent."""

    def latent_sites(self) -> Mapping[str, dict[str, Any]]:
        """Return the latent sites, as in a trace, in the order of the guide's coordinates."""

    def get_posterior(self) -> FlowDistribution:
        """Return the guide's distribution over the coordinates."""

    def start_at_modes(self, density: Density, num_starts: int, report: Report) -> Starts:
        """Put the guide on the modes, if it is better there, and return what was found."""

    def fit_normal(self, density: Density, num_starts: int, report: Report) -> tuple[Starts, Tensor]:
        """Fit a normal, and return what was found on the way, and the ELBO at each step."""

    def fit_curve(self, density: Density, report: Report) -> Tensor:
        """Curve that normal, and return the ELBO at each step."""

    def widen(self, share: float) -> bool:
        """Let this share of the base's draws be wider, and return whether it can have such."""

    def stages(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Make the guide what each stage fits, and yield its name, "normal" first."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that a fit changes."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take it back."""


class StagePlan(NamedTuple):
    """What a stage that is fitted by steps is to do.

    Attributes:
        name: Its name.
        number: Its number, from 0.
        learning_rate: Adam's.
        max_steps: Upper bound of its steps.
        eval_every: Steps between evaluations.
        steps_before: Steps of the stages before.
    """

    name: str
    number: int
    learning_rate: float
    max_steps: int
    eval_every: int
    steps_before: int


class _Attempt(NamedTuple):
    """A stage, the fit that it was, and the guide's state after it; `found` is `None` if draws had no finite weight."""

    name: str
    result: FitResult
    found: WeightSummary | None
    state: dict[str, Any]
    seconds: float


class _Known(NamedTuple):
    """Points and the model's log density there."""

    points: Tensor
    log_p: Tensor


def fit_in_stages(
    fit: Callable[[StagePlan], FitResult],
    program: Program,
    density: Density,
    num_starts: int,
    max_steps: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: Watch | None = None,
    num_particles: int = 256,
) -> FitResult | None:
    """Fit a normal, then stage by stage until one is good enough; leave the best in the guide.

    What ends the fit early, Ctrl-C, a callback or the clock, ends it with the best until then. A stage that is worse
    than what was there before is put back, the first one too.

    Args:
        fit: Fits the guide as it is by steps, as a plan says.
        program: Model and guide.
        density: The model's, over the guide's coordinates.
        num_starts: Of the warm start; 0 for the default.
        max_steps: Upper bound of all steps together.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        watch: What is shown and heeded on the way.
        num_particles: Draws of a step, by which the time that a stage takes is estimated.

    Returns:
        The result of all stages, or `None` if the guide has none.
    """
    guide: Any = program.guide
    chain = _Chain(fit, program, density, max_steps, args, kwargs, watch or Watch(), num_particles)
    # Closed at once, also where a fit raises: the guide is then whole again.
    with closing(guide.stages(*args, **kwargs)) as names:
        for number, name in enumerate(names):
            if chain.num_steps >= max_steps or not chain.has_time_for(name):
                break
            chain.attempt(name, number, num_starts or _NUM_STARTS)
            if chain.ended is not None or chain.is_good:
                break
    if not chain.attempts:
        return None
    if chain.ended is None:
        chain.widen()
    return chain.result()


class _Chain:
    """Stages one after another, each measured and compared with the best before it.

    Attributes:
        attempts: All stages.
        kept: Whether each was better than all before it.
        best: The best of them, or the guide as it started.
        ended: What ended the chain before its time, if anything did.
    """

    def __init__(
        self,
        fit: Callable[[StagePlan], FitResult],
        program: Program,
        density: Density,
        max_steps: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watch: Watch,
        num_particles: int,
    ) -> None:
        self.fit, self.program, self.density, self.max_steps = fit, program, density, max_steps
        self.args, self.kwargs, self.watch, self.num_particles = args, kwargs, watch, num_particles
        self.attempts: list[_Attempt] = []
        self.kept: list[bool] = []
        self.ended: Status | None = None
        self._guide: Any = program.guide
        self._begin = time.perf_counter()
        self._seconds_per_point = 0.0
        self.best = _Attempt("start", self._result(None, torch.empty(0)), None, self._state(), 0.0)

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return sum(attempt.result.steps for attempt in self.attempts)

    @property
    def is_good(self) -> bool:
        """Whether the last stage is good enough."""
        last = self.attempts[-1]
        return self.kept[-1] and _is_good(last.found, _GOOD_GAPS.get(last.name, _GOOD_GAP))

    def has_time_for(self, name: str) -> bool:
        """Whether the time that is left is enough for what a stage does before it is measured first."""
        if not self.attempts:
            return True
        points = _POINTS[name] if name in _POINTS else _PLAN[name][2] * self.num_particles
        if self._seconds_per_point * points < self.watch.seconds_left:
            return True
        self.ended = Status.TIME
        return False

    def attempt(self, name: str, number: int, num_starts: int) -> None:
        """Fit a stage, measure it, and keep it if it is better."""
        start = time.perf_counter()
        try:
            result = self._fit(name, number, num_starts)
            found, known = self._measured()
            if name in _POINTS:  # other stages have evaluations of their own
                result = dataclasses.replace(result, evaluations=(_evaluation(result.steps, found),))
                if self.watch.after(self.num_steps).ask(result.evaluations[0]):
                    self.ended = Status.STOPPED
            if self._has_changed(known):
                found, _ = self._measured()
                self._measure_best()
            better = self._is_better(result, found)
        except KeyboardInterrupt:  # the stage is lost, which may be anywhere
            self.watch.interrupt()
            self._guide.load_state_dict(self.best.state)
            if not self.attempts:
                self._measure_best()
                self._add(self.best, kept=True)
            self.ended = Status.INTERRUPTED
            return
        self._add(_Attempt(name, result, found, self._state(), time.perf_counter() - start), better)
        if not better:
            self._guide.load_state_dict(self.best.state)
        if self.best.found is not None:
            self.watch.note_gap(_gap(self.best.found))
        early = result.status in (Status.INTERRUPTED, Status.STOPPED, Status.TIME, Status.FAILED)
        self.ended = self.ended or (result.status if early else self.watch.ended)

    def widen(self) -> None:
        """Widen the tails of the best, where that helps and there is time."""
        if self._seconds_per_point * _NUM_SETS * _NUM_DRAWS * (1 + len(_SHARES)) > self.watch.seconds_left:
            return
        try:
            attempt = _with_tails(self._guide, self.density, self.best)
        except KeyboardInterrupt:
            self.watch.interrupt()
            self._guide.load_state_dict(self.best.state)
            self._guide.widen(0.0)
            return
        if attempt is not None:
            self._add(attempt, kept=True)

    def result(self) -> FitResult:
        """Return what all stages together have come to."""
        results = [attempt.result for attempt in self.attempts]
        place = next((i for i, attempt in enumerate(self.attempts) if attempt is self.best), 0)
        status, reason = self._outcome()
        found = self.best.found
        return dataclasses.replace(
            self.best.result,
            elbo=-math.inf if found is None else found.elbo,
            elbo_mcse=math.inf if found is None else found.elbo_mcse,
            status=status,
            stop_reason=reason,
            steps=self.num_steps,
            best_step=sum(result.steps for result in results[:place]) + self.best.result.best_step,
            num_skipped=sum(result.num_skipped for result in results),
            seconds=time.perf_counter() - self._begin,
            compile_seconds=sum(result.compile_seconds for result in results),
            stages=tuple(_stage(*pair) for pair in zip(self.attempts, self.kept, strict=True)),
            starts=results[0].starts,
            history=torch.cat([result.history for result in results]),
            evaluations=tuple(_chained(results)),
        )

    def _fit(self, name: str, number: int, num_starts: int) -> FitResult:
        report = partial(_named, self.watch, name)
        if name == "normal":
            starts, history = self._guide.fit_normal(self.density, num_starts, report)
            return self._result(starts, history)
        if name == "curve":
            return self._result(None, self._guide.fit_curve(self.density, report))
        rate, steps, eval_every = _PLAN[name]
        left = min(steps, self.max_steps - self.num_steps)
        return self.fit(StagePlan(name, number, rate, left, eval_every, self.num_steps))

    def _is_better(self, result: FitResult, found: WeightSummary | None) -> bool:
        """Whether the guide as it is now is better than the best before."""
        if self.attempts:
            return _is_better(found, self.best.found)
        # The guide as it started has been measured by few draws, on the way: by many only where it may be better.
        before = -math.inf if result.starts is None else result.starts.elbo
        if found is not None and not before > found.inner_elbo:
            return True
        with torch.random.fork_rng():  # what comes next has the draws that it has where this is not asked
            self._measure_best()
        return _is_better(found, self.best.found) or self.best.found is None

    def _measure_best(self) -> None:
        """Measure the best, as the model is now."""
        here = self._state()
        self._guide.load_state_dict(self.best.state)
        self.best = self.best._replace(found=self._measured()[0])
        self._guide.load_state_dict(here)

    def _measured(self) -> tuple[WeightSummary | None, _Known]:
        start = time.perf_counter()
        measured = _measure(self.density, self._guide.get_posterior())
        # With their gradients points take some three times as long.
        self._seconds_per_point = 3 * (time.perf_counter() - start) / _NUM_DRAWS
        return measured

    def _has_changed(self, known: _Known) -> bool:
        """Whether the model is no longer what was measured, as a callback may have made it; record it anew then."""
        if not self.watch.callbacks:
            return False
        points = known.points[: self.density.size]
        self.density.renew(points)
        return not torch.allclose(self.density.values(points), known.log_p[: len(points)], 1e-3, equal_nan=True)

    def _add(self, attempt: _Attempt, kept: bool) -> None:
        self.attempts.append(attempt)
        self.kept.append(kept)
        if kept:
            self.best = attempt

    def _state(self) -> dict[str, Any]:
        return {key: value.clone() for key, value in self._guide.state_dict().items()}

    def _outcome(self) -> tuple[Status, str]:
        """How the chain ended, and the sentence that says so."""
        ended = self.ended or self.watch.ended
        found, step = self.best.found, self.num_steps
        gap = "" if found is None else f"the divergence from the posterior is {_gap(found):.4f} nats by the weights"
        if _is_good(found, _GOOD_GAP) and ended not in (Status.INTERRUPTED, Status.STOPPED):
            return Status.CONVERGED, f"converged: {gap}"
        if ended is Status.FAILED:
            return ended, self.attempts[-1].result.stop_reason
        early = {
            Status.INTERRUPTED: f"interrupted after step {step}",
            Status.STOPPED: f"stopped by a callback at step {step}",
            Status.TIME: f"out of time: max_seconds={self.watch.max_seconds} left none for more after step {step}",
        }
        if ended in early:
            return ended, f"{early[ended]}; {gap}" if gap else early[ended]
        last = next((a for a in reversed(self.attempts) if a.name in _PLAN), None)
        if last is not None and last.result.converged:
            return Status.CONVERGED, f"converged: the ELBO reached a plateau in stage {last.name!r}"
        where = f"max_steps={self.max_steps}" if step >= self.max_steps else f"the {step} steps of its stages"
        return Status.PLATEAU_NOT_REACHED, f"not converged: the ELBO reached no plateau within {where}"

    def _result(self, starts: Starts | None, history: Tensor) -> FitResult:
        """The result of natural gradients, whose ELBO is not measured yet."""
        return FitResult(
            elbo=-math.inf,
            elbo_mcse=math.inf,
            status=Status.PLATEAU_NOT_REACHED,
            stop_reason="",
            notes=(),
            steps=len(history),
            best_step=len(history),
            plateau_step=None,
            num_skipped=0,
            seconds=0.0,
            learning_rate=math.nan,
            execution="recorded",
            execution_reason="a normal is fitted by natural gradients",
            compile_seconds=0.0,
            path_gradient=True,
            stages=(),
            starts=starts,
            history=history,
            evaluations=(),
            model=self.program.model,
            guide=self.program.guide,
            args=self.args,
            kwargs=self.kwargs,
        )


def _named(watch: Watch, name: str, what: str, done: int, total: int, elbo: float) -> bool:
    """Report a part of a stage by the names of both."""
    return watch.report(f"{name}: {what}", done, total, elbo)


def _with_tails(guide: Staged, density: Density, attempt: _Attempt) -> _Attempt | None:
    """Widen the tails of what was fitted, where that makes the weights' tail lighter and costs next to nothing.

    Where the posterior has more far out than the fit, the largest weights are those of a few draws there.
    """
    start = time.perf_counter()
    if attempt.found is None or attempt.found.khat < 0 or not guide.widen(0.0):
        return None
    tried: dict[float, WeightSummary] = {}
    seed = int(torch.randint(2**31, ()))
    known: _Known | None = None
    for share in (0.0, *_SHARES):
        guide.widen(share)
        # With the same noise for every share most draws are the same: k-hats compare, and few are evaluated.
        torch.manual_seed(seed)
        # As often as tells k-hats apart, which scatter.
        found, known = _measure(density, guide.get_posterior(), num_sets=_NUM_SETS, known=known)
        if found is not None and found.elbo > tried.get(0.0, found).elbo - _PRICE:
            tried[share] = found
        if found is not None and found.khat < _LIGHT_TAIL:
            break
    best = min(tried, key=lambda share: tried[share].khat, default=0.0)
    if not best or (0.0 in tried and tried[best].khat > tried[0.0].khat - _GAIN):
        guide.widen(0.0)
        return None
    guide.widen(best)
    result = dataclasses.replace(attempt.result, steps=0, history=attempt.result.history[:0], evaluations=())
    return _Attempt("tails", result, tried[best], {}, time.perf_counter() - start)


def _evaluation(step: int, found: WeightSummary | None) -> Evaluation:
    return Evaluation(step, -math.inf, math.inf) if found is None else Evaluation(step, found.elbo, found.elbo_mcse)


def _stage(attempt: _Attempt, kept: bool) -> Stage:
    found = attempt.found
    figures = (
        (-math.inf, math.inf, math.inf, 0.0, math.inf)
        if found is None
        else (found.elbo, found.elbo_mcse, _gap(found), found.ess_fraction, found.khat)
    )
    return Stage(attempt.name, *figures, attempt.result.steps, attempt.seconds, kept)


def _is_better(one: WeightSummary | None, other: WeightSummary | None) -> bool:
    """Whether one stage's fit is better than another's."""
    if one is None or other is None:
        return one is not None
    difference = one.inner_elbo - other.inner_elbo
    if one.outside or other.outside:  # whose ELBO is minus infinity
        return difference > 0
    noise = math.hypot(one.elbo_mcse, other.elbo_mcse)
    if abs(difference) < 3 * noise and min(one.ess_fraction, other.ess_fraction) > 0.5:
        # Evidence and ELBO of the same draws have the same noise, in which a small difference of ELBOs drowns.
        return _gap(one) < _gap(other)
    return difference > 0


def _gap(found: WeightSummary) -> float:
    return found.log_evidence - found.inner_elbo


def _is_good(found: WeightSummary | None, limit: float) -> bool:
    return found is not None and not found.outside and _gap(found) < limit and found.ess_fraction > _GOOD_ESS


@torch.no_grad()
def _measure(
    density: Density, posterior: FlowDistribution, num_sets: int = 1, known: _Known | None = None
) -> tuple[WeightSummary | None, _Known]:
    """Weigh draws, and return them too; what is known of a draw is not evaluated again."""
    points, log_q = posterior.rsample_and_log_prob((num_sets * _NUM_DRAWS,))
    if known is None:
        log_p = density.values(points)
    else:
        log_p, moved = known.log_p.clone(), (points != known.points).any(-1)
        log_p[moved] = density.values(points[moved])
    # A draw without a density has no weight.
    weighed = torch.where(log_p.isfinite(), log_p, -math.inf)
    sets = (weighed.double() - log_q.double()).view(num_sets, _NUM_DRAWS)
    usable = bool(log_q.isfinite().all()) and bool(sets.isfinite().any(-1).all())
    return summarise(sets.cpu().numpy()) if usable else None, _Known(points, log_p)


def _chained(results: list[FitResult]) -> Iterator[Evaluation]:
    """Evaluations of all stages, their steps counted on."""
    before = 0
    for result in results:
        yield from (evaluation._replace(step=before + evaluation.step) for evaluation in result.evaluations)
        before += result.steps
