# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a flow does
#
# A normalizing flow is a chain of invertible maps. Draw from a simple base, push the draw through the chain,
# keep account of how much each map stretches space: you have a draw of a complicated distribution *and its
# density*, which is all that variational inference asks of a guide,
#
# $$ z = f_K(\cdots f_1(x)), \qquad
#    \log q(z) = \log q_0(x) - \sum_k \log \left| \det \frac{\partial f_k}{\partial x_k} \right|. $$
#
# In two dimensions one can watch it. The targets are the four energies of Rezende and Mohamed (2015): densities
# proportional to $e^{-U(z)}$ with rings, waves and several modes. Their normalising constants are known from a
# grid, so that every fit can be measured in nats.

# %%
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

from pyro_nf.diagnostics import diagnose, plot_flow
from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO

pyro.set_rng_seed(0)


def wave(z):
    return torch.sin(0.5 * torch.pi * z[..., 0])


def log_sum(*exponents):
    return torch.stack(exponents).logsumexp(0)


def ring(z):
    bumps = log_sum(-0.5 * ((z[..., 0] - 2) / 0.6) ** 2, -0.5 * ((z[..., 0] + 2) / 0.6) ** 2)
    return 0.5 * (((z**2).sum(-1).sqrt() - 2) / 0.4) ** 2 - bumps


def sine(z):
    return 0.5 * ((z[..., 1] - wave(z)) / 0.4) ** 2


def fork(z):
    gap = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6) ** 2)
    height = z[..., 1] - wave(z)
    return -log_sum(-0.5 * (height / 0.35) ** 2, -0.5 * ((height + gap) / 0.35) ** 2)


def split(z):
    gap = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    height = z[..., 1] - wave(z)
    return -log_sum(-0.5 * (height / 0.4) ** 2, -0.5 * ((height + gap) / 0.35) ** 2)


energies = {"ring": ring, "sine": sine, "fork": fork, "split": split}

# %% [markdown]
# Three of the four do not fall off to the left and right: they are densities in a box only, here from -4 to 4.
# To Pyro a box is a uniform prior; under `.mask(False)` its own density counts for nothing, and `pyro.factor`
# adds the energy. The guide works on the real line and comes back through the bijection of the site's support,
# as any Pyro guide does.


# %%
def model(energy):
    box = dist.Uniform(-4.0, 4.0).expand([2]).to_event(1).mask(False)
    z = pyro.sample("z", box)
    pyro.factor("energy", -energy(z))


grid = torch.linspace(-4, 4, 401)
points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
log_constants = {
    name: float((-energy(points)).flatten().logsumexp(0)) + 2 * torch.log(grid[1] - grid[0]).item()
    for name, energy in energies.items()
}

figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for axis, (name, energy) in zip(axes, energies.items(), strict=True):
    axis.imshow((-energy(points)).exp(), extent=(-4, 4, -4, 4), origin="lower", cmap="Blues")
    axis.set_title(f"{name}: log Z = {log_constants[name]:.3f}")

# %% [markdown]
# ## A first fit
#
# `AutoFlow` and `FlowSVI` as they come, on the ring. `KL` below is the divergence from guide to target, log Z
# less the ELBO, and `log Z error` is by how much the guide's importance weights miss the known constant.


# %%
def measure(name, guide):
    found = diagnose(model, guide, energies[name], num_starts=0)
    return {
        "KL (nats)": round(log_constants[name] - found.elbo, 3),
        "log Z error": round(found.log_evidence - log_constants[name], 3),
        "ESS": f"{100 * found.ess_fraction:.0f}%",
        "k-hat": round(found.khat, 2),
    }


def show(axis, name, guide, title):
    z = guide.sample_posterior(4000)["z"]
    axis.scatter(z[:, 0], z[:, 1], s=2, alpha=0.3, color="C1", linewidths=0)
    density = (-energies[name](points)).exp()
    axis.contour(grid, grid, density, levels=[0.1 * density.max()], colors="k", linewidths=0.7)
    axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")


default = AutoFlow(model)
FlowSVI(model, default, seed=0, progress=False).run(ring)
_, axis = plt.subplots(figsize=(3, 3), layout="constrained")
show(axis, "ring", default, "default")
pd.DataFrame({"default": measure("ring", default)}).T

# %%
print(diagnose(model, default, ring))

# %% [markdown]
# The default holds both halves. The draws between them are what is left of the normal: a flow stretches, and
# cannot tear. Were the halves further apart, a guide could end in one of them with perfect weights, for weights
# are of its own draws; that is why `diagnose` runs L-BFGS from other points too.
#
# ## One kind of layer, more and more of it
#
# Now to the flows, each by itself. Two things help a guide to find all of a target: to start wide
# (`init_scale`), and to raise the target slowly from flat to its full height (`annealing_steps`), as Rezende and
# Mohamed did. A planar layer, $f(x) = x + \hat u \tanh(w^\top x + b)$, stretches or squeezes space along one
# direction: one layer can do next to nothing, and the question is how many it takes. (It has no formula for its
# inverse, which the default gradient asks for; the objective here goes without.)


# %%
def fit(flow):
    pyro.set_rng_seed(0)  # the same start for all
    guide = AutoFlow(model, flow, init_scale=1.0)
    objective = ELBO(sticking_the_landing=False, annealing_steps=750)
    FlowSVI(model, guide, objective=objective, learning_rate=0.01, max_steps=1500, seed=0, progress=False).run(ring)
    return guide


flows = {
    "planar, 2 layers": partial(stacks.make, "planar", depth=2),
    "planar, 8 layers": partial(stacks.make, "planar", depth=8),
    "planar, 24 layers": partial(stacks.make, "planar", depth=24),
    "realnvp, 8 layers": "realnvp",
    "spline coupling, 4 layers": "spline_coupling",
}
guides = {label: fit(flow) for label, flow in flows.items()}
pd.DataFrame({label: measure("ring", guide) for label, guide in guides.items()}).T

# %%
figure, axes = plt.subplots(1, 5, figsize=(13, 3), layout="constrained")
for axis, (label, guide) in zip(axes, guides.items(), strict=True):
    show(axis, "ring", guide, label)

# %% [markdown]
# ## Layer by layer
#
# `plot_flow` shows what each layer makes of the base, on the real line, before the bijection to the box.
# Colours tell where in the base a draw comes from: an invertible map moves and bends the colours, and never
# mixes them.

# %%
_ = plot_flow(guides["planar, 8 layers"])

# %%
_ = plot_flow(guides["spline coupling, 4 layers"])

# %% [markdown]
# ## The other three
#
# Back to the defaults: a fit in stages, first the nearest normal, then a map of it, then a flow in coordinates of the
# normal.

# %%
fitted = {}
for name in ("sine", "fork", "split"):
    pyro.set_rng_seed(0)
    fitted[name] = AutoFlow(model)
    FlowSVI(model, fitted[name], seed=0, progress=False).run(energies[name])
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, (name, guide) in zip(axes, fitted.items(), strict=True):
    show(axis, name, guide, name)

# %%
pd.DataFrame({name: measure(name, guide) for name, guide in fitted.items()}).T
