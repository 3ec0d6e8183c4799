"""First stage: the normal that is nearest to the posterior."""

from dataclasses import dataclass

import torch

from pyro_nf.approximations.approximation import Approximation, start_at_modes
from pyro_nf.approximations.gaussian import nearest_normal
from pyro_nf.approximations.modes import normal_elbo
from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.inference.staged.stage import Fitted, Problem


@dataclass(frozen=True)
class Normal:
    """Natural gradients to the nearest normal, from the best of several modes or from the start.

    A mixture stays on the modes.
    """

    name: str = "normal"
    # What takes next to no time has to be better: the stage after this one costs nothing.
    max_gap: float = 0.001

    def num_points(self, num_particles: int) -> int:
        """Forty steps of 128 draws."""
        return 40 * 128

    def applies(self, so_far: Approximation) -> bool:
        """It always does."""
        return True

    def fit(self, problem: Problem, so_far: Approximation) -> Fitted:
        """Fit the affine layer alone."""
        density, report = problem.density, problem.report
        candidates = [so_far.affine.as_matrix()]
        starts, found = start_at_modes(so_far, density, problem.num_starts, report)
        if starts.modes and isinstance(found.base, MixtureBase):
            return Fitted(found, torch.tensor([starts.modes[0].elbo]), starts=starts)
        if starts.modes:
            best = starts.modes[0]
            # The neck of a funnel, which is no mode, may be a worse start than none.
            candidates = [(best.loc, best.scale_tril), *(() if best.converged else candidates)]
        normals = [nearest_normal(density, loc, scale_tril, report) for loc, scale_tril in candidates]
        loc, scale_tril, elbos = max(normals, key=lambda normal: normal_elbo(density, *normal[:2]))
        found.affine.assign(loc, scale_tril)
        return Fitted(found, elbos, starts=starts)
