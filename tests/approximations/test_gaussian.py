"""The nearest normal: exact where there is one, stationary where there is none, and never lost."""

import math

import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.gaussian import nearest_normal
from pyro_nf.approximations.modes import normal_elbo

pytestmark = pytest.mark.usefixtures("float64")


def start(dim, scale=1.0):
    return torch.zeros(dim), scale * torch.eye(dim)


def test_a_normal_is_found_from_far_in_any_unit():
    torch.manual_seed(0)
    loc = torch.tensor([5.0, -3e-3, 40.0])
    scale_tril = torch.tensor([[1.0, 0, 0], [2e-3, 1e-3, 0], [-10.0, 30.0, 20.0]])
    normal = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    found, tril, elbos = nearest_normal(
        Density(normal.log_prob), loc + scale_tril @ torch.tensor([2.0, -1, 3]), 3 * scale_tril
    )
    assert torch.allclose(found, loc, rtol=1e-2)
    assert torch.allclose(tril @ tril.mT, normal.covariance_matrix, rtol=0.02)
    assert float(elbos[-1]) == pytest.approx(0.0, abs=0.005)
    assert len(elbos) < 40  # nothing was left to do


def test_moments_of_a_skewed_density_solve_the_stationarity_conditions():
    # log Gamma(3): p(x) = exp(3 x - e^x) / 2. E_q[g] = 0 and E_q[g'] = -1/s^2 give s^2 = 1/3, m = log 3 - 1/6.
    torch.manual_seed(1)
    density = Density(lambda x: (3 * x - x.exp()).sum() - math.log(2.0))
    loc, tril, elbos = nearest_normal(density, *start(1))
    assert float(loc) == pytest.approx(math.log(3) - 1 / 6, abs=0.02)
    assert float(tril) == pytest.approx(math.sqrt(1 / 3), rel=0.03)
    m, s = float(loc), float(tril)
    exact = 3 * m - math.exp(m + s**2 / 2) - math.log(2) + math.log(s) + 0.5 * math.log(2 * math.pi * math.e)
    assert float(elbos[-10:].mean()) == pytest.approx(exact, abs=0.02)


def test_a_funnel_gets_a_normal_better_than_its_start():
    torch.manual_seed(2)

    def funnel(x):
        v, rest = x[0], x[1:]
        return -0.5 * (v / 3) ** 2 - 0.5 * (rest.square() * (-v).exp()).sum() - 0.5 * len(rest) * v

    density = Density(funnel)
    before = start(5, 0.1)
    loc, tril, _ = nearest_normal(density, *before)
    assert normal_elbo(density, loc, tril) > normal_elbo(density, *before) + 1.0


def test_points_without_a_density_are_left_out():
    torch.manual_seed(3)
    inside = Density(lambda x: -0.5 * x.square().sum() + torch.where(x[0] > -2.0, 0.0, math.nan))
    loc, tril, _ = nearest_normal(inside, *start(2))
    assert loc.abs().max() < 0.2
    assert torch.allclose(tril, torch.eye(2), atol=0.2)


def test_a_posterior_of_more_coordinates_than_draws():
    torch.manual_seed(4)
    root = torch.randn(200, 200) / 10
    precision = root @ root.mT + torch.eye(200)
    density = Density(lambda x: -0.5 * x @ precision @ x)
    loc, tril, _ = nearest_normal(density, *start(200))
    exact = 100 * math.log(2 * math.pi) - 0.5 * float(torch.logdet(precision))
    assert normal_elbo(density, loc, tril) == pytest.approx(exact, abs=0.05)
