# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own flow
#
# Say you know something about the shape of your posterior: skewed, or with tails of another weight than the
# normal's. There is a classic for that, the *sinh-arcsinh transformation* of Jones and Pewsey (2009),
#
# $$ y_i = \sinh\bigl(\delta_i \operatorname{arsinh}(x_i) + \epsilon_i\bigr), \qquad
#    \log \left| \frac{\partial y}{\partial x} \right|
#    = \sum_i \log \delta_i + \log \cosh(\delta_i \operatorname{arsinh}(x_i) + \epsilon_i)
#      - \tfrac12 \log(1 + x_i^2). $$
#
# $\epsilon$ skews, $\delta < 1$ makes tails heavier and $\delta > 1$ lighter, and $\epsilon = 0, \delta = 1$ is
# the identity. It is not part of this library. Here is the way from the equation to a flow that you can trust.
#
# ## The contract
#
# A flow is a subclass of `Flow` with two methods: there and back, each with its log-determinant. Its parameters
# live in `ContextParameters`; the same code then works with parameters of its own, and with parameters that an
# encoder sets.

# %%
import matplotlib.pyplot as plt
import pyro
import torch

from pyro_nf.diagnostics import diagnose, to_arviz
from pyro_nf.flows import Flow
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.networks import ContextParameters
from pyro_nf.testing import FlowError, check_flow

pyro.set_rng_seed(0)


class FirstTry(Flow):
    def __init__(self, dim, context_dim=0):
        super().__init__((dim,), context_dim)
        initial = {"epsilon": torch.zeros(dim), "log_delta": torch.zeros(dim)}
        self.params = ContextParameters(initial, context_dim)

    def forward_and_log_det(self, x, context=None):
        epsilon, log_delta = self.params(context)
        angle = log_delta.exp() * torch.asinh(x) + epsilon
        return torch.sinh(angle), (log_delta + torch.cosh(angle).log() - torch.log(1 + x**2)).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        epsilon, log_delta = self.params(context)
        angle = (torch.asinh(y) - epsilon) / log_delta.exp()
        return torch.sinh(angle), (torch.cosh(angle).log() - torch.log(1 + y**2) - log_delta).sum(-1)


# %% [markdown]
# ## Check it
#
# A flow that is a little wrong does not crash. It reports a density that is not the density of its draws, the
# ELBO goes up, and the posterior is wrong. `check_flow` compares with autograd, goes there and back, far out
# and at extreme parameters, and in two dimensions integrates the density.

# %%
try:
    check_flow(FirstTry(2))
except FlowError as error:
    print(error)

# %% [markdown]
# Two kinds of findings. The log-determinants are wrong at *all* parameters, and the density does not integrate
# to 1: the formula has a slip, a half is missing before $\log(1 + x^2)$. And at wide parameters, `N(0, 5^2)`,
# the inverse overflows: parameters range over all of R, an optimiser will go there, and $\sinh(e^{5}
# \operatorname{arsinh}(x))$ is out of any float. So bound what is exponentiated, softly, for a hard clamp has
# no gradient; and write the logarithm of the hyperbolic cosine so that it does not overflow. (With it, the
# forgotten half cannot be forgotten: $\tfrac12 \log(1 + x^2) = \log \cosh \operatorname{arsinh} x$.)

# %%
from pyro_nf.flows.numerics import soft_bound


def log_cosh(angle):
    return torch.logaddexp(angle, -angle) - torch.tensor(2.0).log()


class SinhArcsinh(Flow):
    """Sinh-arcsinh flow (Jones and Pewsey 2009): skewness and weight of the tails of each coordinate."""

    def __init__(self, dim, context_dim=0):
        super().__init__((dim,), context_dim)
        initial = {"epsilon": torch.zeros(dim), "log_delta": torch.zeros(dim)}
        self.params = ContextParameters(initial, context_dim)

    def forward_and_log_det(self, x, context=None):
        epsilon, delta = self.unpack(context)
        angle = delta * torch.asinh(x) + epsilon
        return torch.sinh(angle), (delta.log() + log_cosh(angle) - log_cosh(torch.asinh(x))).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        epsilon, delta = self.unpack(context)
        angle = (torch.asinh(y) - epsilon) / delta
        return torch.sinh(angle), (log_cosh(angle) - log_cosh(torch.asinh(y)) - delta.log()).sum(-1)

    def unpack(self, context):
        epsilon, log_delta = self.params(context)
        return soft_bound(epsilon, 3.0), soft_bound(log_delta, 1.0).exp()


for dim in (1, 2, 3):
    for context_dim in (0, 2):
        check_flow(SinhArcsinh(dim, context_dim))
print(check_flow(SinhArcsinh(2)))

# %% [markdown]
# ## Use it
#
# A flow with a `dim` as its only argument is a factory that `AutoFlow` takes as it is: it puts a full-rank
# affine layer behind it. Eight schools again, non-centred this time: a posterior that is normal but for its
# skewness and tails, in `tau` most of all. Beside the new flow stand the normal without it, and the library's
# default with networks.

# %%
import numpy as np
import pandas as pd
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_nf.models import eight_schools

model, data = eight_schools.noncentered, eight_schools.data()
exact = eight_schools.grid_posterior(*data)
guides = {
    "normal": AutoMultivariateNormal(model),
    "sinh-arcsinh": AutoFlow(model, flow=SinhArcsinh),
    "realnvp": AutoFlow(model, flow="realnvp"),
}
rows, draws = {}, {}
for name, guide in guides.items():
    # A learning rate makes it one stage, of the flow alone: without the map that a fit in stages tries before.
    FlowSVI(model, guide, learning_rate=0.01, seed=0, progress=False).run(*data)
    found = diagnose(model, guide, *data)
    rows[name] = {
        "parameters": sum(param.numel() for param in guide.parameters()),
        "KL (nats)": round(exact.log_evidence - found.elbo, 3),
        "ESS": f"{100 * found.ess_fraction:.0f}%",
        "k-hat": round(found.khat, 2),
        "verdict": str(found.verdict),
    }
    draws[name] = to_arviz(model, guide, *data, num_samples=10_000)["posterior"]["tau"].values.ravel()
pd.DataFrame(rows).T

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
edges = np.linspace(-5, 4, 60)
for name, tau in draws.items():
    axis.hist(np.log(tau), edges, density=True, histtype="step", label=name)
axis.plot(exact.log_tau, exact.density.sum(0) * (exact.mu[1] - exact.mu[0]), color="k", linewidth=1, label="exact")
axis.set(xlabel=r"$\log\,\tau$", xlim=(-5, 4), yticks=[])
_ = axis.legend()

# %% [markdown]
# The normal misses the long left shoulder of `tau`, and its verdict is not "right". Twenty more numbers than
# a full-rank normal needs, a skewness and a weight of the tails for each latent, close more than half of the
# gap. What is left is not a matter of single coordinates: how wide `mu` and the schools are depends on `tau`,
# and a map that treats each coordinate by itself cannot say so. The default flow can, with a hundred times as
# many parameters.
#
# ## Share it
#
# To use the flow inside couplings or autoregressive flows, where a network sets its parameters from the other
# coordinates, write it as a *transformer*: the same two formulas, without the sum.
# [Contributing](../CONTRIBUTING.md) has the steps, from there to a named stack with tests and a row in the
# table of [Which flow?](../docs/flows.md)
