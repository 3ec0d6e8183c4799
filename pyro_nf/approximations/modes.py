"""Modes of a posterior by multistart L-BFGS, with a Laplace approximation at each: where a fit begins.

Pathfinder (Zhang, Carpenter, Gelman, Vehtari 2022, arXiv:2108.03782), a near relative, takes its normals from L-BFGS's
own estimates of the curvature along the way; here a run is followed to its end, and the Hessian there is computed.
"""

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_nf.approximations.density import Ask, BatchedEvaluator, Density
from pyro_nf.approximations.natural_gradient import normal_log_prob
from pyro_nf.distributions import FlowDistribution
from pyro_nf.interface.waits import Report, silent

# Starting points lie in this cube, as Stan's do.
_RADIUS = 2.0
# Eigenvalues of the Hessian: flatter directions than the prior's widest, and steeper ones than rounding resolves.
_MIN_PRECISION, _MAX_PRECISION = 1e-6, 1e12
# Two runs have found one mode if they ended within so many of its standard deviations, by root mean square.
_SAME_MODE = 0.5
# At a mode the log density's slope, in nats for each of its standard deviations, is below this, by root mean square.
_LEVEL = 0.1
# A mode with less of the evidence than this is left out.
_NEGLIGIBLE = 1e-3
_NUM_DRAWS = 500
# Of L-BFGS: an L-BFGS run into the neck of a funnel has no end.
_MAX_ITERATIONS = 200


class Mode(NamedTuple):
    """A normal at a mode.

    Attributes:
        loc: Where it is, unconstrained, `(dim,)`.
        scale_tril: Cholesky factor of the inverse of minus the log density's Hessian there, `(dim, dim)`.
        elbo: The normal's ELBO, an estimate of the evidence near the mode from below.
        num_runs: How many runs ended there.
        converged: Whether it is flat there, and not a point on the way into the neck of a funnel.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    num_runs: int
    converged: bool = True


class Starts(NamedTuple):
    """What a warm start found.

    Attributes:
        modes: Found modes whose normals are better than the guide was, the best first.
        shares: Their shares of the evidence, as their normals' ELBOs estimate it.
        elbo: ELBO of the guide before.
        num_runs: Runs of L-BFGS.
    """

    modes: tuple[Mode, ...]
    shares: tuple[float, ...]
    elbo: float
    num_runs: int

    @property
    def disagree(self) -> bool:
        """Whether runs ended at different modes, none of which is negligible."""
        return sum(mode.converged for mode in self.modes) > 1

    @property
    def without_mode(self) -> bool:
        """Whether no run ended at a mode from which the guide could start."""
        return not any(mode.converged for mode in self.modes)

    def __str__(self) -> str:
        """One line for people."""
        if not self.modes:
            return f"{self.num_runs} starts: none is better than the guide as it was (ELBO {self.elbo:.3f})"
        if self.without_mode:
            return (
                f"{self.num_runs} starts ended where the log density still rises; the normal around the best of these "
                f"points is better than the guide was (ELBO {self.modes[0].elbo:.3f}; before, {self.elbo:.3f})"
            )
        if not self.disagree:
            return f"{self.num_runs} starts agree on one mode (ELBO {self.modes[0].elbo:.3f}; before, {self.elbo:.3f})"
        shares = ", ".join(f"{share:.2f}" for share in self.shares)
        return f"{self.num_runs} starts disagree: {len(self.modes)} modes, with shares {shares} of the evidence"


def find_starts(density: Density, posterior: FlowDistribution, points: Tensor, report: Report = silent) -> Starts:
    """Climb from each point, and return the modes whose normals have a higher ELBO than the guide's own.

    A normal at a mode can be far worse than any other start: the density of a centred hierarchy has no bound, and
    L-BFGS runs end where all groups are equal. Hence the ELBO decides.

    Args:
        density: The model's.
        posterior: The guide's, as it is.
        points: Where to start, `(num_runs, dim)`.
        report: Is told after each evaluation; false ends the L-BFGS runs where they are.
    """
    num_evaluations = 0

    def advance(ended: int) -> bool:
        nonlocal num_evaluations
        num_evaluations += not ended
        return report("L-BFGS runs", min(num_evaluations, _MAX_ITERATIONS), _MAX_ITERATIONS, math.nan)

    draws = posterior.sample((_NUM_DRAWS,))
    before = _mean(density.values(draws) - posterior.log_prob(draws))
    found = find_modes(density, points, advance)
    kept = [mode for mode in found if mode.elbo > max(before, found[0].elbo + math.log(_NEGLIGIBLE))]
    shares = torch.tensor([mode.elbo for mode in kept], dtype=torch.float64).softmax(0).tolist()
    return Starts(tuple(kept), tuple(shares), before, len(points))


def find_modes(density: Density, points: Tensor, advance: Callable[[int], object] = lambda ended: None) -> list[Mode]:
    """Climb from each point, `(num_runs, dim)`, and return the distinct modes, that of the highest ELBO first.

    Args:
        density: The model's.
        points: Where to start.
        advance: Called with the number of runs that have ended since, at each evaluation too, with 0; what returns
            `False` ends the runs where they are.
    """
    found: list[Mode] = []
    for loc in _run_lbfgs(density, points, advance):
        if _joins(found, loc):
            continue
        if found and advance(0) is False:
            break
        scale_tril = _scale_tril(density.hessian(loc).double())
        if scale_tril is None:
            continue
        scale_tril = scale_tril.to(loc)
        # A step of Newton's method, for L-BFGS runs slow down where scales differ by orders of magnitude.
        both = torch.stack([loc, loc + scale_tril @ (scale_tril.mT @ density.gradients(loc[None])[0][0])])
        slopes, values = density.gradients(both)
        better = int(values[1] > values[0])
        if not _joins(found, both[better]):
            converged = float((scale_tril.mT @ slopes[better]).square().mean().sqrt()) < _LEVEL
            elbo = normal_elbo(density, both[better], scale_tril)
            found.append(Mode(both[better], scale_tril, elbo, 1, converged))
    return sorted(found, key=lambda mode: -mode.elbo)


def _joins(found: list[Mode], loc: Tensor) -> bool:
    """Count a run to the mode at which it ended, if that is known."""
    for number, mode in enumerate(found):
        if distance(mode, loc) < _SAME_MODE:
            found[number] = mode._replace(num_runs=mode.num_runs + 1)
            return True
    return False


def starting_points(num_points: int, like: Tensor) -> Tensor:
    """Return uniform points in the cube from -2 to 2, in pairs `x, -x`: to each side of the origin as many.

    Args:
        num_points: How many.
        like: A point, `(dim,)`.
    """
    points = _RADIUS * (2 * torch.rand(-(-num_points // 2), len(like), dtype=like.dtype, device=like.device) - 1)
    return torch.stack([points, -points], 1).flatten(0, 1)[:num_points]


def _run_lbfgs(density: Density, points: Tensor, advance: Callable[[int], object]) -> Tensor:
    """Return where L-BFGS ends from each point, `(num_runs, dim)`; the runs take their gradients together."""
    over = threading.Event()

    def evaluate(together: Tensor) -> tuple[Tensor, Tensor]:
        if advance(0) is False:
            over.set()
        return density.gradients(together)

    def halt(x: np.ndarray) -> None:
        if over.is_set():
            raise StopIteration  # which ends a run of L-BFGS where it is

    def run(number: int, gradients: Ask) -> Tensor:
        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            gradient, value = gradients(torch.as_tensor(x).to(points))
            if not (value.isfinite() and gradient.isfinite().all()):
                return math.inf, np.zeros_like(x)  # the line search steps back
            return -float(value), -gradient.double().cpu().numpy()

        start = points[number].double().cpu().numpy()
        options = {"maxiter": _MAX_ITERATIONS}
        try:
            result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options, callback=halt)
        finally:
            advance(1)
        return torch.as_tensor(result.x).to(points)

    return torch.stack(BatchedEvaluator(evaluate).run(run, len(points)))


def _scale_tril(hessian: Tensor) -> Tensor | None:
    """Return the Cholesky factor of the covariance that the curvature says, a usable one also off a mode."""
    if not bool(hessian.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(-hessian)
    return cholesky_of(vectors / values.abs().clamp(_MIN_PRECISION, _MAX_PRECISION).sqrt())


def cholesky_of(root: Tensor) -> Tensor:
    """Return the Cholesky factor of `root root'`, also where that is near singular, `(dim, dim)`."""
    # R of the thin QR of the transposed root, up to signs.
    upper = torch.linalg.qr(root.mT).R
    scale_tril: Tensor = (upper * upper.diagonal().sign()[:, None]).mT
    return scale_tril


def distance(mode: Mode, points: Tensor) -> Tensor:
    """Root mean square over the coordinates of how far `(*batch, dim)` is from a mode, in its standard deviations."""
    whitened = torch.linalg.solve_triangular(mode.scale_tril, (points - mode.loc)[..., None], upper=False)
    result: Tensor = whitened[..., 0].square().mean(-1).sqrt()
    return result


def normal_elbo(density: Density, loc: Tensor, scale_tril: Tensor) -> float:
    """Return the ELBO of a normal, from some hundred draws."""
    noise = torch.randn(_NUM_DRAWS, len(loc), dtype=loc.dtype, device=loc.device)
    # With the draws' own density, not its mean, the entropy: what is normal has no Monte Carlo error then.
    return _mean(density.values(loc + noise @ scale_tril.mT) - normal_log_prob(noise, scale_tril))


def _mean(values: Tensor) -> float:
    return float(values.mean().nan_to_num(nan=-math.inf))
