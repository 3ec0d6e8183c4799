"""A normal with a part that is wider: importance weights of a guide with one have a lighter tail."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

# Scale of the wide part. Wider ones, and Student-t, cost more for the same k-hat: where a fit is good but for its tail,
# the largest weights are those of draws from where a normal has few, not none.
_WIDE = 1.2


class DefensiveNormal(TorchDistribution):
    r"""`(1 - w) N(0, I) + w N(0, 1.44 I)`.

    Importance weights p / q of a q with such a part have a lighter tail where p has more far draws than a normal; the
    price in divergence is of the order of w^2 where the rest fits.

    Args:
        zeros: `(dim,)`.
        weight: w, between 0 and 1, `()`.
        batch_shape: Shape of independent copies.

    References:
        Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions",
        Technometrics 37, section 3.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, zeros: Tensor, weight: Tensor, batch_shape: Sequence[int] = ()) -> None:
        self.zeros, self.weight = zeros, weight
        super().__init__(torch.Size(batch_shape), zeros.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DefensiveNormal":
        """Return the same distribution with a larger batch shape, whose draws are independent."""
        return DefensiveNormal(self.zeros, self.weight, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, dim)`."""
        shape = torch.Size(sample_shape) + self.batch_shape
        draws: Tensor = dist.Normal(self.zeros, torch.ones_like(self.zeros)).rsample(shape)
        is_wide = torch.rand_like(draws[..., :1]) < self.weight
        return torch.where(is_wide, _WIDE * draws, draws)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at `value: (*shape, *batch, dim)`."""
        dim, square = value.shape[-1], value.square().sum(-1)
        normal = -0.5 * (square + dim * math.log(2 * math.pi))
        wide = normal + 0.5 * square * (1 - _WIDE**-2) - dim * math.log(_WIDE)
        return torch.logaddexp((-self.weight).log1p() + normal, self.weight.log() + wide)
