# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A deep latent Gaussian model
#
# In a variational autoencoder every image has a latent of its own, and an *encoder* reads the posterior of that
# latent off the image. The usual encoder returns a mean and a standard deviation for each coordinate: a
# mean-field guide once more, one for each image. Here the encoder's output becomes the context of a flow, in
# one line: `AmortizedFlow(model, encoder)`.
#
# The data are scikit-learn's 8 x 8 handwritten digits, black and white. The latent has two dimensions: too few
# for a good model, but the exact posterior of every image can then be drawn.

# %%
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_nf.diagnostics import local_evidence
from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import DLGM, load_digits
from pyro_nf.networks import MLP

train, test = load_digits()
figure, axes = plt.subplots(2, 12, figsize=(9, 1.8), layout="constrained")
for axis, image in zip(axes.flat, train, strict=False):
    axis.imshow(image.reshape(8, 8), cmap="Greys")
    axis.axis("off")

# %% [markdown]
# `DLGM` is an ordinary Pyro model: $\xi \sim N(0, I)$, a network from $\xi$ to the pixels' probabilities, and a
# plate over the images that is subsampled. The mean-field guide is the one of Pyro's own tutorial on the VAE.


# %%
class MeanField(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = MLP(64, (100,), 4)  # two means, two standard deviations

    def forward(self, x, batch_size=None):
        encoder = pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            loc, raw_scale = encoder(x[rows]).chunk(2, -1)
            pyro.sample("xi_1", dist.Normal(loc, nn.functional.softplus(raw_scale)).to_event(1))


def mean_field(model):
    return MeanField()


def flow(model):
    encoder = nn.Sequential(MLP(64, (100,), 50), nn.Tanh())  # its outputs are the flow's context
    return AmortizedFlow(model, encoder, flow=partial(stacks.make, "realnvp", depth=4))


def fit(make_guide, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = DLGM(data_dim=64, latent_dims=(2,), hidden_dims=(50,))
    guide = make_guide(model)
    svi = FlowSVI(model, guide, num_particles=4, learning_rate=3e-3, max_steps=2000, seed=seed, progress=False)
    svi.run(train, batch_size=100)
    return model, guide


# %% [markdown]
# ## ELBO and log-likelihood
#
# Both guides train with the same budget, each with a model of its own, from three seeds. On held-out images,
# `local_evidence` gives two figures for each: the ELBO, and the log-likelihood by importance sampling. Their
# difference is how far the guide is from the posterior of that image, in nats.

# %%
fits = {
    (name, seed): fit(make, seed)
    for name, make in {"mean-field": mean_field, "flow": flow}.items()
    for seed in (0, 1, 2)
}
rows = []
for (name, seed), (model, guide) in fits.items():
    pyro.set_rng_seed(seed)
    found = local_evidence(model, guide, test, num_samples=500)
    elbo, log_p = float(found.elbo.mean()), float(found.log_evidence.mean())
    rows.append({"guide": name, "seed": seed, "ELBO": elbo, "log p(x)": log_p, "gap": log_p - elbo})
table = pd.DataFrame(rows)
table.groupby("guide", sort=False)[["ELBO", "log p(x)", "gap"]].agg(["mean", "std"]).round(2)

# %% [markdown]
# The flow halves the gap. Neither its ELBO nor its log-likelihood is better beyond the scatter of the seeds:
# these models have too few latents to profit from a better posterior. Which is worth knowing, and costs two
# lines.
#
# ## One model, two guides
#
# In that table each guide has trained a model of its own. To compare the guides alone, let the model of the
# first mean-field fit stay as it is, and fit a flow to its posteriors.

# %%
model, guides = fits["mean-field", 0][0], {"mean-field": fits["mean-field", 0][1]}
model.requires_grad_(False).eval()  # Pyro asks for eval where parameters stay
guides["flow"] = flow(model)
options = {"num_particles": 4, "learning_rate": 3e-3, "max_steps": 2000, "seed": 0, "progress": False}
FlowSVI(model, guides["flow"], **options).run(train, batch_size=100)
gaps = {}
for name, guide in guides.items():
    found = local_evidence(model, guide, test, num_samples=500)
    gaps[name] = found.log_evidence - found.elbo
pd.DataFrame({name: gap.numpy() for name, gap in gaps.items()}).describe().loc[["mean", "50%", "max"]].round(2)

# %% [markdown]
# With two latents the exact posterior of an image is a picture: prior times likelihood on a grid (blue). Here
# are the guides' draws (orange) for images out of the worst tenth of the mean-field encoder.

# %%
grid = torch.linspace(-4, 4, 321)
points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)


def posterior(image):
    """Return the exact density on the grid, for a model with one latent layer."""
    prior = dist.Normal(0.0, 1.0).log_prob(points).sum(-1)
    likelihood = model.likelihood(model.networks[0](model.mixers[0](points))).log_prob(image)
    return (prior + likelihood).flatten().softmax(0).view(len(grid), len(grid))


def draws(guide, image, num_samples=300):
    """Return draws of the guide for one image, `(num_samples, 2)`."""
    images = image.expand(num_samples, -1)
    return pyro.poutine.trace(guide).get_trace(images).nodes["xi_1"]["value"].detach()


chosen = gaps["mean-field"].argsort(descending=True)[:40:10]
figure, axes = plt.subplots(2, 6, figsize=(11, 4), layout="constrained")
for row in (0, 1):
    for column, index in enumerate(chosen[2 * row : 2 * row + 2]):
        image_axis, *others = axes[row, 3 * column : 3 * column + 3]
        image_axis.imshow(test[index].reshape(8, 8), cmap="Greys")
        image_axis.axis("off")
        density = posterior(test[index])
        centre = (density[..., None] * points).sum((0, 1))
        reach = 4 * (density[..., None] * (points - centre) ** 2).sum((0, 1)).max().sqrt()
        for axis, (name, guide) in zip(others, guides.items(), strict=True):
            axis.contourf(grid, grid, density, cmap="Blues", levels=9)
            axis.scatter(*draws(guide, test[index]).T, s=3, color="C1", alpha=0.5, linewidths=0)
            axis.set(xlim=(centre[0] - reach, centre[0] + reach), ylim=(centre[1] - reach, centre[1] + reach))
            axis.set(xticks=[], yticks=[], title=f"{name}, {float(gaps[name][index]):.1f} nats")

# %% [markdown]
# ## A walk through the latent space
#
# What the model has learnt is seen by decoding a lattice of latents, at quantiles of their prior.

# %%
steps = dist.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 12))
lattice = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1)
images = model.likelihood(model.networks[0](model.mixers[0](lattice))).base_dist.probs.reshape(12, 12, 8, 8)
framed = nn.functional.pad(images, (1, 1, 1, 1)).permute(0, 2, 1, 3).reshape(120, 120)
plt.figure(figsize=(6, 6), layout="constrained")
plt.imshow(framed, cmap="Greys")
_ = plt.axis("off")

# %% [markdown]
# ## What to take away
#
# - `AmortizedFlow(model, encoder)` takes the place of a guide written by hand; the encoder's outputs are the flow's
#   context, so there are no means and standard deviations to split off.
# - `local_evidence` says, datum by datum, how far the guide is from the posterior. Look at it before you look for a
#   better guide: where the gap is small, the model is what limits you.
# - A tighter posterior is not by itself a better model. Compare over seeds.
