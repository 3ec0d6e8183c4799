"""Priors that Pyro has no distribution for."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_MAX_TRIES = 10_000


class Restricted(TorchDistribution):
    r"""A distribution on a part of its support: `p(x) = base(x)` there, *not* renormalised.

    Its integral is the base's probability of that part. This is what a bounded or ordered parameter has in Stan, where
    a bound says what values there are and changes no density. Draws are the base's that fall inside, by rejection.

    Args:
        base_dist: A distribution of the whole value.
        support: The part: a constraint with `base_dist`'s event shape.

    Shapes:
        Those of `base_dist`.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.models.benchmarks.posteriordb.priors import Restricted
        >>> prior = Restricted(dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.constraints.ordered_vector)
        >>> first, second = prior.sample()
        >>> bool(first < second)
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base_dist: Any, support: constraints.Constraint, validate_args: bool | None = None) -> None:
        self.base_dist, self._support = base_dist, support
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The part of the base's support."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Restricted":
        """Return the same distribution with a larger batch shape, whose draws are independent."""
        return Restricted(self.base_dist.expand(batch_shape), self._support, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, *event)`.

        Raises:
            ValueError: If some draw is still outside after 10,000 tries.
        """
        shape = torch.Size(sample_shape)
        draws: Tensor = self.base_dist.sample(shape)
        for _ in range(_MAX_TRIES):
            inside = self._support.check(draws)
            if bool(inside.all()):
                return draws
            inside = inside[(...,) + (None,) * self.event_dim]
            draws = torch.where(inside, draws, self.base_dist.sample(shape))
        raise ValueError(
            f"no draw of {self.base_dist} fell into {self._support} in {_MAX_TRIES} tries: its parameters are NaN, or "
            "that part of its support has next to no probability"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the base's log density, `(*shape, *batch)`, at a value inside the support."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob: Tensor = self.base_dist.log_prob(value)
        return log_prob
