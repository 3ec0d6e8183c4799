"""Eight schools: the classic hierarchical model, and its exact posterior in two dimensions."""

import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.interface.arguments import Size, check_real_tensor, checked

SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")


class GridPosterior(NamedTuple):
    """The posterior of (mu, log tau) on a grid.

    Attributes:
        mu: Grid of mu, `(num_mu,)`.
        log_tau: Grid of log tau, `(num_log_tau,)`.
        density: Normalised density in (mu, log tau), `(num_mu, num_log_tau)`.
        log_evidence: `log p(y)`, by the trapezoidal rule.
    """

    mu: Tensor
    log_tau: Tensor
    density: Tensor
    log_evidence: float


def data(**options: Any) -> tuple[Tensor, Tensor]:
    """Return standard errors and estimated effects of coaching in eight schools, `(sigma, y)`, each `(8,)`.

    Args:
        **options: `dtype` and `device` of the tensors.

    References:
        Rubin (1981), "Estimation in parallel randomized experiments", table 1; Gelman et al., "Bayesian data
        analysis", section 5.5.
    """
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], **options)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], **options)
    return sigma, y


def centered(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """Centred model: `mu ~ N(0, 5)`, `tau ~ HalfCauchy(5)`, `theta_j ~ N(mu, tau)`, `y_j ~ N(theta_j, sigma_j)`.

    Its posterior is a funnel: as tau goes to zero, every theta is squeezed onto mu.
    """
    mu, tau = _population(sigma)
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        result: Tensor = pyro.sample("y", dist.Normal(theta, sigma), obs=y)
    return result


def noncentered(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """Non-centred model: the same with `theta_j = mu + tau theta_trans_j`, `theta_trans_j ~ N(0, 1)`."""
    mu, tau = _population(sigma)
    with pyro.plate("school", len(sigma)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(torch.zeros_like(mu), 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        result: Tensor = pyro.sample("y", dist.Normal(theta, sigma), obs=y)
    return result


def log_marginal(mu: Tensor, tau: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    r"""Return `log p(y, mu, tau)`, theta integrated out: `y_j ~ N(mu, sqrt(sigma_j^2 + tau^2))`.

    Args:
        mu: `(*batch,)`.
        tau: `(*batch,)`, positive.
        sigma: `(8,)`.
        y: `(8,)`.

    Returns:
        `(*batch,)`.
    """
    scale = (sigma**2 + tau[..., None] ** 2).sqrt()
    prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
    result: Tensor = prior + dist.Normal(mu[..., None], scale).log_prob(y).sum(-1)
    return result


@checked
def grid_posterior(sigma: Tensor, y: Tensor, num_mu: Size = 400, num_log_tau: Size = 400) -> GridPosterior:
    """Return the exact posterior of (mu, log tau), by quadrature on -20 <= mu <= 30, -12 <= log tau <= 7.

    What the grid leaves out weighs less than 1e-5.

    Args:
        sigma: `(8,)`.
        y: `(8,)`.
        num_mu: Points in mu.
        num_log_tau: Points in log tau.
    """
    check_real_tensor("sigma", sigma, (None,), batch=False)
    check_real_tensor("y", y, sigma.shape)
    options: dict[str, Any] = {"dtype": torch.float64, "device": y.device}
    mu = torch.linspace(-20.0, 30.0, num_mu, **options)
    log_tau = torch.linspace(-12.0, 7.0, num_log_tau, **options)
    mu_grid, log_tau_grid = torch.meshgrid(mu, log_tau, indexing="ij")
    # log tau is the Jacobian of tau = exp(log tau).
    log_joint = log_marginal(mu_grid, log_tau_grid.exp(), sigma.double(), y.double()) + log_tau_grid
    cell = math.log(float((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])))
    log_evidence = float(log_joint.logsumexp((0, 1))) + cell
    return GridPosterior(mu, log_tau, (log_joint - log_evidence).exp(), log_evidence)


def _population(like: Tensor) -> tuple[Tensor, Tensor]:
    """Sample the population's mean and standard deviation, in the dtype and device of `like`."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return pyro.sample("mu", dist.Normal(zero, 5.0)), pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
