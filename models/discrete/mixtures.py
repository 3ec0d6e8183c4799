"""Mixtures: which component a row comes from is a discrete latent."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def gaussian_mixture(
    y: Tensor, num_components: int = 2, center: float = 0.0, spread: float = 1.0, is_ordered: bool = True
) -> None:
    """Mixture of normals: `z_i ~ Categorical(share)`, `y_i ~ N(loc[z_i], scale[z_i])`.

    The priors are `share ~ Dirichlet(1, ..., 1)` and `scale_k ~ LogNormal(log(spread / 4), 1)`. The locations are in
    order, so that the posterior has one of the K! copies that a change of labels makes:
    `loc_1 ~ N(center - spread, spread)`, and gaps `loc_{k+1} - loc_k ~ HalfNormal(spread)`. Without the order they are
    `loc_k ~ N(center, spread)`.

    Args:
        y: Rows, `(n,)`.
        num_components: K.
        center: Where the rows are, in their unit.
        spread: How far they reach from there, in their unit.
        is_ordered: Whether the locations are in order.
    """
    share = pyro.sample("share", dist.Dirichlet(y.new_ones(num_components)))
    loc = _ordered(y, num_components, center, spread) if is_ordered else None
    with pyro.plate("component", num_components):
        if loc is None:
            loc = pyro.sample("loc", dist.Normal(y.new_tensor(center), spread))
        scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(spread / 4).log(), 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Categorical(share))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def _ordered(y: Tensor, num_components: int, center: float, spread: float) -> Tensor:
    lowest = pyro.sample("lowest", dist.Normal(y.new_tensor(center - spread), spread))
    with pyro.plate("gaps", num_components - 1):
        gap = pyro.sample("gap", dist.HalfNormal(y.new_tensor(spread)))
    loc: Tensor = pyro.deterministic("loc", lowest + torch.cat([y.new_zeros(1), gap.cumsum(-1)]), event_dim=1)
    return loc
