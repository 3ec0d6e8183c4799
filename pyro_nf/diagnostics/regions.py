"""Regions of the posterior that a guide leaves out: L-BFGS runs from elsewhere, beside where its draws are."""

import math
from typing import NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import Mode, distance, find_modes, starting_points
from pyro_nf.diagnostics.progress import Progress

_NUM_DRAWS = 2000
# Regions with less of the evidence than this do not count.
_NEGLIGIBLE = 0.01
# Modes with so much less evidence than all that the guide covers, in nats, do not matter, however many.
_LEAST_EVIDENCE = 30.0
# Two modes whose normals have evidences that differ by less than this, in nats, may be copies of one another.
_SAME_EVIDENCE = 0.3
# A guide has left a region out that holds so many times what it has there, Monte Carlo errors aside.
_TIMES = 2.0


class Search(NamedTuple):
    """What L-BFGS runs from elsewhere found.

    Attributes:
        num_starts: Climbs.
        missed: The region with the most evidence that the guide has too few draws in, if there is one.
        copied: Whether another mode has the evidence of that region's, as copies of one mode by relabeling have.
        num_modes: Modes that hold more than a negligible part of the evidence.
        num_scattered: Modes of little evidence, each found by L-BFGS runs of its own, where the guide has no draws.
    """

    num_starts: int
    missed: "Region | None"
    copied: bool
    num_modes: int
    num_scattered: int


class Region(NamedTuple):
    """The inner half of the normal at a mode.

    Attributes:
        evidence: The evidence in it, over all the evidence where the guide's draws are: may be more than 1.
        evidence_se: Its Monte Carlo standard error.
        draws: Share of the guide's draws in it: equal to `evidence` for the exact posterior.
        draws_se: Its Monte Carlo standard error.
    """

    evidence: float
    evidence_se: float
    draws: float
    draws_se: float

    @property
    def is_missed(self) -> bool:
        """Whether the guide has too few draws here, beyond what chance explains."""
        least, most = self.evidence - 3 * self.evidence_se, self.draws + 3 * self.draws_se
        return least > _NEGLIGIBLE and least > _TIMES * most


def search(density: Density, points: Tensor, log_evidence: float, num_starts: int, shown: Progress) -> Search:
    """Climb from elsewhere, and compare the evidence around the modes with the guide's draws there.

    Whatever the posterior's shape, both figures are of the same region, an ellipsoid about the mode, and both are
    plain Monte Carlo: of the density under draws from the normal there, and of the guide's draws.

    Args:
        density: The model's, over the coordinates.
        points: The guide's draws, `(n, dim)`.
        log_evidence: As the guide's weights estimate it.
        num_starts: Climbs, at least one.
        shown: Where they are shown.
    """
    with shown.part("other starts", num_starts) as advance:
        modes = find_modes(density, starting_points(num_starts, points[0]), advance)
    # Every mode: the normal at one that is bent has next to no ELBO, and maybe half of the evidence in its inner half.
    found = [
        (_region(density, mode, points, log_evidence), mode)
        for mode in shown.over("evidence around modes", modes, len(modes))
    ]
    missed = max([pair for pair in found if pair[0].is_missed], key=lambda pair: pair[0].evidence, default=None)
    return Search(
        num_starts=num_starts,
        missed=None if missed is None else missed[0],
        copied=missed is not None and any(_as_much(missed[1], mode) for mode in modes),
        num_modes=sum(mode.converged and region.evidence > _NEGLIGIBLE for region, mode in found),
        num_scattered=_num_scattered(modes, points, log_evidence),
    )


def _as_much(mode: Mode, other: Mode) -> bool:
    return other is not mode and other.converged and abs(other.elbo - mode.elbo) < _SAME_EVIDENCE


def _num_scattered(modes: list[Mode], points: Tensor, log_evidence: float) -> int:
    """Return how many modes lie where the guide has no draws and have little evidence, though not next to none.

    One of them may be left out. If nearly every L-BFGS run finds another one, there are many more than runs.
    """
    low, high = log_evidence - _LEAST_EVIDENCE, log_evidence + math.log(_NEGLIGIBLE)
    away = (mode for mode in modes if mode.converged and low < mode.elbo < high)
    return sum(not bool((distance(mode, points) < _radius(points.shape[1])).any()) for mode in away)


def _radius(dim: int) -> float:
    """Root mean square, over the coordinates, of a standard normal's median distance from its centre."""
    return math.sqrt(chi2.median(dim) / dim)


def _region(density: Density, mode: Mode, points: Tensor, log_evidence: float) -> Region:
    dim = len(mode.loc)
    radius = _radius(dim)
    normal = torch.distributions.MultivariateNormal(mode.loc, scale_tril=mode.scale_tril)
    draws = normal.sample((_NUM_DRAWS,))
    log_weights = density.values(draws).double() - normal.log_prob(draws).double() - log_evidence
    held = log_weights.nan_to_num(nan=-math.inf).exp() * (distance(mode, draws) < radius)
    inside = (distance(mode, points) < radius).double()
    # One draw more of each kind, or no draws at all would seem certain.
    share = float((inside.sum() + 1) / (len(points) + 2))
    return Region(
        evidence=float(held.mean()),
        evidence_se=float(held.std()) / math.sqrt(_NUM_DRAWS),
        draws=float(inside.mean()),
        draws_se=math.sqrt(share * (1 - share) / len(points)),
    )
