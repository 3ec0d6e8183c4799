"""An approximation to a posterior as a value: what a stage of a fit starts from, and what it returns."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import Starts, find_starts, starting_points
from pyro_nf.distributions import FlowDistribution
from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.flows import Flow, Sequential
from pyro_nf.interface.waits import Report, silent


@dataclass(frozen=True)
class Approximation:
    r"""The law of `y = affine(network(x))`, x of the base, over a model's unconstrained coordinates.

    A value: nobody changes the modules that it holds. Who wants others takes a `copy` and changes that.

    Attributes:
        base: Module that returns the base distribution.
        network: The flow before the affine layer, the identity until a stage trains it.
        affine: The outer layer: a `WhitenedAffine`, or an `ElementwiseAffine` where there are many coordinates.
        has_network: Whether the network is part of it; left out, it costs nothing.
    """

    base: nn.Module
    network: Flow
    affine: Any
    has_network: bool = True

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return int(self.affine.event_shape[0])

    @property
    def flow(self) -> Flow:
        """The layers from the base to the coordinates."""
        return Sequential(self.network, self.affine) if self.has_network else self.affine

    def posterior(self) -> FlowDistribution:
        """Return the distribution."""
        return FlowDistribution(self.base(), self.flow)

    def copy(self, has_network: bool | None = None) -> "Approximation":
        """Return one that shares nothing with this one, with the network or without it if asked."""
        twin = copy.deepcopy(self)
        return twin if has_network is None else replace(twin, has_network=has_network)


@torch.no_grad()
def start_at_modes(
    approximation: Approximation, density: Density, num_starts: int, report: Report = silent
) -> tuple[Starts, Approximation]:
    """Put an approximation on the modes that L-BFGS finds, if its ELBO is higher there than where it is.

    The affine layer takes the location of the best mode and the curvature of the log density there. Over a mixture base
    every mode that is not negligible gets a component.

    Args:
        approximation: Where to begin: an identity network, a `WhitenedAffine`.
        density: The model's.
        num_starts: Runs of L-BFGS, the first from where the approximation is, the others from random points.
        report: Is told after each evaluation; false ends the L-BFGS runs where they are.

    Returns:
        What was found, and the approximation on the modes.
    """
    here: Tensor = approximation.affine.as_matrix()[0]
    points = torch.cat([here[None], starting_points(num_starts - 1, here)])
    starts = find_starts(density, approximation.posterior(), points, report)
    found = approximation.copy()
    if starts.modes:
        best = starts.modes[0]
        found.affine.assign(best.loc, best.scale_tril)
        if isinstance(found.base, MixtureBase):
            found.base.assign(starts.modes, starts.shares)
    return starts, found
