"""Time series: autoregression, volatility, hidden states."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.models.benchmarks.posteriordb.priors import Restricted


def autoregression(y: Tensor, order: int) -> None:
    r"""`y_t ~ N(alpha + sum_k beta_k y_{t-k}, sigma)` for t > order, given the first values.

    `alpha ~ N(0, 10)`, `beta_k ~ N(0, 10)`, `sigma ~ HalfCauchy(2.5)`.

    Args:
        y: `(size,)`.
        order: Number of lags.
    """
    # Row t holds the `order` values before y_t, the latest first.
    lags = y.unfold(0, order, 1)[:-1].flip(-1)
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(order), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("time", len(lags)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def garch(y: Tensor, first_scale: Tensor) -> None:
    r"""GARCH(1, 1): `y_t ~ N(mu, s_t)`, `s_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s_{t-1}^2`.

    Flat priors: mu on R, alpha0 on (0, inf), alpha1 on (0, 1), beta1 on (0, 1 - alpha1). A support that moves with
    another latent has no fixed map to the real line, so the latent is beta1's share of its interval.

    Args:
        y: `(size,)`.
        first_scale: s_1, a scalar.

    References:
        Bollerslev (1986), "Generalized autoregressive conditional heteroskedasticity", equation 2.
    """
    zero = torch.zeros_like(first_scale)
    mu = pyro.sample("mu", dist.Normal(zero, 1.0).mask(False))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(zero + 1).mask(False))
    alpha1 = pyro.sample("alpha1", dist.Uniform(zero, 1.0))
    share = pyro.sample("beta1_share", dist.Uniform(zero, 1.0))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * share)
    # beta1's density is 1, hence its share's is d beta1 / d share.
    pyro.factor("beta1_flat", torch.log1p(-alpha1))
    variances = [first_scale**2]
    for shock in (y[:-1] - mu) ** 2:
        variances.append(alpha0 + alpha1 * shock + beta1 * variances[-1])
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mu, torch.stack(variances).sqrt()), obs=y)


def hidden_markov(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    r"""Two hidden states, each with its own rates: `u_t ~ Exponential(phi_state)`, `v_t ~ Exponential(lambda_state)`.

    The probabilities of going on from state 1, theta1, are `Dirichlet(alpha_1)`, from state 2, theta2,
    `Dirichlet(alpha_2)`. phi and lambda are positive ordered pairs, `N(0, 1)` and `N(3, 1)`, not renormalised. The
    states are summed out; both first states have weight 1.

    Args:
        u: `(size,)`, positive, two values or more.
        v: `(size,)`, positive.
        alpha: `(2, 2)`, positive.
    """
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    rates = Restricted(dist.Normal(u.new_tensor([0.0, 3.0]), 1.0).to_event(1), dist.constraints.positive_ordered_vector)
    phi = pyro.sample("phi", rates)
    lam = pyro.sample("lambda", rates)
    # Time is the last dimension of all, for sums over two states are slow where these are neighbours in memory.
    log_emission = dist.Exponential(phi[:, None]).log_prob(u) + dist.Exponential(lam[:, None]).log_prob(v)
    # [i, j, t]: from state i to state j, and what is seen there.
    log_steps = torch.stack([theta1, theta2]).log()[..., None] + log_emission[:, 1:]
    log_paths = log_emission[:, :1] + _log_product(log_steps)
    pyro.factor("uv", log_paths.logsumexp((0, 1)))


def _log_product(log_matrices: Tensor) -> Tensor:
    """Return the log of the product of the matrices' exponentials, `(k, k, size) -> (k, k)`, in log2(size) rounds."""
    while (size := log_matrices.shape[-1]) > 1:
        left, right = log_matrices[..., : size - 1 : 2], log_matrices[..., 1::2]
        products = (left[:, :, None] + right).logsumexp(1)
        log_matrices = torch.cat([products, log_matrices[..., 2 * products.shape[-1] :]], -1)
    return log_matrices[..., 0]
