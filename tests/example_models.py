"""Small models that several tests fit."""

import pyro
import pyro.distributions as dist
import torch

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])


def normal_mean(y=Y, sd=5.0, shift=0.0):
    """Normal data, whose mean has a normal posterior: N(9 / 5.04, 1 / 5.04) at `Y`."""
    mu = pyro.sample("mu", dist.Normal(0.0, sd))
    with pyro.plate("d", len(y)):
        pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)


def banana():
    """A bent posterior in double precision, normalized: its log evidence is 0."""
    x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def skewed_regression():
    """A slope and a standard deviation of 20 points, in double precision, whose posterior is skewed."""
    x = torch.linspace(-1, 1, 20).double()
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()).double(), 10.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros(()).double(), 2.0))
    pyro.sample("y", dist.Normal(slope * x, sigma).to_event(1), obs=2 * x + 0.5 * (9 * x).sin())
