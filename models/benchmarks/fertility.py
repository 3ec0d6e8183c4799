"""Fertility of 201 countries from 1960 to 2010: a regression with varying intercepts and slopes."""

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# Every tenth year: the World Bank fills in the years between the United Nations' estimates.
_YEARS = range(1960, 2011, 10)
# Not countries but groups of them, by their codes.
_GROUPS = ("CAA", "LCN", "OED", "OSS", "PSS")


class Fertility(NamedTuple):
    """The data in the order of the model's arguments.

    Attributes:
        country: Number of the country of each rate, from 0, `(size,)`.
        decade: Decades since 1985, `(size,)`.
        log_rate: Log of the total fertility rate, births per woman, `(size,)`.
        num_countries: How many countries there are.
    """

    country: Tensor
    decade: Tensor
    log_rate: Tensor
    num_countries: int


def load_fertility(**options: Any) -> Fertility:
    """Return the World Bank's total fertility rates of 1960, 1970, ..., 2010, those that are known, from statsmodels.

    Args:
        **options: `dtype` and `device` of the tensors.

    Raises:
        ImportError: If statsmodels is not installed.

    References:
        The World Bank, World Development Indicators, SP.DYN.TFRT.IN.
    """
    try:
        from statsmodels.datasets import fertility
    except ImportError as error:
        raise ImportError("load_fertility needs statsmodels: pip install 'pyro-nf[models]'") from error
    table = fertility.load_pandas().data
    rates = table.loc[~table["Country Code"].isin(_GROUPS), [str(year) for year in _YEARS]].dropna(how="all")
    rate = torch.tensor(rates.to_numpy())
    country, period = (~rate.isnan()).nonzero(as_tuple=True)
    year = torch.tensor(_YEARS)[period]
    decade, log_rate = ((year - 1985) / 10).to(**options), rate[country, period].log().to(**options)
    return Fertility(country.to(decade.device), decade, log_rate, len(rates))


def varying_coefficients(
    country: Tensor, decade: Tensor, log_rate: Tensor | None = None, num_countries: int = 1
) -> Tensor:
    r"""A line for each country, whose intercept and slope are drawn together.

    `log_rate_i ~ N(a_c + b_c decade_i, sigma)` with c the country of i, `(a_c, b_c) ~ N(mean, S)`,
    `S = diag(scale) R diag(scale)`; `mean ~ N((1, 0), (1, 0.5))`, `scale ~ HalfNormal(1, 0.5)`, `R ~ LKJ(2)`, of which
    the site `correlation` is the Cholesky factor, and `sigma ~ HalfNormal(0.5)`.

    Args:
        country: `(size,)`.
        decade: `(size,)`.
        log_rate: `(size,)`; `None` to draw them.
        num_countries: How many countries there are.

    References:
        Gelman, Hill (2007), "Data analysis using regression and multilevel/hierarchical models", section 13.1.
    """
    mean = pyro.sample("mean", dist.Normal(decade.new_tensor([1.0, 0.0]), decade.new_tensor([1.0, 0.5])).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(decade.new_tensor([1.0, 0.5])).to_event(1))
    correlation = pyro.sample("correlation", dist.LKJCholesky(2, decade.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(decade.new_tensor(0.5)))
    scale_tril = scale[..., None] * correlation
    with pyro.plate("country", num_countries):
        line = pyro.sample("line", dist.MultivariateNormal(mean, scale_tril=scale_tril))
    intercept, slope = line[..., country, 0], line[..., country, 1]
    with pyro.plate("data", len(decade)):
        result: Tensor = pyro.sample("log_rate", dist.Normal(intercept + slope * decade, sigma), obs=log_rate)
    return result
