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
# ## The posterior of one image
#
# With two latents the exact posterior of an image is a picture: prior times likelihood on a grid.

# %%
grid = torch.linspace(-3.5, 3.5, 141)
points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)


def log_posterior(model, image):
    """Return `log p(xi | x)` on the grid, for a model with one latent layer."""
    prior = dist.Normal(0.0, 1.0).log_prob(points).sum(-1)
    likelihood = model.likelihood(model.networks[0](model.mixers[0](points))).log_prob(image)
    joint = prior + likelihood
    return joint - joint.logsumexp((0, 1))


def draws(model, guide, images, num_samples=500):
    """Return draws of the guide for some images, `(num_samples, size, 2)`."""
    return torch.stack([pyro.poutine.trace(guide).get_trace(images).nodes["xi_1"]["value"] for _ in range(num_samples)])


def spread(model):
    """Return how far from normal each test image's posterior is: its entropy below that of a normal of its moments."""
    negentropy = []
    for image in test:
        log_p = log_posterior(model, image).flatten()
        p, flat = log_p.exp(), points.reshape(-1, 2)
        centred = flat - p @ flat
        variance = p @ centred**2
        cell = 2 * (grid[1] - grid[0]).log()
        normal = torch.log(2 * torch.pi * torch.e * variance).sum() / 2
        negentropy.append(float(normal + (p * (log_p.clamp(min=-50) - cell)).sum()))
    return torch.tensor(negentropy)


with torch.no_grad():
    worst = spread(fits["mean-field", 0][0]).argsort(descending=True)[:200:50]
    figure, axes = plt.subplots(len(worst), 3, figsize=(7, 9), layout="constrained")
    for row, index in zip(axes, worst, strict=True):
        row[0].imshow(test[index].reshape(8, 8), cmap="Greys")
        row[0].axis("off")
        for axis, name in zip(row[1:], ("mean-field", "flow"), strict=True):
            model, guide = fits[name, 0]
            log_p = log_posterior(model, test[index])
            axis.contourf(grid, grid, log_p.exp(), cmap="Blues", levels=8)
            xi = draws(model, guide, test[index : index + 1])[:, 0]
            axis.scatter(xi[:, 0], xi[:, 1], s=3, color="C1", alpha=0.5, linewidths=0)
            centre = (log_p.exp()[..., None] * points).sum((0, 1))
            size = max(0.6, 4 * float((log_p.exp() * (points - centre).square().sum(-1)).sum() ** 0.5))
            axis.set(xlim=(centre[0] - size, centre[0] + size), ylim=(centre[1] - size, centre[1] + size))
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("image")
    axes[0, 1].set_title("mean-field")
    axes[0, 2].set_title("flow")

# %% [markdown]
# ## A walk through the latent space
#
# What the model has learnt is seen by decoding a grid of latents.

# %%
model, _ = fits["flow", 0]
normal = torch.distributions.Normal(0.0, 1.0)
steps = normal.icdf(torch.linspace(0.03, 0.97, 14))
with torch.no_grad():
    lattice = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1)
    images = model.likelihood(model.networks[0](model.mixers[0](lattice))).base_dist.probs.reshape(14, 14, 8, 8)
plt.figure(figsize=(6, 6), layout="constrained")
plt.imshow(images.permute(0, 2, 1, 3).reshape(14 * 8, 14 * 8), cmap="Greys")
_ = plt.axis("off")
