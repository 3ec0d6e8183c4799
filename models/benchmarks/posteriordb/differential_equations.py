"""Differential equations with noisy observations."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.models.benchmarks.posteriordb.priors import Restricted

# Runge-Kutta steps from one observation to the next. On the reference draws of lynx and hare, with a year between
# observations, the log density is right to 2e-4 nats; with 20 steps to 1e-5, at twice the cost.
_NUM_STEPS = 10


def lotka_volterra(times: Tensor, y_init: Tensor, y: Tensor) -> None:
    r"""Prey u and predators v, `u' = (alpha - beta v) u`, `v' = (delta u - gamma) v`, seen with lognormal noise.

    `theta = (alpha, beta, gamma, delta) > 0`: alpha and gamma `N(1, 0.5)`, beta and delta `N(0.05, 0.05)`, not
    renormalised; `z_init_k ~ LogNormal(log 10, 1)` is (u, v) at time 0, `sigma_k ~ LogNormal(-1, 1)`. Observed are
    `y_init_k ~ LogNormal(log z_init_k, sigma_k)` and `y_nk ~ LogNormal(log z_k(t_n), sigma_k)`.

    Args:
        times: `(size,)`, increasing, positive.
        y_init: `(2,)`, positive.
        y: `(size, 2)`, positive.

    References:
        Lotka (1925), "Elements of physical biology"; Volterra (1926), "Fluctuations in the abundance of a species
        considered mathematically".
    """
    loc, scale = y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05])
    positive = dist.constraints.independent(dist.constraints.positive, 1)
    theta = pyro.sample("theta", Restricted(dist.Normal(loc, scale).to_event(1), positive))
    z_init = pyro.sample("z_init", dist.LogNormal(y.new_full((2,), 10.0).log(), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_full((2,), -1.0), 1.0).to_event(1))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    with pyro.plate("time", len(times)):
        pyro.sample("y", dist.LogNormal(_log_populations(theta, z_init, times), sigma).to_event(1), obs=y)


def _log_populations(theta: Tensor, z_init: Tensor, times: Tensor) -> Tensor:
    """Return (log u, log v) at the times, `(size, 2)`, by the classical Runge-Kutta method.

    In logarithms the equations are `(log u)' = alpha - beta v`, `(log v)' = -gamma + delta u`: both stay positive.
    """
    signs = theta.new_tensor([1.0, -1.0])
    rates, crossed = theta[0::2] * signs, -theta[1::2] * signs

    def slope(x: Tensor) -> Tensor:
        return rates + crossed * x.exp().flip(-1)

    x, found = z_init.log(), []
    for step in torch.diff(times, prepend=torch.zeros_like(times[:1])) / _NUM_STEPS:
        for _ in range(_NUM_STEPS):
            k1 = slope(x)
            k2 = slope(x + step / 2 * k1)
            k3 = slope(x + step / 2 * k2)
            k4 = slope(x + step * k3)
            x = x + step / 6 * (k1 + 2 * (k2 + k3) + k4)
        found.append(x)
    return torch.stack(found)
