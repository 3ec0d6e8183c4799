r"""Linear regressions, `y_i ~ N(x_i beta, sigma)`, that differ in their priors.

A flat prior is a proper one under `.mask(False)`: density 1 on its support. The model can still be run forward, and the
dtype and device of the data carry over to the latents, which `ImproperUniform` leaves open.
"""

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor


def flat(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`beta` flat on R^k, `sigma` flat on (0, inf).

    Args:
        x: Regressors, `(size, k)`.
        y: Outcomes, `(size,)`; `None` to draw them.
    """
    return _regression(x, y, _flat_coefficients(x), dist.HalfNormal(x.new_ones(())).mask(False))


def half_cauchy_scale(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`beta` flat on R^k, `sigma ~ HalfCauchy(2.5)`; x and y as in `flat`."""
    return _regression(x, y, _flat_coefficients(x), dist.HalfCauchy(x.new_tensor(2.5)))


def normal_coefficients(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`beta_k ~ N(0, 10)`, `sigma ~ HalfNormal(10)`; x and y as in `flat`."""
    beta = dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1)
    return _regression(x, y, beta, dist.HalfNormal(x.new_tensor(10.0)))


def centered_regressors(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`y_i ~ N(Intercept + x_i b, sigma)`: regressors that are centred, so that the intercept is the mean of y.

    `b_k ~ N(0, 1)`, `Intercept ~ StudentT(3, 8, 10)`, `sigma ~ |StudentT(3, 0, 10)|`.

    Args:
        x: Regressors, each of mean 0, `(size, k)`.
        y: Outcomes, `(size,)`; `None` to draw them.
    """
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, x.new_tensor(8.0), 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, x.new_zeros(()), 10.0)))
    return _outcomes(intercept + x @ b, sigma, y)


def _flat_coefficients(x: Tensor) -> Any:
    return dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1).mask(False)


def _regression(x: Tensor, y: Tensor | None, beta_prior: Any, sigma_prior: Any) -> Tensor:
    beta = pyro.sample("beta", beta_prior)
    sigma = pyro.sample("sigma", sigma_prior)
    return _outcomes(x @ beta, sigma, y)


def _outcomes(loc: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
    with pyro.plate("data", len(loc)):
        result: Tensor = pyro.sample("y", dist.Normal(loc, sigma), obs=y)
    return result
