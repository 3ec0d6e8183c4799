"""Last stage: a part of the base that is wider, where that makes the weights' tail lighter."""

from dataclasses import dataclass
from typing import Any

import torch

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.diagnostics.weights import WeightSummary
from pyro_nf.distributions.bases import NormalBase
from pyro_nf.inference.staged.measure import NUM_DRAWS, Known, measure
from pyro_nf.inference.staged.stage import Fitted, Problem

# A k-hat below which the weights' tail is light, by a margin for its scatter, as the median of so many sets of draws;
# the weights of a wider normal that are tried for it, how much ELBO one may cost, in nats, and how much it must gain.
_LIGHT_TAIL, _NUM_SETS, _WEIGHTS, _PRICE, _GAIN = 0.2, 3, (0.03, 0.05, 0.1), 0.003, 0.1


@dataclass(frozen=True)
class Tails:
    """The weight of a defensive mixture.

    Where the posterior has more far out than the fit, the largest importance weights are those of a few draws there.
    """

    name: str = "tails"
    max_gap: float = 0.005

    def num_points(self, num_particles: int) -> int:
        """A third, for these points need no gradients, of what a measurement of each weight takes."""
        return _NUM_SETS * NUM_DRAWS * (1 + len(_WEIGHTS))

    def applies(self, so_far: Approximation) -> bool:
        """Where the base is normal."""
        return isinstance(so_far.base, NormalBase)

    def fit(self, problem: Problem, so_far: Approximation) -> Fitted | None:
        """Try some weights on the same noise, and return the one of the lightest tail if it gains enough."""
        twin = so_far.copy()
        base: Any = twin.base
        tried: dict[float, WeightSummary] = {}
        seed = int(torch.randint(2**31, ()))
        known: Known | None = None
        for weight in (0.0, *_WEIGHTS):
            base.defend(weight)
            # With the same noise for every weight most draws are the same: k-hats compare, and few are evaluated.
            torch.manual_seed(seed)
            # As often as tells k-hats apart, which scatter.
            found, known = measure(problem.density, twin.posterior(), num_sets=_NUM_SETS, known=known)
            if found is not None and found.elbo > tried.get(0.0, found).elbo - _PRICE:
                tried[weight] = found
            if found is not None and found.khat < _LIGHT_TAIL:
                break
        best = min(tried, key=lambda weight: tried[weight].khat, default=0.0)
        if not best or (0.0 in tried and tried[best].khat > tried[0.0].khat - _GAIN):
            return None
        base.defend(best)
        return Fitted(twin, torch.empty(0), weights=tried[best])
