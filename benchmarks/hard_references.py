"""References of the hard posteriors that have no exact figures, by long runs of NUTS in NumPyro.

python benchmarks/hard_references.py [--names fertility motorcycle] [--chains 8] [--warmup 2000] [--draws 10000]
    [--accept 0.95] [--seed 0] [--file benchmarks/references/hard.json]

Needs NumPyro. Each model is written again for it; in that of fertility the lines of the countries are integrated out,
and drawn from what they are given the rest, a normal. The densities are compared with the Pyro models', at draws of the
posterior and of the prior. The file gets mean and sd of each entry of each latent with their Monte Carlo standard
errors, the log evidence by bridge sampling, and what speaks for the run: R-hat, effective draws, divergences, and the
largest of the z-scores of Stein's identities, in which the gradients are the Pyro models'.
"""

import argparse
import json
import math
import time
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jax import random
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density, potential_energy, unconstrain_fn
from pyro import poutine
from scipy.special import logsumexp

from pyro_nf.models.benchmarks import hard_posteriors, posteriordb

FILE = Path(__file__).parent / "references" / "hard.json"
# Digits that are written: Monte Carlo errors begin in the third.
DIGITS = 6
# Draws of the posterior, and as many of the prior, at which densities are compared.
NUM_COMPARED = 20


def fertility(country, decade, log_rate, num_countries):
    """All but the lines, which are integrated out."""
    mean = numpyro.sample("mean", dist.Normal(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.5])).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(jnp.array([1.0, 0.5])).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    values = {"mean": mean, "scale": scale, "correlation": correlation, "sigma": sigma}
    given = lines(values, country, decade, log_rate, num_countries)
    residuals = log_rate - mean[0] - mean[1] * decade
    log_prob = dist.Normal(0.0, sigma).log_prob(residuals).sum()
    # log p(y) = log p(y | line) + log p(line) - log p(line | y), at line = mean.
    prior = dist.MultivariateNormal(mean, scale_tril=scale[:, None] * correlation)
    numpyro.factor("log_rate", log_prob + num_countries * prior.log_prob(mean) - given.log_prob(mean).sum())


def lines(values, country, decade, log_rate, num_countries):
    """Return the lines' distribution given the rest, a batch of `num_countries`."""
    mean, sigma = values["mean"], values["sigma"]
    root = values["scale"][:, None] * values["correlation"]
    regressors = jnp.stack([jnp.ones_like(decade), decade], -1)
    residuals = log_rate - regressors @ mean

    def total(terms):
        return jax.ops.segment_sum(terms, country, num_countries) / sigma**2

    precision = inverse(root @ root.T) + total(regressors[:, :, None] * regressors[:, None, :])
    covariance = inverse(precision)
    shift = (covariance @ total(regressors * residuals[:, None])[..., None])[..., 0]
    # The Cholesky factor of two rows, in full: LAPACK is slow on many small matrices.
    first = jnp.sqrt(covariance[:, 0, 0])
    below = covariance[:, 1, 0] / first
    second = jnp.sqrt(covariance[:, 1, 1] - below**2)
    rows = [jnp.stack([first, jnp.zeros_like(first)], -1), jnp.stack([below, second], -1)]
    return dist.MultivariateNormal(mean + shift, scale_tril=jnp.stack(rows, -2))


def inverse(matrix):
    """Return the inverse of matrices `(*batch, 2, 2)`."""
    (a, b), (c, d) = (jnp.moveaxis(matrix, (-2, -1), (0, 1))[i] for i in range(2))
    adjugate = jnp.stack([jnp.stack([d, -b], -1), jnp.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def motorcycle(time, acceleration):
    middle, half_width = (time.min() + time.max()) / 2, 0.75 * (time.max() - time.min())

    def process(name, num_functions):
        offset = numpyro.sample(f"{name}_offset", dist.Normal(0.0, 1.0))
        length_scale = numpyro.sample(f"{name}_length_scale", dist.HalfNormal(1.0))
        amplitude = numpyro.sample(f"{name}_amplitude", dist.HalfNormal(0.5))
        weights = numpyro.sample(f"{name}_weights", dist.Normal(jnp.zeros(num_functions), 1.0).to_event(1))
        frequency = jnp.arange(1, num_functions + 1) * math.pi / (2 * half_width)
        basis = jnp.sin((time[:, None] - middle + half_width) * frequency) / jnp.sqrt(half_width)
        roots = jnp.sqrt(jnp.sqrt(2 * math.pi) * length_scale) * jnp.exp(-((length_scale * frequency) ** 2) / 4)
        return offset + basis @ (amplitude * roots * weights)

    mean, log_scale = process("mean", 40), process("noise", 20)
    numpyro.sample("acceleration", dist.Normal(mean, jnp.exp(log_scale)), obs=acceleration)


MODELS = {"fertility": fertility, "motorcycle": motorcycle}
# Latents that are integrated out of the model, and their distribution given the others.
COMPLETIONS = {"fertility": ("line", lines)}


def complete(name, args, draws, key):
    """Add draws of what the model has integrated out to draws `{site: (size, *shape)}`."""
    if name not in COMPLETIONS:
        return draws
    site, given = COMPLETIONS[name]
    keys = random.split(key, len(draws["sigma"]))
    return {**draws, site: jax.jit(jax.vmap(lambda key, values: given(values, *args).sample(key)))(keys, draws)}


def density_difference(posterior, args, draws):
    """Return the largest difference, relative, of the two log densities at draws `{site: (size, *shape)}`."""
    differences = []
    for i in range(NUM_COMPARED):
        values = {site: value[i] for site, value in draws.items()}
        tensors = {site: torch.tensor(np.asarray(value)) for site, value in values.items()}
        trace = poutine.trace(poutine.condition(posterior.model, tensors)).get_trace(*posterior.args)
        ours, theirs = float(trace.log_prob_sum()), 0.0
        if posterior.name in COMPLETIONS:
            site, given = COMPLETIONS[posterior.name]
            value = values.pop(site)
            theirs = float(given(values, *args).log_prob(value).sum())
        theirs += float(log_density(MODELS[posterior.name], args, {}, values)[0])
        differences.append(abs(ours - theirs) / max(1.0, abs(ours)))
    return max(differences)


def bridge(log_joint, fitted, target):
    """Return the log evidence by the optimal bridge from a normal to draws of the posterior.

    Args:
        log_joint: `(size, dim) -> (size,)`.
        fitted: Draws of the posterior, to which the normal is fitted, `(size, dim)`.
        target: Other draws, `(size, dim)`.

    References:
        Meng, Wong (1996), "Simulating ratios of normalizing constants via a simple identity", section 3; Gronau et al.
        (2017), "A tutorial on bridge sampling", arXiv:1703.05984.
    """
    normal = dist.MultivariateNormal(fitted.mean(0), np.cov(fitted.T))
    draws = normal.sample(random.PRNGKey(0), target.shape[:1])
    ratios, ratios_normal = (np.asarray(log_joint(points) - normal.log_prob(points)) for points in (target, draws))
    estimate, before = np.median(ratios), np.inf
    while abs(estimate - before) > 1e-10:  # there are as many draws of both: their shares in the bridge are equal
        before = estimate
        above = logsumexp(ratios_normal - np.logaddexp(ratios_normal, estimate))
        estimate = above - logsumexp(-np.logaddexp(ratios, estimate))
    return estimate


def evidence(model, args, draws):
    """Return log evidence and standard error: each chain is the target once, the normal is fitted to the others.

    Args:
        model: Of NumPyro.
        args: Its arguments.
        draws: `{site: (num_chains, num_draws, *shape)}`.
    """
    points = jax.jit(jax.vmap(jax.vmap(lambda values: unconstrain_fn(model, args, {}, values))))(draws)
    shapes = {site: value.shape[2:] for site, value in points.items()}
    cuts = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]

    def log_joint(point):
        parts = jnp.split(point, cuts)
        values = {site: part.reshape(shape) for (site, shape), part in zip(shapes.items(), parts, strict=True)}
        return -potential_energy(model, args, {}, values)

    log_joint = jax.jit(jax.vmap(log_joint))
    flat = np.concatenate([np.asarray(value).reshape(*value.shape[:2], -1) for value in points.values()], -1)
    estimates = [
        bridge(log_joint, np.delete(flat, k, 0).reshape(-1, flat.shape[-1]), flat[k]) for k in range(len(flat))
    ]
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(len(flat)))


def reference(name, options):
    """Run NUTS on one posterior and return its record."""
    posterior, model = hard_posteriors.load(name), MODELS[name]
    args = tuple(jnp.asarray(arg.numpy()) if isinstance(arg, torch.Tensor) else arg for arg in posterior.args)
    keys = random.split(random.PRNGKey(options.seed), 4)
    mcmc = MCMC(
        NUTS(model, dense_mass=True, target_accept_prob=options.accept),
        num_warmup=options.warmup,
        num_samples=options.draws,
        num_chains=options.chains,
        chain_method="sequential",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(keys[0], *args, extra_fields=("diverging", "num_steps"))
    seconds = time.perf_counter() - start
    extra = mcmc.get_extra_fields()
    print(f"{name}: {seconds:.0f} s, {float(extra['num_steps'].mean()):.0f} steps a draw", flush=True)

    flat = complete(name, args, mcmc.get_samples(), keys[1])
    prior = Predictive(model, num_samples=NUM_COMPARED)(keys[2], *args)
    prior = complete(name, args, {site: prior[site] for site in mcmc.get_samples()}, keys[3])
    thinned = {site: value[:: len(value) // NUM_COMPARED] for site, value in flat.items()}
    difference = max(density_difference(posterior, args, points) for points in (prior, thinned))

    lead = (options.chains, options.draws)
    draws = {site: np.asarray(value).reshape(*lead, *value.shape[1:]) for site, value in flat.items()}
    means = {site: value.mean((0, 1)) for site, value in draws.items()}
    sds = {site: value.std((0, 1)) for site, value in draws.items()}
    data = az.from_dict(posterior=draws)
    with np.errstate(invalid="ignore"):  # not a number where an entry is constant, as in a Cholesky factor
        rhat, ess = az.rhat(data), az.ess(data)
        errors = {moment: az.mcse(data, method=moment) for moment in ("mean", "sd")}
    scores = posteriordb.stein_scores(
        posteriordb.Posterior(
            name, posterior.model, posterior.args, {site: torch.tensor(value) for site, value in draws.items()}
        )
    )
    log_evidence, log_evidence_se = evidence(model, args, mcmc.get_samples(group_by_chain=True))
    record = {
        "chains": options.chains,
        "draws": options.draws,
        "seconds": round(seconds),
        "divergences": int(extra["diverging"].sum()),
        "largest rhat": round(max(float(np.nanmax(rhat[site])) for site in draws), 5),
        "least ess": round(min(float(np.nanmin(ess[site].where(sds[site] > 0))) for site in draws)),
        "largest Stein score": round(max(float(score.abs().max()) for score in scores.values()), 2),
        "number of Stein scores": sum(score.numel() for score in scores.values()),
        "density difference": difference,
        "log_evidence": round(log_evidence, 5),
        "log_evidence_se": round(log_evidence_se, 5),
    }
    print(json.dumps(record, indent=2), flush=True)
    figures = {"mean": means, "sd": sds, **{f"mcse_{moment}": error for moment, error in errors.items()}}
    record["sites"] = {site: {key: rounded(values[site]) for key, values in figures.items()} for site in draws}
    return record


def rounded(values):
    """Return an array as a flat list of numbers with a few digits."""
    return [float(f"{value:.{DIGITS}g}") for value in np.nan_to_num(np.asarray(values, float)).flatten()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--accept", type=float, default=0.95, help="NUTS's target; higher for fewer divergences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    numpyro.enable_x64()
    torch.set_num_threads(1)
    records = json.loads(options.file.read_text()) if options.file.exists() else {}
    for name in options.names:
        records[name] = reference(name, options)
        options.file.parent.mkdir(exist_ok=True)
        options.file.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
