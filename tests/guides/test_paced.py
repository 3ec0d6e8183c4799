"""Flows in units of their own: plain SVI at usual learning rates, with the map, its copies and its files intact."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam

from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.guides.paced import Paced
from pyro_nf.models import eight_schools
from pyro_nf.testing import check_flow

NAMES = ["realnvp", "maf", "planar"]


def prior():
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def scales():
    spread = pyro.sample("spread", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 4):
        scale = pyro.sample("scale", dist.LogNormal(0.0, spread))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.logspace(-1, 1, 4))


def moved(name, dim=3):
    """A paced flow that is not the identity."""
    torch.manual_seed(0)
    flow = Paced(stacks.make(name, dim))
    with torch.no_grad():
        for param in flow.parameters():
            param.add_(torch.randn_like(param))
    return flow


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float64")
def test_it_is_the_flow(name):
    check_flow(moved(name), identity=False, factory=lambda: Paced(stacks.make(name, 3)))


@pytest.mark.parametrize("name", stacks.names())
def test_the_map_does_not_change_with_the_units(name):
    torch.manual_seed(0)
    flow, x = stacks.make(name, 3), torch.randn(5, 3)
    with torch.no_grad():
        for param in flow.parameters():
            param.add_(0.1 * torch.randn_like(param))
    expected, own = flow(x), {key: value.clone() for key, value in flow.state_dict().items()}
    paced = Paced(flow)
    assert torch.equal(paced(x), expected)
    with paced.unpaced():
        assert torch.equal(paced(x), expected)
        assert all(torch.equal(value, own[key]) for key, value in flow.state_dict().items())
    assert torch.equal(paced(x), expected)
    assert float(paced.units.max()) < 1


def test_files_and_copies_keep_the_map_whatever_the_units():
    flow, x = moved("realnvp"), torch.randn(5, 3)
    expected, other = flow(x), Paced(stacks.make("realnvp", 3))
    with flow.unpaced():
        state = copy.deepcopy(flow.state_dict())
        assert torch.equal(copy.deepcopy(flow)(x), expected)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    assert torch.equal(other.units, flow.units)
    with other.unpaced():
        other.load_state_dict(flow.state_dict())
        assert torch.equal(other(x), expected)
    assert torch.equal(other(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(flow))(x), expected)
    with pytest.raises(RuntimeError, match="units"):
        other.load_state_dict({key: value for key, value in state.items() if key != "units"})


def test_a_flow_of_the_user_stays_as_it_is():
    flow = stacks.make("realnvp", 4, depth=2)
    guide = AutoFlow(prior, flow)
    guide()
    assert guide.flow.flows[0] is flow


def loss_after(make_guide, optimizer, model, args, elbo, steps):
    """Loss of the last states, after so many steps of Pyro's SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make_guide(model)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
    many = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    return sum(svi.step(*args) * 0 + many.loss(model, guide, *args) for _ in range(5)) / 5


@pytest.mark.parametrize(
    ("model", "args", "optimizer", "rate", "particles", "flow"),
    [
        (prior, (), Adam, 0.05, 20, "auto"),
        (prior, (), ClippedAdam, 0.1, 1, "auto"),
        (eight_schools.noncentered, eight_schools.data(), Adam, 0.1, 10, "auto"),
        (eight_schools.centered, eight_schools.data(), ClippedAdam, 0.05, 10, "auto"),
        (scales, (), Adam, 0.1, 1, "auto"),
        (eight_schools.noncentered, eight_schools.data(), Adam, 0.05, 10, partial(stacks.make, "glow", depth=4)),
        (eight_schools.noncentered, eight_schools.data(), Adam, 0.05, 10, "bnaf"),
    ],
)
def test_it_arrives_in_plain_svi_where_auto_normal_does(model, args, optimizer, rate, particles, flow):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    normal, ours = (
        loss_after(make, optimizer({"lr": rate}), model, args, elbo, 60)
        for make in (AutoNormal, lambda model: AutoFlow(model, flow))
    )
    assert ours < normal + 1
