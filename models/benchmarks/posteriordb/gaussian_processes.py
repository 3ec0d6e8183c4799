"""Gaussian processes."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def gaussian_process(x: Tensor, y: Tensor) -> None:
    r"""`y ~ N(0, K + sigma I)` with `K_ij = alpha^2 exp(-(x_i - x_j)^2 / (2 rho^2))`; the noise's *variance* is sigma.

    `rho ~ Gamma(25, 4)`, `alpha ~ HalfNormal(2)`, `sigma ~ HalfNormal(1)`.

    Args:
        x: `(size,)`.
        y: `(size,)`.

    References:
        Rasmussen, Williams (2006), "Gaussian processes for machine learning", equation 2.21.
    """
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(1.0)))
    kernel = alpha**2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    covariance = kernel + sigma * torch.eye(len(x), dtype=x.dtype, device=x.device)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)
