"""The models with discrete latents: their densities and gradients are those of the hand-marginalized ones."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.models import discrete
from pyro_nf.models.benchmarks import marginalized
from pyro_nf.programs.coordinates import coordinates, model_log_density
from pyro_nf.programs.enumeration import find_discrete
from pyro_nf.programs.sites import is_latent

pytestmark = pytest.mark.usefixtures("float64")


def annotations():
    ratings = discrete.anesthesia_ratings()
    return ratings.labels, ratings.annotators


CASES = {
    "gaussian_mixture": lambda: (discrete.galaxies().double(), 3, 20.0, 10.0),
    "poisson_hidden_markov": lambda: (discrete.earthquakes().double(), 3, 20.0),
    "change_point": lambda: (discrete.coal_mining_disasters().double(),),
    "zero_inflated_poisson": lambda: (discrete.fetal_movements().double(),),
    "cormack_jolly_seber": lambda: (discrete.dippers().double(),),
    "occupancy": lambda: (discrete.salamanders().double(), 5),
    "dawid_skene": annotations,
}


def density_and_point(model, seed):
    """The log density over the coordinates, and a point of the prior."""
    pyro.set_rng_seed(seed)
    trace = poutine.trace(model).get_trace()
    latents = {name for name, site in trace.nodes.items() if is_latent(site) and not site["fn"].support.is_discrete}
    enumeration = find_discrete(trace, latents)
    for name in enumeration.names:
        trace.remove_node(name)
    return model_log_density(model, enumeration=enumeration), coordinates(trace)


@pytest.mark.parametrize("name", CASES)
def test_density_and_gradient_are_those_of_the_marginal(name):
    args = CASES[name]()
    enumerated, point = density_and_point(lambda: getattr(discrete, name)(*args), 0)
    by_hand, other = density_and_point(lambda: getattr(marginalized, name)(*args), 0)
    assert point.shape == other.shape
    # The prior's tails are far from the data: draws near to the center.
    points = 0.3 * torch.randn(3, len(point))
    gradients, values = torch.func.vmap(torch.func.grad_and_value(enumerated))(points)
    wanted_gradients, wanted = torch.func.vmap(torch.func.grad_and_value(by_hand))(points)
    assert torch.allclose(values, wanted, rtol=1e-12, atol=1e-10)
    assert torch.allclose(gradients, wanted_gradients, rtol=1e-10, atol=1e-10)


def test_a_hurdle_is_a_bernoulli_and_a_truncated_poisson():
    y, x = torch.tensor([0.0, 0.0, 2.0, 1.0]), torch.tensor([[0.5], [-1.0], [1.0], [0.2]])
    values = {"share": torch.tensor(0.4), "intercept": torch.tensor(0.3), "slope": torch.tensor([0.7])}
    trace = poutine.trace(poutine.condition(discrete.hurdle_poisson, values)).get_trace(y, x)
    rate = (0.3 + 0.7 * x[:, 0]).exp()
    counts = torch.arange(1.0, 60.0)
    truncated = dist.Poisson(rate[:, None]).log_prob(counts).softmax(-1)
    rows = torch.where(y == 0, 0.6, 0.4 * truncated[torch.arange(4), y.long() - 1]).log().sum()
    prior = dist.Normal(0.0, 2.0).log_prob(torch.tensor([0.3, 0.7])).sum()
    assert torch.isclose(trace.log_prob_sum(), rows + prior, rtol=1e-12)
