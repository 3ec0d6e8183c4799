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

from pyro_nf.flows import Paced, WhitenedAffine, stacks, unpaced
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools


def prior():
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def scales():
    spread = pyro.sample("spread", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 4):
        scale = pyro.sample("scale", dist.LogNormal(0.0, spread))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.logspace(-1, 1, 4))


def moved():
    """A paced flow that is not the identity."""
    torch.manual_seed(0)
    flow = Paced(stacks.make("realnvp", 3, depth=2))
    with torch.no_grad():
        for param in flow.parameters():
            param.add_(torch.randn_like(param))
    return flow


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
    flow, x = moved(), torch.randn(5, 3)
    expected, other = flow(x), Paced(stacks.make("realnvp", 3, depth=2))
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


def test_the_entries_of_the_affine_layer_are_paced_by_their_number():
    flow, x = WhitenedAffine(8), torch.randn(5, 8)
    with torch.no_grad():
        flow.affine.params.tril.fill_(1.0)
    loc, matrix = flow.as_matrix()
    assert torch.allclose(matrix[7, :7], torch.full((7,), 1 / 8))
    assert torch.allclose(flow(x), loc + x @ matrix.mT)
    with unpaced(flow):
        assert float(flow.affine.params.tril.detach().max()) == 1 / 8
        assert torch.equal(flow.as_matrix()[1], matrix)


def test_flow_svi_trains_the_parameters_as_they_are():
    guide = AutoFlow(prior, partial(stacks.make, "realnvp", depth=2))
    units = []
    watch = [lambda evaluation: units.append(guide.flow.flows[0].units.tolist())]
    FlowSVI(prior, guide, learning_rate=0.01, max_steps=10, eval_every=5, callbacks=watch, progress=False, seed=0).run()
    assert units == 2 * [[1.0] * len(units[0])]
    assert float(guide.flow.flows[0].units.max()) < 1


def test_a_flow_of_the_user_stays_as_it_is():
    flow = stacks.make("realnvp", 4, depth=2)
    guide = AutoFlow(prior, flow)
    guide()
    assert guide.flow.flows[0] is flow


def loss_after(make_guide, optimizer, model, args, particles, steps):
    """Loss in the states of the last five of so many steps of Pyro's SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide, elbo = make_guide(model), partial(Trace_ELBO, max_plate_nesting=1, vectorize_particles=True)
    svi, losses = SVI(model, guide, optimizer, elbo(num_particles=particles)), []
    for step in range(steps):
        svi.step(*args)
        if step >= steps - 5:
            losses.append(elbo(num_particles=1000).loss(model, guide, *args))
    return sum(losses) / 5


EIGHT = (eight_schools.noncentered, eight_schools.data())


@pytest.mark.parametrize(
    ("model", "args", "optimizer", "rate", "particles", "flow"),
    [
        (prior, (), Adam, 0.05, 20, "auto"),
        (prior, (), ClippedAdam, 0.1, 1, "auto"),
        (*EIGHT, Adam, 0.1, 10, "auto"),
        (eight_schools.centered, eight_schools.data(), ClippedAdam, 0.05, 10, "auto"),
        (scales, (), Adam, 0.1, 10, "auto"),
        (*EIGHT, Adam, 0.1, 10, partial(stacks.make, "glow", depth=4)),
    ],
)
def test_it_arrives_in_plain_svi_where_auto_normal_does(model, args, optimizer, rate, particles, flow):
    normal, ours = (
        loss_after(make, optimizer({"lr": rate}), model, args, particles, 40)
        for make in (AutoNormal, lambda model: AutoFlow(model, flow))
    )
    assert ours < normal + 1
