"""A fit that needs no tuning: stages, each measured, as many as the posterior needs."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from pyro_nf.diagnostics.weights import WeightSummary, log_densities, summarise
from pyro_nf.inference.result import Evaluation, FitResult, Stage
from pyro_nf.tracing import Program

# A stage is good enough if its divergence from the posterior is below this, in nats, and its effective draws more than
# this part, by the weights of so many draws. (k-hat scatters, and is high where flat weights have a thin long tail.)
_GOOD_GAP, _GOOD_ESS, _NUM_DRAWS = 0.005, 0.98, 5000
# Learning rate, most steps, and steps between evaluations of each stage. Coordinates in which the posterior is nearly
# standard make rates universal; a flow's networks want a lower one.
_PLAN = {"affine": (0.03, 400, 50), "flow": (0.006, 2000, 100), "flow, longer": (0.003, 4000, 200)}
_NUM_STARTS = 8


@runtime_checkable
class Staged(Protocol):
    """A guide that can be fitted in stages; `AutoFlow` is."""

    def warm_start(self, *args: Any, num_starts: int, **kwargs: Any) -> Any:
        """Begin at the best of several modes, where that is better."""

    def stages(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Make the guide what each stage fits, and yield its name."""

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


def fit_in_stages(
    fit: Callable[[float, int, int, int], FitResult],
    program: Program,
    num_starts: int,
    max_steps: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FitResult | None:
    """Warm start, then fit stage by stage until one is good enough; leave the best in the guide.

    Args:
        fit: Takes learning rate, steps, steps between evaluations and the number of the stage, and fits the guide as
            it is.
        program: Model and guide.
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
    best, starts = 0, None
    # Closed at once, also where a fit raises: the guide is then whole again.
    with closing(guide.stages(*args, **kwargs)) as names:
        for number, name in enumerate(names):
            start = time.perf_counter()
            if number == 0:
                starts = guide.warm_start(*args, num_starts=num_starts or _NUM_STARTS, **kwargs)
            rate, steps, eval_every = _PLAN[name]
            left = max_steps - sum(attempt.result.steps for attempt in attempts)
            if left <= 0:
                break
            result = fit(rate, min(steps, left), eval_every, number)
            found = _measure(program, args, kwargs)
            state = {key: value.clone() for key, value in guide.state_dict().items()}
            attempts.append(_Attempt(name, result, found, state, time.perf_counter() - start))
            kept.append(number == 0 or _elbo(found) >= _elbo(attempts[best].found))
            if kept[-1]:
                best = number
            else:
                guide.load_state_dict(attempts[best].state)
            ended = result.stop_reason.startswith(("interrupted", "stopped", "failed"))
            if ended or (kept[-1] and _is_good(found)):
                break
    if not attempts:
        return None
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
        starts=starts,
        history=torch.cat([result.history for result in results]),
        evaluations=tuple(_chained(results)),
    )
    final = attempts[best].found
    if final is None:
        return combined
    combined = dataclasses.replace(combined, elbo=final.elbo, elbo_mcse=final.elbo_mcse)
    if not _is_good(final):
        return combined
    reason = f"converged: the divergence from the posterior is {_gap(final):.4f} nats by the weights"
    return dataclasses.replace(combined, converged=True, stop_reason=reason)


def _stage(attempt: _Attempt, kept: bool) -> Stage:
    found = attempt.found
    figures = (
        (-math.inf, math.inf, math.inf, 0.0, math.inf)
        if found is None
        else (found.elbo, found.elbo_mcse, _gap(found), found.ess_fraction, found.khat)
    )
    return Stage(attempt.name, *figures, attempt.result.steps, attempt.seconds, kept)


def _elbo(found: WeightSummary | None) -> float:
    return -math.inf if found is None else found.elbo


def _gap(found: WeightSummary) -> float:
    return found.log_evidence - found.elbo


def _is_good(found: WeightSummary | None) -> bool:
    return found is not None and _gap(found) < _GOOD_GAP and found.ess_fraction > _GOOD_ESS


def _measure(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WeightSummary | None:
    terms = program.map_in_chunks(log_densities, _NUM_DRAWS, args, kwargs)
    log_weights = terms["log_p"].double() - terms["log_q"].double()
    return summarise(log_weights.cpu().numpy()[None]) if bool(log_weights.isfinite().all()) else None


def _chained(results: list[FitResult]) -> Iterator[Evaluation]:
    """Evaluations of all stages, their steps counted on."""
    before = 0
    for result in results:
        yield from (evaluation._replace(step=before + evaluation.step) for evaluation in result.evaluations)
        before += result.steps
