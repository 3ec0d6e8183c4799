"""The posteriors of posteriordb as NumPyro models, which take the same arguments as ours.

python benchmarks/posteriordb_numpyro.py --check [--folder FOLDER] [--names garch-garch11 ...]

The check compares log densities on the real line, Jacobians included, and their gradients with those of our Pyro
models, in float64, at reference draws that are moved by half a standard deviation at random. `constant` is NumPyro's
log density less ours, on average, in nats: 0 but for Lotka and Volterra's equations, whose truncated priors are
renormalised here. `density` and `gradient` are the largest relative errors, the constant apart; the check fails if one
is not below 1e-8.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import torch
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from numpyro.infer import init_to_uniform
from numpyro.infer.util import initialize_model, potential_energy

from pyro_nf.models.benchmarks import posteriordb
from pyro_nf.models.benchmarks.posteriordb.real_line import log_density, on_real_line

numpyro.enable_x64()

NUM_STEPS = 10  # of Runge and Kutta from one observation to the next, as in our model
TOLERANCE = 1e-8


def flat(x, y):
    _regression(x, y, _flat_coefficients(x), dist.ImproperUniform(constraints.positive, (), ()))


def half_cauchy_scale(x, y):
    _regression(x, y, _flat_coefficients(x), dist.HalfCauchy(2.5))


def normal_coefficients(x, y):
    _regression(x, y, dist.Normal(jnp.zeros(x.shape[1]), 10.0).to_event(1), dist.HalfNormal(10.0))


def centered_regressors(x, y):
    b = numpyro.sample("b", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def _flat_coefficients(x):
    return dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],))


def _regression(x, y, beta_prior, sigma_prior):
    beta = numpyro.sample("beta", beta_prior)
    sigma = numpyro.sample("sigma", sigma_prior)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def centered(sigma, y):
    mu, tau = _population()
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(sigma, y):
    mu, tau = _population()
    with numpyro.plate("school", len(y)):
        theta = mu + tau * numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _population():
    return numpyro.sample("mu", dist.Normal(0.0, 5.0)), numpyro.sample("tau", dist.HalfCauchy(5.0))


def two_normals(y):
    mu = _restricted("mu", dist.Normal(jnp.zeros(2), 2.0).to_event(1), constraints.ordered_vector)
    sigma = numpyro.sample("sigma", dist.HalfNormal(jnp.full(2, 2.0)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    component = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(component, dist.Normal(mu, sigma)), obs=y)


def _restricted(name, prior, support):
    """Sample from the part of a prior that is inside the support, without renormalising it."""
    value = numpyro.sample(name, dist.ImproperUniform(support, (), prior.event_shape))
    numpyro.factor(f"{name}_prior", prior.log_prob(value))
    return value


def autoregression(y, order):
    lags = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(order), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("time", len(lags)):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def garch(y, first_scale):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = numpyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = numpyro.sample("beta1_share", dist.Uniform(0.0, 1.0))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * share)
    numpyro.factor("beta1_flat", jnp.log1p(-alpha1))  # d beta1 / d share

    def step(variance, shock):
        variance = alpha0 + alpha1 * shock + beta1 * variance
        return variance, variance

    first = first_scale**2
    _, later = jax.lax.scan(step, first, (y[:-1] - mu) ** 2)
    with numpyro.plate("time", len(y)):
        numpyro.sample("y", dist.Normal(mu, jnp.sqrt(jnp.append(first, later))), obs=y)


def hidden_markov(u, v, alpha):
    theta1 = numpyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(alpha[1]))
    rates = dist.Normal(jnp.array([0.0, 3.0]), 1.0).to_event(1)
    phi = _restricted("phi", rates, constraints.positive_ordered_vector)
    lam = _restricted("lambda", rates, constraints.positive_ordered_vector)
    log_emission = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(lam).log_prob(v[:, None])
    log_transition = jnp.log(jnp.stack([theta1, theta2]))

    def step(log_forward, log_seen):
        return jax.nn.logsumexp(log_forward[:, None] + log_transition, axis=0) + log_seen, None

    log_forward, _ = jax.lax.scan(step, log_emission[0], log_emission[1:])
    numpyro.factor("uv", jax.nn.logsumexp(log_forward))


def gaussian_process(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    covariance = kernel + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance_matrix=covariance), obs=y)


def lotka_volterra(times, y_init, y):
    loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.TruncatedNormal(loc, scale, low=0.0).to_event(1))
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(jnp.full(2, 10.0)), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.full(2, -1.0), 1.0).to_event(1))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma).to_event(1), obs=y_init)
    signs = jnp.array([1.0, -1.0])
    rates, crossed = theta[0::2] * signs, -theta[1::2] * signs

    def slope(x):  # of (log u, log v)
        return rates + crossed * jnp.exp(x)[::-1]

    def runge_kutta(x, step):
        k1 = slope(x)
        k2 = slope(x + step / 2 * k1)
        k3 = slope(x + step / 2 * k2)
        k4 = slope(x + step * k3)
        return x + step / 6 * (k1 + 2 * (k2 + k3) + k4), None

    def to_next(x, interval):
        x, _ = jax.lax.scan(runge_kutta, x, jnp.full(NUM_STEPS, interval / NUM_STEPS))
        return x, x

    _, log_populations = jax.lax.scan(to_next, jnp.log(z_init), jnp.diff(times, prepend=0.0))
    with numpyro.plate("time", len(times)):
        numpyro.sample("y", dist.LogNormal(log_populations, sigma).to_event(1), obs=y)


MODELS = {
    model.__name__: model
    for model in (
        flat,
        half_cauchy_scale,
        normal_coefficients,
        centered_regressors,
        centered,
        noncentered,
        two_normals,
        autoregression,
        garch,
        hidden_markov,
        gaussian_process,
        lotka_volterra,
    )
}


def numpyro_model(posterior):
    """Return the NumPyro model that bears the name of the posterior's Pyro model, and its arguments."""
    args = (value.numpy() if isinstance(value, torch.Tensor) else value for value in posterior.args)
    return MODELS[posterior.model.__name__], tuple(args)


def flat_log_density(posterior):
    """Return the log density over a vector of all coordinates, where to start, and the vector's map to sites.

    The start is at the means of the priors, and at 0 on the real line for a site whose prior has none.
    """
    model, args = numpyro_model(posterior)
    start = initialize_model(jax.random.key(0), model, init_strategy=partial(_prior_mean), model_args=args).param_info.z
    start, to_sites = ravel_pytree(start)
    return lambda point: -potential_energy(model, args, {}, to_sites(point)), start, jax.vmap(to_sites)


def _prior_mean(site):
    centre = init_to_uniform(site, radius=0.0)
    if centre is None:  # no latent
        return None
    try:
        mean = site["fn"].mean
    except NotImplementedError:  # a flat prior, or a folded one
        return centre
    return jnp.where(jnp.isfinite(mean), mean, centre)


def compare(name, folder, num_points=100):
    """Return a posterior's line of the check."""
    posterior = posteriordb.load(name, folder)
    torch.manual_seed(0)
    draws = on_real_line(posterior)
    rows = torch.randint(len(next(iter(draws.values()))), (num_points,))
    draws = {site: _moved(values[rows], values.std(0)) for site, values in draws.items()}
    model, args = numpyro_model(posterior)
    theirs = jax.vmap(jax.value_and_grad(lambda sites: -potential_energy(model, args, {}, sites)))
    density, gradient = theirs({site: jnp.array(values.numpy()) for site, values in draws.items()})
    points = torch.cat([values.reshape(num_points, -1) for values in draws.values()], 1)
    ours, our_gradient = torch.func.vmap(torch.func.grad_and_value(log_density(posterior)))(points)[::-1]
    gradient = np.concatenate([np.reshape(gradient[site], (num_points, -1)) for site in draws], 1)
    constant = float(np.mean(density - ours.numpy()))
    return {
        "posterior": name,
        "model": posterior.model.__name__,
        "constant": constant,
        "density": _relative_error(density - constant, ours.numpy()),
        "gradient": _relative_error(gradient, our_gradient.numpy()),
    }


def _moved(values, sd):
    return values + 0.5 * sd * torch.randn_like(values)


def _relative_error(found, expected):
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True, help="compare densities with our models'")
    parser.add_argument("--folder", help="posteriordb's files; else PYRO_NF_POSTERIORDB")
    parser.add_argument("--names", nargs="+", default=posteriordb.names())
    options = parser.parse_args()
    table = pd.DataFrame([compare(name, options.folder) for name in options.names])
    print(table.to_string(index=False, float_format="%.2g"))
    wrong = table[~(table[["density", "gradient"]].max(axis=1) < TOLERANCE)]
    if len(wrong):
        raise SystemExit(f"not the same density: {', '.join(wrong['posterior'])}")


if __name__ == "__main__":
    main()
