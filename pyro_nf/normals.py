"""The normal that is nearest to a posterior, by natural gradients."""

import math

import torch
from torch import Tensor

from pyro_nf.density import Density
from pyro_nf.modes import cholesky_of

# Draws of a step, in pairs of opposite sign, more where there are many coordinates; steps at the full rate, and steps
# whose rates fall, which average.
_NUM_DRAWS, _NUM_STEPS, _NUM_AVERAGED, _RATE = 128, 15, 25, 0.5
# A step changes no variance by more than this factor, and moves by no more than this many standard deviations.
_MAX_FACTOR, _MAX_MOVE = 4.0, 2.0
# Longer residuals, in root mean squares of a normal's, are of draws far in a tail, and cut.
_MAX_RESIDUAL = 10.0
# The residuals' mean square, in nats, below which nothing is left to do.
_DONE = 1e-4


@torch.no_grad()
def nearest_normal(density: Density, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the normal `N(m, L L')` of the least divergence `KL(N | p)` from a density, beginning at a given one.

    In the coordinates `w` in which the normal is standard, `m + L w`, a step of the natural gradient at the rate r is
    `P = I + r sym E[(h + w) w']`, `w_m = r P^{-1} E[h + w]`, where h is the gradient of log p by w, P the new
    precision and w_m the new location. The residual h + w is zero for every draw once the normal is the posterior.

    Args:
        density: The model's.
        loc: m, `(dim,)`.
        scale_tril: L, `(dim, dim)`.

    Returns:
        Location, Cholesky factor, and the ELBO at each step, `(num_steps,)`.

    References:
        Khan, Rue (2023), "The Bayesian learning rule", arXiv:2107.04562, equations 10 and 11; Opper, Archambeau
        (2009), "The variational Gaussian approximation revisited", equations 5 and 6.
    """
    dim = len(loc)
    elbos = []
    pairs = max(_NUM_DRAWS // 2, 2 * dim)
    for step in range(_NUM_STEPS + _NUM_AVERAGED):
        rate = _RATE if step < _NUM_STEPS else 1 / (step - _NUM_STEPS + 1 / _RATE)
        noise = torch.randn(pairs, dim, dtype=loc.dtype, device=loc.device)
        noise = torch.cat([noise, -noise])
        gradients, values = density.gradients(loc + noise @ scale_tril.mT)
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - scale_tril.diagonal().log().sum()
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
    return loc, scale_tril, torch.stack(elbos)


def cut(residual: Tensor, values: Tensor, longest: float) -> Tensor:
    """Shorten residuals, `(num_points, dim)`, to a root mean square; to 0 where they or values are not finite."""
    length = residual.square().mean(-1, keepdim=True).sqrt()
    usable = length.isfinite() & values.isfinite()[:, None]
    return torch.where(usable, residual * (longest / length).clamp(max=1), 0.0)
