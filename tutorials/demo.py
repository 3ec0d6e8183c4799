"""The main job on real data: swap the guide, fit it, check it.

1. Eight schools, centred (a funnel): Pyro's AutoNormal against AutoFlow, one table.
2. A deep latent Gaussian model of handwritten digits: a mean-field encoder against an amortised flow, one budget.
3. `demo/posterior.nc` (ArviZ) and `demo/posterior.png` (what the two guides make of the funnel).

Run by `make demo`; under three minutes on two cores.
"""

import functools
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_nf.diagnostics import diagnose, local_evidence, to_arviz
from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import DLGM, eight_schools, load_digits
from pyro_nf.networks import MLP

OUT = Path("demo")


def fit_schools():
    """Fit both guides to the centred model and print one row for each."""
    model, data = eight_schools.centered, eight_schools.data()
    exact = eight_schools.grid_posterior(*data)
    guides = {"AutoNormal": AutoNormal(model), "AutoFlow": AutoFlow(model)}
    draws, rows, verdicts = {}, [], []
    for name, guide in guides.items():
        result = FlowSVI(model, guide, seed=0).run(*data)
        found = diagnose(model, guide, *data)
        idata = to_arviz(model, guide, *data, num_samples=10_000)
        draws[name] = posterior = idata["posterior"]
        rows.append(
            {
                "guide": name,
                "ELBO": f"{found.elbo:.3f} +- {found.elbo_mcse:.3f}",
                "log evidence": f"{found.log_evidence:.3f} +- {found.log_evidence_se:.3f}",
                "k-hat": f"{found.khat:.2f}",
                "ESS": f"{100 * found.ess_fraction:.1f}%",
                "mu": f"{float(posterior['mu'].mean()):.2f} +- {float(posterior['mu'].std()):.2f}",
                "tau": f"{float(posterior['tau'].mean()):.2f} +- {float(posterior['tau'].std()):.2f}",
                "seconds": f"{result.seconds:.0f}",
                "verdict": str(found.verdict),
            }
        )
        verdicts += [f"  {name}: {reason}" for reason in found.reasons]
    mu, tau = exact_moments(exact)
    rows.append({"guide": "exact", "log evidence": f"{exact.log_evidence:.3f}", "mu": mu, "tau": tau})
    print("Eight schools, centred (mean +- sd; nats)")
    print(pd.DataFrame(rows).fillna("").to_string(index=False))
    print("\n".join(verdicts))
    idata.to_netcdf(str(OUT / "posterior.nc"))
    return draws, exact


def exact_moments(exact):
    """Mean and standard deviation of mu and tau under the grid's density, as text."""
    weight = exact.density / exact.density.sum()
    moments = []
    for values in (exact.mu[:, None], exact.log_tau.exp()[None, :]):
        mean = float((weight * values).sum())
        moments.append(f"{mean:.2f} +- {float((weight * (values - mean) ** 2).sum()) ** 0.5:.2f}")
    return moments


def draw_funnel(draws, exact):
    """Draw the joint of mu and log tau: both guides on the exact density."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharex=True, sharey=True, layout="constrained")
    mu, log_tau, density = exact.mu.numpy(), exact.log_tau.numpy(), exact.density.numpy()
    heights = np.sort(density.ravel())[::-1]
    held = np.cumsum(heights) / heights.sum()
    levels = sorted(heights[np.searchsorted(held, share)] for share in (0.5, 0.8, 0.95, 0.99))
    for axis, title in zip(axes, ("AutoNormal", "AutoFlow", "exact"), strict=True):
        if title == "exact":
            axis.contourf(mu, log_tau, density.T, levels=[*levels, density.max()], cmap="Blues")
        else:
            posterior = draws[title]
            points = posterior["mu"].values[0, :4000], np.log(posterior["tau"].values[0, :4000])
            axis.scatter(*points, s=3, alpha=0.4, color="C1", linewidths=0)
        axis.contour(mu, log_tau, density.T, levels=levels, colors="k", linewidths=0.6)
        axis.set(title=title, xlabel=r"$\mu$", xlim=(-10, 20), ylim=(-4.5, 4))
    axes[0].set_ylabel(r"$\log \tau$")
    figure.suptitle("Eight schools, centred: guides against the exact density (50, 80, 95 and 99% regions)")
    figure.savefig(OUT / "posterior.png", dpi=120)


def mean_field_guide(encoder):
    """Return Pyro's usual guide for a variational autoencoder: normal, coordinate by coordinate."""

    def guide(x, batch_size=None):
        network = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            loc, raw_scale = network(x[rows]).chunk(2, -1)
            pyro.sample("xi_1", dist.Normal(loc, nn.functional.softplus(raw_scale)).to_event(1))

    return guide


def fit_digits():
    """Fit both encoders to the digits under one budget and print test figures per image."""
    train, test = load_digits()
    rows = []
    for name in ("mean-field", "amortised flow"):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        model = DLGM(data_dim=64, latent_dims=(8,), hidden_dims=(50,))
        if name == "mean-field":
            guide = mean_field_guide(MLP(64, (100,), 16))
        else:
            encoder = nn.Sequential(MLP(64, (100,), 50), nn.Tanh())
            guide = AmortizedFlow(model, encoder, functools.partial(stacks.make, "realnvp", depth=4))
        svi = FlowSVI(model, guide, num_particles=4, learning_rate=3e-3, max_steps=2500, seed=0)
        result = svi.run(train, batch_size=100)
        found = local_evidence(model, guide, test, num_samples=500)
        elbo, log_p = float(found.elbo.mean()), float(found.log_evidence.mean())
        rows.append([name, f"{elbo:.2f}", f"{log_p:.2f}", f"{log_p - elbo:.2f}", f"{result.seconds:.0f}"])
    print(f"\nDeep latent Gaussian model of {len(train)} digits, {len(test)} held out (nats per image)")
    columns = ["encoder", "test ELBO", "test log p(x)", "gap", "seconds"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


def main():
    start = time.perf_counter()
    pyro.set_rng_seed(0)
    OUT.mkdir(exist_ok=True)
    draw_funnel(*fit_schools())
    fit_digits()
    print(f"\nwrote {OUT / 'posterior.nc'} and {OUT / 'posterior.png'} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
