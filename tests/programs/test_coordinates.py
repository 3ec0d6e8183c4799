import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.guides import AutoFlow
from pyro_nf.programs.coordinates import coordinate_names, coordinates, model_log_density


def mixed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Uniform(mu, mu + tau))  # a support that moves
        pyro.sample("y", dist.Normal(z, shares[0]), obs=y)


def test_coordinates_go_back_to_the_latents_they_came_from_and_the_density_is_the_traces(float64):
    y = torch.tensor([0.3, -0.2]).double()
    trace = poutine.trace(mixed).get_trace(y)
    point = coordinates(trace)
    assert coordinate_names(trace) == ["mu", "tau", "shares[0]", "shares[1]", "z[0]", "z[1]"]
    log_det = 0.0
    start = 0
    for name in ("mu", "tau", "shares", "z"):
        fn, value = trace.nodes[name]["fn"], trace.nodes[name]["value"]
        transform = torch.distributions.biject_to(fn.support)
        u = transform.inv(value)
        assert torch.equal(point[start : start + u.numel()], u.reshape(-1))
        start += u.numel()
        log_det = log_det + transform.log_abs_det_jacobian(u, value).sum()
    expected = float(trace.log_prob_sum() + log_det)
    assert float(model_log_density(partial(mixed, y))(point)) == pytest.approx(expected, rel=1e-10)


def test_the_density_can_be_batched_and_differentiated():
    density = model_log_density(lambda: pyro.sample("tau", dist.Gamma(2.0, 1.0)))
    points = torch.linspace(-1, 1, 5)[:, None]
    scores = torch.func.vmap(torch.func.grad(density))(points)
    assert torch.allclose(scores, 2 - points.exp(), atol=1e-5)  # log density 2 u - exp(u)


def test_the_order_is_that_of_an_auto_flow():
    def model():
        pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model)
    guide()
    latent = guide.get_posterior().sample()
    values = guide._constrain(latent)
    trace = poutine.trace(poutine.condition(model, values)).get_trace()
    for name in values:
        trace.nodes[name]["is_observed"] = False
    assert torch.allclose(coordinates(trace), latent, atol=1e-6)


def test_data_that_are_missing_and_masked_have_a_gradient():
    y = torch.tensor([1.0, math.nan])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    score = torch.func.grad(model_log_density(model))(torch.zeros(1))
    assert float(score) == pytest.approx(1.0)


def test_discrete_latents_are_refused_by_name():
    trace = poutine.trace(lambda: pyro.sample("k", dist.Bernoulli(0.5))).get_trace()
    with pytest.raises(ValueError, match="coordinates are of continuous latents; site 'k' is discrete"):
        coordinates(trace)
