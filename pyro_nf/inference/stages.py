"""A fit that needs no tuning: stages, each measured, as many as the posterior needs."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_nf.density import Density
from pyro_nf.diagnostics.weights import WeightSummary, summarise
from pyro_nf.distributions import FlowDistribution
from pyro_nf.inference.result import Evaluation, FitResult, Stage
from pyro_nf.modes import Starts
from pyro_nf.tracing import Program

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
# A k-hat below which the weights' tail is light, by a margin for its scatter, as the median of so many sets of draws;
# the shares of wide draws that are tried for it, how much ELBO they may cost, in nats, and how much they must gain.
_LIGHT_TAIL, _NUM_SETS, _SHARES, _PRICE, _GAIN = 0.2, 3, (0.03, 0.05, 0.1), 0.003, 0.1


@runtime_checkable
class Staged(Protocol):
    """A guide that can be fitted in stages; `AutoFlow` is."""

    def density(self, *args: Any, **kwargs: Any) -> Density:
        """Return the model's log density over the guide's coordinates."""

    def get_posterior(self) -> FlowDistribution:
        """Return the guide's distribution over them."""

    def fit_normal(self, density: Density, num_starts: int) -> tuple[Starts, Tensor]:
        """Fit a normal, and return what was found on the way, and the ELBO at each step."""

    def fit_curve(self, density: Density) -> Tensor:
        """Curve that normal, and return the ELBO at each step."""

    def widen(self, share: float) -> bool:
        """Let this share of the base's draws be wider, and return whether it can have such."""

    def stages(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Make the guide what each stage fits, and yield its name, "normal" first."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that a fit changes."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take it back."""


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
    fit: Callable[[str, float, int, int, int], FitResult],
    program: Program,
    density: Density,
    num_starts: int,
    max_steps: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FitResult | None:
    """Fit a normal, then stage by stage until one is good enough; leave the best in the guide.

    Args:
        fit: Takes the stage's name, learning rate, steps, steps between evaluations and the number of the stage, and
            fits the guide as it is.
        program: Model and guide.
        density: The model's, over the guide's coordinates.
        num_starts: Of the warm start; 0 for the default.
        max_steps: Upper bound of all steps together.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The result of all stages, or `None` if the guide has none.
    """
    guide: Any = program.guide
    begin = time.perf_counter()
    attempts: list[_Attempt] = []
    kept: list[bool] = []
    best = 0
    # Closed at once, also where a fit raises: the guide is then whole again.
    with closing(guide.stages(*args, **kwargs)) as names:
        for number, name in enumerate(names):
            start = time.perf_counter()
            left = max_steps - sum(attempt.result.steps for attempt in attempts)
            if left <= 0:
                break
            if name == "normal":
                starts, history = guide.fit_normal(density, num_starts or _NUM_STARTS)
                result = _of_normal(program, starts, history, args, kwargs)
            elif name == "curve":
                result = dataclasses.replace(attempts[0].result, history=guide.fit_curve(density))
                result = dataclasses.replace(result, steps=len(result.history), best_step=len(result.history))
            else:
                rate, steps, eval_every = _PLAN[name]
                result = fit(name, rate, min(steps, left), eval_every, number)
            found, _ = _measure(density, guide.get_posterior())
            state = {key: value.clone() for key, value in guide.state_dict().items()}
            attempts.append(_Attempt(name, result, found, state, time.perf_counter() - start))
            kept.append(number == 0 or not _is_better(attempts[best].found, found))
            if kept[-1]:
                best = number
            else:
                guide.load_state_dict(attempts[best].state)
            ended = result.stop_reason.startswith(("interrupted", "stopped", "failed"))
            if ended or (kept[-1] and _is_good(found, _GOOD_GAPS.get(name, _GOOD_GAP))):
                break
    if not attempts:
        return None
    if attempt := _with_tails(guide, density, attempts[best]):
        attempts.append(attempt)
        kept.append(True)
        best = len(attempts) - 1
    results = [attempt.result for attempt in attempts]
    combined = dataclasses.replace(
        results[best],
        converged=results[-1].converged,
        stop_reason=results[-1].stop_reason,
        steps=sum(result.steps for result in results),
        best_step=sum(result.steps for result in results[:best]) + results[best].best_step,
        num_skipped=sum(result.num_skipped for result in results),
        seconds=time.perf_counter() - begin,
        compile_seconds=sum(result.compile_seconds for result in results),
        stages=tuple(map(_stage, attempts, kept)),
        starts=results[0].starts,
        history=torch.cat([result.history for result in results]),
        evaluations=tuple(_chained(results)),
    )
    final = attempts[best].found
    if final is None:
        return combined
    combined = dataclasses.replace(combined, elbo=final.elbo, elbo_mcse=final.elbo_mcse)
    if not _is_good(final, _GOOD_GAP):
        return combined
    reason = f"converged: the divergence from the posterior is {_gap(final):.4f} nats by the weights"
    return dataclasses.replace(combined, converged=True, stop_reason=reason)


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


def _of_normal(
    program: Program, starts: Starts, history: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FitResult:
    """The result of a fit of a normal, whose ELBO is not measured yet."""
    return FitResult(
        elbo=-math.inf,
        elbo_mcse=math.inf,
        converged=False,
        stop_reason="not converged: a normal is not enough",
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
        model=program.model,
        guide=program.guide,
        args=args,
        kwargs=kwargs,
    )


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
    if one.outside and other.outside:  # both ELBOs are minus infinity
        return one.ess_fraction > other.ess_fraction
    difference, noise = one.elbo - other.elbo, math.hypot(one.elbo_mcse, other.elbo_mcse)
    if abs(difference) < 3 * noise and min(one.ess_fraction, other.ess_fraction) > 0.5:
        # Evidence and ELBO of the same draws have the same noise, in which a small difference of ELBOs drowns.
        return _gap(one) < _gap(other)
    return difference > 0


def _gap(found: WeightSummary) -> float:
    return found.log_evidence - found.elbo


def _is_good(found: WeightSummary | None, limit: float) -> bool:
    return found is not None and _gap(found) < limit and found.ess_fraction > _GOOD_ESS


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
