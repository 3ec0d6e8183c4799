"""Mixtures."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.models.benchmarks.posteriordb.priors import Restricted


def two_normals(y: Tensor) -> None:
    r"""`y_i ~ theta N(mu_1, sigma_1) + (1 - theta) N(mu_2, sigma_2)`, the components summed out, `mu_1 < mu_2`.

    `mu_k ~ N(0, 2)` on the ordered pairs, not renormalised; `sigma_k ~ HalfNormal(2)`; `theta ~ Beta(5, 5)`.

    Args:
        y: `(size,)`.
    """
    normals = dist.Normal(y.new_zeros(2), 2.0).to_event(1)
    mu = pyro.sample("mu", Restricted(normals, dist.constraints.ordered_vector))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    component = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(component, dist.Normal(mu, sigma)), obs=y)
