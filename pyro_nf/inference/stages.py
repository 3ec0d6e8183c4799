"""A fit that needs no tuning: stages, each measured, as many as the posterior needs."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

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


def fit_in_stages(
    fit: Callable[[float, int, int, int], FitResult],
    program: Program,
    num_starts: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FitResult | None:
    """Warm start, then fit stage by stage until one is good enough; leave the best in the guide.

    Args:
        fit: Takes learning rate, steps, steps between evaluations and the number of the stage, and fits the guide as
            it is.
        program: Model and guide.
        num_starts: Of the warm start; 0 for the default.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The result of all stages, or `None` if the guide has none.
    """
    guide: Any = program.guide
    begin = time.perf_counter()
    stages: list[Stage] = []
    results: list[FitResult] = []
    starts = None
    best: tuple[float, Any, WeightSummary, FitResult] | None = None
    for number, name in enumerate(guide.stages(*args, **kwargs)):
        start = time.perf_counter()
        if not stages:
            starts = guide.warm_start(*args, num_starts=num_starts or _NUM_STARTS, **kwargs)
        result = fit(*_PLAN[name], number)
        found = _measure(program, args, kwargs)
        kept = best is None or not found.elbo < best[0]
        if kept:
            state = {key: value.clone() for key, value in guide.state_dict().items()}
            best = (found.elbo, state, found, result)
        elif best is not None:
            guide.load_state_dict(best[1])
        gap = found.log_evidence - found.elbo
        seconds = time.perf_counter() - start
        stages.append(
            Stage(name, found.elbo, found.elbo_mcse, gap, found.ess_fraction, found.khat, result.steps, seconds, kept)
        )
        results.append(result)
        ended = result.stop_reason.startswith(("interrupted", "stopped", "failed"))
        if ended or (kept and _is_good(found)):
            break
    if best is None:
        return None
    good = _is_good(best[2])
    reason = (
        f"converged: the divergence from the posterior is {best[2].log_evidence - best[2].elbo:.4f} nats by the weights"
    )
    return dataclasses.replace(
        best[3],
        elbo=best[2].elbo,
        elbo_mcse=best[2].elbo_mcse,
        converged=good or results[-1].converged,
        stop_reason=reason if good else results[-1].stop_reason,
        steps=sum(result.steps for result in results),
        best_step=sum(r.steps for r in results[: results.index(best[3])]) + best[3].best_step,
        num_skipped=sum(result.num_skipped for result in results),
        seconds=time.perf_counter() - begin,
        compile_seconds=sum(result.compile_seconds for result in results),
        stages=tuple(stages),
        starts=starts,
        history=torch.cat([result.history for result in results]),
        evaluations=tuple(_chained(results)),
    )


def _is_good(found: WeightSummary) -> bool:
    gap = found.log_evidence - found.elbo
    return gap < _GOOD_GAP and found.ess_fraction > _GOOD_ESS


def _measure(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WeightSummary:
    terms = program.map_in_chunks(log_densities, _NUM_DRAWS, args, kwargs)
    return summarise((terms["log_p"].double() - terms["log_q"].double()).cpu().numpy()[None])


def _chained(results: list[FitResult]) -> Iterator[Evaluation]:
    """Evaluations of all stages, their steps counted on."""
    before = 0
    for result in results:
        yield from (evaluation._replace(step=before + evaluation.step) for evaluation in result.evaluations)
        before += result.steps
