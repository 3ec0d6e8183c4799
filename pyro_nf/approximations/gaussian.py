"""The normal that is nearest to a posterior, by natural gradients."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import cholesky_of
from pyro_nf.approximations.natural_gradient import Rates, antithetic_normals, cut, normal_log_prob
from pyro_nf.interface.waits import Report, silent

# Draws of a step, in pairs of opposite sign, more where there are many coordinates; steps at the full rate, and steps
# whose rates fall, which average.
_NUM_DRAWS, _RATES = 128, Rates(num_steps=15, num_averaged=25)
# A step changes no variance by more than this factor, and moves by no more than this many standard deviations.
_MAX_FACTOR, _MAX_MOVE = 4.0, 2.0
# Longer residuals, in root mean squares of a normal's, are of draws far in a tail, and cut.
_MAX_RESIDUAL = 10.0
# The residuals' mean square, in nats, below which nothing is left to do.
_DONE = 1e-4


@torch.no_grad()
def nearest_normal(
    density: Density, loc: Tensor, scale_tril: Tensor, report: Report = silent
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the normal `N(m, L L')` of the least divergence `KL(N | p)` from a density, beginning at a given one.

    In the coordinates `w` in which the normal is standard, `m + L w`, a step of the natural gradient at the rate r is
    `P = I + r sym E[(h + w) w']`, `w_m = r P^{-1} E[h + w]`, where h is the gradient of log p by w, P the new
    precision and w_m the new location. The residual h + w is zero for every draw once the normal is the posterior.
    Where the last normal is worse than one on the way, by more than Monte Carlo error explains, that one is returned.

    Args:
        density: The model's.
        loc: m, `(dim,)`.
        scale_tril: L, `(dim, dim)`.
        report: Is told the ELBO after each step; false ends the steps.

    Returns:
        Location, Cholesky factor, and the ELBO at each step, `(num_steps,)`.

    References:
        Khan, Rue (2023), "The Bayesian learning rule", arXiv:2107.04562, equations 10 and 11; Opper, Archambeau
        (2009), "The variational Gaussian approximation revisited", equations 5 and 6.
    """
    dim = len(loc)
    elbos: list[Tensor] = []
    best = _Passed(-math.inf, math.inf, loc, scale_tril)
    pairs = max(_NUM_DRAWS // 2, 2 * dim)
    for step in range(_RATES.total):
        rate, noise = _RATES[step], antithetic_normals(pairs, loc)
        gradients, values = density.gradients(loc + noise @ scale_tril.mT)
        log_q = normal_log_prob(noise, scale_tril)
        here = _passed(values - log_q, loc, scale_tril)
        best = here if here.elbo > best.elbo else best
        elbos.append((values - log_q).mean())
        residual = cut(gradients @ scale_tril + noise, values, _MAX_RESIDUAL)
        if bool(values.isfinite().all()) and float(residual.square().sum(-1).mean()) < _DONE:
            break
        # E[(h + w) w'] as the slope of a regression, which has no Monte Carlo error where the posterior is normal.
        odd, half = (residual[:pairs] - residual[pairs:]) / 2, noise[:pairs]
        curvature = torch.linalg.solve(half.mT @ half, half.mT @ odd)
        # A change of the precision by more than the factor would follow a few far draws.
        change, vectors = torch.linalg.eigh(-rate * (curvature + curvature.mT) / 2)
        precision = (1 + change).clamp(1 / _MAX_FACTOR, _MAX_FACTOR)
        move = rate * vectors @ (vectors.mT @ residual.mean(0) / precision)
        move = move * (_MAX_MOVE / move.norm()).clamp(max=1)
        loc = loc + scale_tril @ move
        scale_tril = cholesky_of(scale_tril @ vectors / precision.sqrt())
        if not report("natural gradients", step + 1, _RATES.total, here.elbo):
            break
    if best.elbo - here.elbo > 3 * math.hypot(best.mcse, here.mcse):
        loc, scale_tril = best.loc, best.scale_tril
    return loc, scale_tril, torch.stack(elbos)


class _Passed(NamedTuple):
    """A normal on the way, its ELBO and the Monte Carlo error of that."""

    elbo: float
    mcse: float
    loc: Tensor
    scale_tril: Tensor


def _passed(log_weights: Tensor, loc: Tensor, scale_tril: Tensor) -> _Passed:
    elbo, mcse = float(log_weights.mean()), float(log_weights.std()) / math.sqrt(len(log_weights))
    return _Passed(elbo if math.isfinite(elbo) else -math.inf, mcse if math.isfinite(mcse) else 0.0, loc, scale_tril)
