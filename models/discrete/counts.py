"""Counts with more zeros than a Poisson distribution has."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.models.discrete.designs import linear_predictor


def zero_inflated_poisson(y: Tensor, x: Tensor | None = None) -> None:
    """Zero-inflated counts: `z_i ~ Bernoulli(share)`, `y_i ~ Poisson(rate_i)` where z_i is 1, else `y_i = 0`.

    The priors: `share ~ Uniform(0, 1)`; `log rate_i = intercept + x_i . slope`, all coefficients `N(0, 2)`.

    Args:
        y: Counts, `(n,)`.
        x: Columns that the rate depends on, standardized, `(n, p)`.
    """
    share = pyro.sample("share", dist.Uniform(y.new_tensor(0.0), 1.0))
    rate = linear_predictor(y, x, 2.0).exp()
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Bernoulli(share))
        # A rate of 1e-30 is that of no event at all to all digits, and has a gradient.
        pyro.sample("y", dist.Poisson(torch.where(z == 1, rate, y.new_tensor(1e-30))), obs=y)


def hurdle_poisson(y: Tensor, x: Tensor | None = None) -> None:
    """Hurdle counts: `y_i > 0` with probability `share`, and is then from a Poisson distribution without its zero.

    The priors are those of `zero_inflated_poisson`. It has no discrete latent: whether the hurdle is taken is seen.

    Args:
        y: Counts, `(n,)`.
        x: Columns that the rate depends on, standardized, `(n, p)`.
    """
    share = pyro.sample("share", dist.Uniform(y.new_tensor(0.0), 1.0))
    rate = linear_predictor(y, x, 2.0).exp()
    is_positive = y > 0
    with pyro.plate("row", len(y)):
        pyro.sample("is_positive", dist.Bernoulli(share), obs=is_positive.to(y.dtype))
        with pyro.poutine.mask(mask=is_positive):
            pyro.sample("y", dist.Poisson(rate), obs=y)
            pyro.factor("is_truncated", -torch.log(-torch.expm1(-rate)))
