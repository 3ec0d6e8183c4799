"""How good an approximation is, by the importance weights of fresh draws, and which of two is better."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.diagnostics.weights import WeightSummary, summarize
from pyro_nf.distributions import FlowDistribution

# Draws of a measurement, and the effective part of them that a good approximation has. (k-hat scatters, and is high
# where flat weights have a thin long tail.)
NUM_DRAWS, _GOOD_ESS = 5000, 0.985


class Known(NamedTuple):
    """Points and the model's log density there."""

    points: Tensor
    log_p: Tensor


@torch.no_grad()
def measure(
    density: Density, posterior: FlowDistribution, num_sets: int = 1, known: Known | None = None
) -> tuple[WeightSummary | None, Known]:
    """Weigh draws, and return them too; what is known of a draw is not evaluated again."""
    points, log_q = posterior.rsample_and_log_prob((num_sets * NUM_DRAWS,))
    if known is None:
        log_p = density.values(points)
    else:
        log_p, moved = known.log_p.clone(), (points != known.points).any(-1)
        log_p[moved] = density.values(points[moved])
    # A draw without a density has no weight.
    weighed = torch.where(log_p.isfinite(), log_p, -math.inf)
    sets = (weighed.double() - log_q.double()).view(num_sets, NUM_DRAWS)
    usable = bool(log_q.isfinite().all()) and bool(sets.isfinite().any(-1).all())
    return summarize(sets.cpu().numpy()) if usable else None, Known(points, log_p)


def gap(found: WeightSummary) -> float:
    """Return the divergence from the posterior, in nats, as far as the draws show it."""
    return found.log_evidence - found.inner_elbo


def is_good(found: WeightSummary | None, max_gap: float) -> bool:
    """Whether no further stage is needed."""
    return found is not None and not found.frac_zero_density and gap(found) < max_gap and found.ess_fraction > _GOOD_ESS


def is_better(one: WeightSummary | None, other: WeightSummary | None) -> bool:
    """Whether one approximation is better than another."""
    if one is None or other is None:
        return one is not None
    difference = one.inner_elbo - other.inner_elbo
    if one.frac_zero_density or other.frac_zero_density:  # whose ELBO is minus infinity
        return difference > 0
    noise = math.hypot(one.elbo_mcse, other.elbo_mcse)
    if abs(difference) < 3 * noise and min(one.ess_fraction, other.ess_fraction) > 0.5:
        # Evidence and ELBO of the same draws have the same noise, in which a small difference of ELBOs drowns.
        return gap(one) < gap(other)
    return difference > 0
