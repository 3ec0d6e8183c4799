"""The ELBO of a fit on its way and at its end, and why it is not finite where it is not."""

import dataclasses
import itertools
import math
import numbers
import warnings
from collections.abc import Sequence

import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.result import Evaluation, FitResult, Status
from pyro_nf.interface.arguments import explain_failure, named_arguments
from pyro_nf.programs.matching import matched_spec
from pyro_nf.programs.program import BoundProgram, ProgramSpec, TracePair
from pyro_nf.programs.sites import is_data
from pyro_nf.programs.traces import guide_log_prob, in_words, log_prob_sum

# Minibatches of the first evaluation and the last ones, whose steps are plain and so slow.
_MAX_EVAL_BATCHES = 100
# Draws that are looked at, at most, where some have no density.
_NUM_SUSPECTS = 20_000


def checked_spec(program: BoundProgram) -> ProgramSpec:
    """The pair's spec; where the model fails on arguments that are no tensors, say which these are."""
    try:
        spec = matched_spec(program)
        for name, site in spec.traces.model.nodes.items():
            if is_data(site) and not isinstance(site["value"], (Tensor, numbers.Number)):
                kind = type(site["value"]).__name__
                raise ValueError(f"site {name!r} observes a {kind}: it must be a tensor, torch.as_tensor(...)")
        return spec
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        explain_failure(program.program.model, program.args, program.kwargs, error)
        raise


def trained_parameters(program: BoundProgram) -> list[Tensor]:
    """The unconstrained tensors of every parameter that the objective touches.

    Raises:
        ValueError: If there are none.
    """
    with poutine.trace(param_only=True) as capture, torch.no_grad():
        ELBO().estimate(program, program.draw(1))
    params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
    params = list({id(p): p for p in params if p.requires_grad}.values())
    if not params:
        raise ValueError("neither model nor guide has a parameter to fit")
    return params


def notes(program: BoundProgram) -> tuple[str, ...]:
    """Return what else to know of a fit, a sentence each."""
    nodes = program.spec.traces.model.nodes.values()
    return () if any(map(is_data, nodes)) else ("the model observes nothing: this is its prior",)


def warn_of_nothing_observed(program: BoundProgram) -> None:
    """Warn if the data that a model takes are `None`, and nothing is observed."""
    given = named_arguments(program.program.model, program.args, program.kwargs)
    missing = [name for name, value in given.items() if value is None]
    if missing and notes(program):
        warnings.warn(
            f"{' and '.join(missing)} is None, and the model observes nothing: the fit is one to its prior. Pass "
            "the data, if there are any",
            stacklevel=4,
        )


def evaluate(
    program: BoundProgram, ranks: ProcessGroup, step: int, num_draws: int, num_particles: int, num_batches: int
) -> Evaluation:
    """Evaluate on fresh draws, and on fresh minibatches where a plate is subsampled.

    Args:
        program: Model and guide.
        ranks: The processes that share the draws.
        step: Steps taken.
        num_draws: Draws, where nothing is subsampled.
        num_particles: Draws for each minibatch, where something is.
        num_batches: Minibatches, at most: no more than 100 are taken.
    """

    def elbo(pair: TracePair) -> dict[str, Tensor]:
        return {"elbo": log_prob_sum(pair.model) - guide_log_prob(pair.guide)}

    if not program.spec.subsamples:
        values = program.vmap_in_chunks(elbo, ranks.share(num_draws))["elbo"]
    else:
        # Draws of one minibatch share its noise: the minibatches are what is averaged.
        particles = ranks.share(num_particles)
        with torch.no_grad():
            number = min(num_batches, _MAX_EVAL_BATCHES)
            # As epochs, in which the noise of minibatches cancels.
            draws = program.draw(particles, number)
            batches = [program.vmap_traces(elbo, draws.step(i))["elbo"] for i in range(number)]
            values = torch.stack([batch.mean() for batch in batches])
    mean = ranks.mean(values.mean())
    variance = ranks.mean((values - mean).square().mean())
    return _evaluation(step, float(mean), float(variance), ranks.size * len(values))


def evaluation_of_steps(step: int, elbos: Tensor) -> Evaluation:
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


def explained(result: FitResult, program: BoundProgram) -> FitResult:
    """Say why draws of the fitted guide have no density, if some have none: what rests on them is not converged."""
    if math.isfinite(result.elbo) or ProcessGroup().size > 1:
        return result
    with torch.random.fork_rng():
        reasons = in_words(program.without_density(_NUM_SUSPECTS))
    if result.status in (Status.CONVERGED, Status.PLATEAU_NOT_REACHED):
        status, start = Status.PLATEAU_NOT_REACHED, "not converged"
    else:
        status, start = result.status, result.stop_reason
    return dataclasses.replace(result, status=status, stop_reason=f"{start}: {reasons}")


def sites_without_density(program: BoundProgram, ranks: ProcessGroup, num_particles: int) -> Sequence[str]:
    """Return the names of the sites that have no finite density at some of the guide's draws."""

    def broken(pair: TracePair) -> dict[str, Tensor]:
        sites = [site for trace in pair for site in trace.nodes.values() if site["type"] == "sample"]
        guide_log_prob(pair.model), guide_log_prob(pair.guide)
        return {site["name"]: ~torch.as_tensor(site["log_prob_sum"]).isfinite() for site in sites}

    found = program.vmap_in_chunks(broken, num_particles)
    broken_here = [name for name, flags in found.items() if bool(flags.any())]
    # A dictionary, for its order: each name once.
    return list(dict.fromkeys(itertools.chain(*ranks.gather(broken_here))))
