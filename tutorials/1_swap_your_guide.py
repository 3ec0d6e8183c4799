# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Swap your guide
#
# You know Pyro: you write a model, choose a guide, run SVI, look at the loss. The loss goes down, it flattens,
# and you have a posterior. This page is about the question after that: *is it the right one?*
#
# The model is *eight schools* (Rubin 1981): estimated effects of a coaching programme in eight schools, each
# with its standard error. It has ten latents and it is the standard trap of hierarchical models. Its posterior
# is known exactly, so that we can look over the shoulder of every guide.

# %%
import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import compare, corrected_posterior, diagnose, plot_elbo, plot_pairs, to_arviz
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

pyro.set_rng_seed(0)
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # standard errors
effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # estimated effects


def model(sigma, effect):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, sigma), obs=effect)


# %% [markdown]
# ## The guide that you would take
#
# `AutoNormal` is Pyro's mean-field guide: an independent normal for each latent, on the real line. `FlowSVI`
# fits any Pyro guide; it stops by itself, so that nobody can say that the fit was too short.

# %%
mean_field = AutoNormal(model)
mean_field_result = FlowSVI(model, mean_field, seed=0, progress=False).run(sigma, effect)
print(mean_field_result)

# %% [markdown]
# It has converged. As far as SVI can tell, all is well: this is the best normal guide without correlations.
# What it says about `tau`, the standard deviation between schools, can be compared with the truth. Given `mu`
# and `tau` the effects integrate out, so the exact posterior of the two is a sum over a grid.

# %%
exact = eight_schools.grid_posterior(sigma, effect)
mean_field_data = to_arviz(model, mean_field, sigma, effect)


def exact_moments(values):
    weights = exact.density / exact.density.sum()
    mean = float((weights * values).sum())
    return f"{mean:.2f} ± {float((weights * (values - mean) ** 2).sum()) ** 0.5:.2f}"


def moments(draws):
    return {name: f"{float(draws[name].mean()):.2f} ± {float(draws[name].std()):.2f}" for name in ("mu", "tau")}


rows = {
    "mean-field": moments(mean_field_data["posterior"]),
    "exact": {"mu": exact_moments(exact.mu[:, None]), "tau": exact_moments(exact.log_tau.exp()[None, :])},
}
pd.DataFrame(rows).T

# %% [markdown]
# Mean and standard deviation. The guide says that schools differ, by 6 ± 1.5 points; the exact posterior says
# 3.6 ± 3.2, and that "schools do not differ at all" is quite possible. This is not a matter of more steps. In
# this model small `tau` squeezes every school's effect onto `mu`: a *funnel*. A normal without correlations can
# hold one part of a funnel, and the ELBO, which punishes draws where there is no posterior, prefers the wide
# part without the neck.
#
# ## How you would have known
#
# You do not have the exact posterior of your own model. What you do have is the guide's density and the model's
# joint density at each draw, so the importance weights `p(x, z) / q(z)`. `diagnose` looks at these, at the
# gradients of the log density, and for other modes.

# %%
print(diagnose(model, mean_field, sigma, effect))

# %% [markdown]
# *k-hat* is the shape of the tail of these weights. Above 0.7 the weights have so heavy a tail that averages
# over the draws do not settle down: somewhere the posterior is where the guide is not. The verdict also names
# what suffers most, and this without any exact answer: `tau` is too narrow.
#
# ## Swap it
#
# `AutoFlow` is a drop-in replacement: a guide over the same latents, with a normalizing flow between a simple
# base and the posterior. Nothing else changes.

# %%
flow = AutoFlow(model)
flow_result = FlowSVI(model, flow, seed=0, progress=False).run(sigma, effect)
print(flow_result)
print(diagnose(model, flow, sigma, effect))

# %% [markdown]
# Look at the ELBO first: the flow's is two nats higher. The gap between ELBO and log evidence is the divergence
# KL(q || p) from the guide to the posterior; it is near zero now. The effective sample size says the same in
# other words: nearly every draw counts in full.

# %%
table = compare({"mean-field": mean_field_result, "flow": flow_result})
table.drop(columns=["reasons", "seconds"]).round(3)

# %%
_ = plot_elbo(flow_result)
# %% [markdown]
# ## Look at the funnel

# %%
flow_data = to_arviz(model, flow, sigma, effect, result=flow_result)
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
heights = np.sort(exact.density.numpy().ravel())[::-1]
held = np.cumsum(heights) / heights.sum()
levels = sorted(heights[np.searchsorted(held, share)] for share in (0.5, 0.8, 0.95, 0.99))
for axis, (title, data) in zip(axes, {"mean-field": mean_field_data, "flow": flow_data}.items(), strict=True):
    each = data["posterior"]
    axis.scatter(each["mu"], np.log(each["tau"]), s=3, alpha=0.4, color="C1", linewidths=0)
    axis.contour(exact.mu, exact.log_tau, exact.density.T, levels=levels, colors="k", linewidths=0.7)
    axis.set(title=title, xlabel=r"$\mu$", xlim=(-10, 20), ylim=(-4.5, 4))
_ = axes[0].set_ylabel(r"$\log\,\tau$")
# %% [markdown]
# Dots are draws of the guide, lines hold 50, 80, 95 and 99% of the exact posterior. The mean-field guide sits
# in the mouth of the funnel. The flow fills it down to the neck.
#
# ## Correct what is left
#
# When the weights are good, use them: `corrected_posterior` resamples the guide's draws in proportion to them,
# and gives draws of the posterior itself. It refuses where weights cannot help, and says why.

# %%
corrected = corrected_posterior(model, flow, sigma, effect)
print(corrected)
rows["flow"] = moments(flow_data["posterior"])
rows["flow, corrected"] = moments(corrected.draws)
pd.DataFrame(rows).T.loc[["mean-field", "flow", "flow, corrected", "exact"]]

# %%
try:
    corrected_posterior(model, mean_field, sigma, effect)
except ValueError as error:
    print(error)

# %% [markdown]
# ## To ArviZ
#
# `to_arviz` gives ArviZ's own structure: the posterior, its predictions, the pointwise log-likelihood, and the
# weights with their diagnosis. Draws are independent, so that there is no R-hat to look at; k-hat takes its
# place.

# %%
az.summary(flow_data, kind="stats", var_names=["mu", "tau", "theta"])

# %% [markdown]
# The eight effects are close to each other and wide: with so little data most of what looks like a difference
# between schools is noise. That is the textbook's answer, and the one that the mean-field guide missed.

# %%
_ = plot_pairs({"mean-field": to_arviz(model, mean_field, sigma, effect), "flow": flow_data}, ["mu", "tau", "theta[0]"])

# %% [markdown]
# ## What to take away
#
# - A converged ELBO says nothing about how far the guide is from the posterior. `diagnose` does.
# - The swap is one line, `AutoNormal(model)` to `AutoFlow(model)`. Everything else of your code stays.
# - The verdict says which draws to use: the guide's own if it is "right", those of `corrected_posterior` if it is
#   "right after correction". If it is "not right", [Why is my k-hat high?](../docs/khat.md) says what to try.
# - Then take the draws to `Predictive` or to ArviZ.
