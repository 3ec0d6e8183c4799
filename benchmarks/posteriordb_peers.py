"""How NumPyro and PyMC fit the posteriors of `posteriordb.py`: each at its documented defaults, for the same time.

NumPyro fits the models of `posteriordb_numpyro.py`, in float64, by `SVI` with `Trace_ELBO` (one draw a step) and its
guides as they come: uniform starts in (-2, 2); `init_scale=0.1` for AutoMultivariateNormal; one flow with
`hidden_factors=[8, 8]` for AutoBNAFNormal. NumPyro's `Adam` has no default rate, so each guide has one that NumPyro's
documentation uses: 0.0005, in the docstring of `SVI`, for AutoMultivariateNormal; 0.003, in `neutra.py`, the example of
AutoBNAFNormal, for that. Steps run in a compiled scan, as in `SVI.run(progress_bar=False)`, but a hundred at a time, to
look at the clock. The last step's parameters count.

PyMC fits by `pm.fit(method="advi")` and `"fullrank_advi"` with its default optimiser (`adagrad_window` at 0.001, one
draw a step), and stops when the time is over instead of after 10,000 steps. Its model is one flat vector of all
coordinates with NumPyro's log density as a potential (`pytensor.wrap_jax`), so that both fit one density; it starts
where PyMC would: at the priors' means, at 0 for flat ones. The wrapping costs time: a regression with three coordinates
takes 0.15 ms a step, and 0.07 ms where it is written in PyMC. PyTensor keeps the C code that it has compiled, so only
the first fits wait for the compiler.

The clock starts after the imports (for PyMC, when the start is known), and includes tracing and compiling: what JAX has
compiled before is forgotten. Each process has one thread.
"""

import importlib.util
import logging
import os
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from pyro_nf.diagnostics.weights import summarize
from pyro_nf.models.benchmarks.posteriordb.real_line import latents, log_density

LEARNING_RATES = {"AutoMultivariateNormal": 0.0005, "AutoBNAFNormal": 0.003}
CHUNK = 100  # steps of a scan
NUM_SETS, NUM_SAMPLES = 5, 10_000  # as `diagnose` draws


class Draws(NamedTuple):
    """What a fit gives.

    Attributes:
        sites: Draws on the real line, `{site: (num_draws, *shape)}`.
        log_q: Their log density, `(num_draws,)`.
        steps: Steps of the fit.
        seconds: Seconds until the last step was done.
    """

    sites: dict[str, np.ndarray]
    log_q: np.ndarray
    steps: int
    seconds: float


def numpyro_svi(name, posterior, seconds, seed):
    """Fit one of NumPyro's automatic guides."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide
    from posteriordb_numpyro import numpyro_model

    start, steps = time.perf_counter(), 0
    model, args = numpyro_model(posterior)
    guide = getattr(autoguide, name)(model)
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATES[name]), Trace_ELBO())
    key, draw_key = jax.random.split(jax.random.key(seed))
    state = svi.init(key, *args)

    @jax.jit
    def advance(state):
        return jax.lax.scan(lambda state, _: (svi.update(state, *args)[0], None), state, None, length=CHUNK)[0]

    while time.perf_counter() - start < seconds:
        state, steps = jax.block_until_ready(advance(state)), steps + CHUNK
    taken = time.perf_counter() - start
    params = svi.get_params(state)
    base, transform = guide.get_base_dist(), guide.get_transform(params)
    noise = base.sample(draw_key, (NUM_SETS * NUM_SAMPLES,))
    points, intermediates = transform.call_with_intermediates(noise)
    log_q = base.log_prob(noise) - transform.log_abs_det_jacobian(noise, points, intermediates)
    sites = {name: np.asarray(values) for name, values in guide._unpack_latent(points).items()}
    return Draws(sites, np.asarray(log_q), steps, taken)


def pymc_advi(method, posterior, seconds, seed):
    """Fit by PyMC's ADVI, with a diagonal or a full covariance."""
    import pymc as pm
    from posteriordb_numpyro import flat_log_density
    from pytensor import wrap_jax

    logging.getLogger("pymc").setLevel(logging.ERROR)
    their_density, initial, to_sites = flat_log_density(posterior)
    start, steps = time.perf_counter(), 0

    def stop(approximation, losses, step):
        nonlocal steps
        steps = step
        if time.perf_counter() - start > seconds:
            raise StopIteration

    with pm.Model():
        point = pm.Flat("point", shape=initial.shape, initval=np.asarray(initial))
        pm.Potential("log_density", wrap_jax(their_density)(point))
        # No step takes less than 10 microseconds: the time ends the fit, not the number of steps.
        fitted = pm.fit(int(seconds * 1e5), method=method, random_seed=seed, callbacks=[stop], progressbar=False)
    taken = time.perf_counter() - start
    mean, scale_tril = fitted.mean.eval(), np.linalg.cholesky(fitted.cov.eval())
    noise = np.random.default_rng(seed).standard_normal((NUM_SETS * NUM_SAMPLES, len(mean)))
    log_q = -(noise**2 + np.log(2 * np.pi)).sum(1) / 2 - np.log(np.diag(scale_tril)).sum()
    sites = {name: np.asarray(values) for name, values in to_sites(mean + noise @ scale_tril.T).items()}
    return Draws(sites, log_q, steps, taken)


FITS = {
    "NumPyro AutoMultivariateNormal": (("numpyro",), partial(numpyro_svi, "AutoMultivariateNormal")),
    "NumPyro AutoBNAFNormal": (("numpyro",), partial(numpyro_svi, "AutoBNAFNormal")),
    "PyMC ADVI": (("pymc", "numpyro"), partial(pymc_advi, "advi")),
    "PyMC full-rank ADVI": (("pymc", "numpyro"), partial(pymc_advi, "fullrank_advi")),
}
"""Method -> the packages it needs, and the fit."""


def installed():
    """Return the methods whose packages are installed, and say which are not."""
    here = []
    for method, (packages, _) in FITS.items():
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing:
            print(f"{method} is left out: {' and '.join(missing)} must be installed")
        else:
            here.append(method)
    return here


def fit(posterior, method, seconds, seed):
    """Fit for so many seconds; return the draws."""
    # JAX takes these as they are when it first computes.
    os.environ |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1"}
    import jax

    jax.clear_caches()
    return FITS[method][1](posterior, seconds, seed)


def weigh(posterior, draws):
    """Return the figures of the draws' weights under our own density, in float64, as `diagnose` finds them."""
    # Side by side in the order of our latents.
    points = np.concatenate([draws.sites[name].reshape(len(draws.log_q), -1) for name in latents(posterior)], 1)
    our_density = torch.func.vmap(log_density(posterior))
    with torch.no_grad():
        log_p = torch.cat([our_density(part) for part in torch.from_numpy(points).split(NUM_SAMPLES // 10)])
    return summarize((log_p.numpy() - draws.log_q).reshape(NUM_SETS, NUM_SAMPLES))
