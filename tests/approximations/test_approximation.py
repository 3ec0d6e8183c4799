"""An approximation is a value: a guide gives it and becomes it, bit for bit, and a copy shares nothing."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.approximations.approximation import start_at_modes
from pyro_nf.approximations.density import Density
from pyro_nf.flows import ElementwiseAffine, QuadraticTriangularMap, stacks
from pyro_nf.guides import AutoFlow


def model():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def small(dim):
    return stacks.realnvp(dim, depth=2, hidden_dims=(4,))


def scrambled(**options):
    """A guide whose every parameter was moved."""
    guide = AutoFlow(model, small, **options)
    guide()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return guide


def mapped():
    guide = scrambled()
    transport_map = QuadraticTriangularMap(3)
    with torch.no_grad():
        for param in transport_map.parameters():
            param.normal_(std=0.1)
    transport_map.set_order(torch.tensor([2, 0, 1]))
    guide.affine.assign(torch.randn(3), torch.eye(3) + torch.randn(3, 3).tril(-1), transport_map)
    return guide


def defended():
    guide = scrambled()
    guide.base.defend(0.1)
    return guide


def without_network():
    guide = scrambled()
    guide.take_over(dataclasses.replace(guide.approximation(), has_network=False))
    return guide


KINDS = {
    "plain": scrambled,
    "mapped": mapped,
    "defended": defended,
    "mixture": lambda: scrambled(base="mixture"),
    "student": lambda: scrambled(base="student_t"),
    "without network": without_network,
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def draws(distribution):
    """Draws and their densities, and densities of other points: what two equal distributions share."""
    torch.manual_seed(3)
    with torch.no_grad():
        sampled = distribution.sample((20,))
        return {
            "draws": sampled,
            "of draws": distribution.log_prob(sampled),
            "else": distribution.log_prob(sampled + 1),
        }


def parts(approximation):
    return torch.nn.ModuleList([approximation.base, approximation.network, approximation.affine])


@kinds
def test_its_posterior_is_the_guides(make):
    guide = make()
    approximation = guide.approximation()
    assert approximation.dim == 3
    assert_same(draws(approximation.posterior()), draws(guide.get_posterior()))


@kinds
def test_what_a_guide_gives_and_takes_over_leaves_it_as_it_is(make):
    guide = make()
    before, drawn = state(guide), draws(guide.get_posterior())
    stored = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    guide.take_over(guide.approximation())
    assert_same(before, state(guide))
    assert_same(drawn, draws(guide.get_posterior()))
    now = dict(pyro.get_param_store().items())
    assert_same(stored, {name: now[name] for name in stored})


@pytest.mark.parametrize("name", KINDS)
def test_another_guide_becomes_it(name):
    guide = KINDS[name]()
    pyro.clear_param_store()
    other = AutoFlow(model, small, base={"mixture": "mixture", "student": "student_t"}.get(name, "normal"))
    other()
    other.take_over(guide.approximation())
    assert_same(draws(guide.get_posterior()), draws(other.get_posterior()))
    assert other.approximation().has_network == guide.approximation().has_network


@kinds
def test_a_copy_shares_nothing_and_what_changes_the_guide_changes_neither(make):
    guide = make()
    approximation = guide.approximation()
    twin = approximation.copy()
    owners = [guide, parts(approximation), parts(twin)]
    memory = [{tensor.data_ptr() for tensor in owner.state_dict().values() if tensor.numel()} for owner in owners]
    assert len(set.union(*memory)) == sum(map(len, memory))
    assert_same(draws(twin.posterior()), draws(approximation.posterior()))
    drawn = draws(approximation.posterior())
    with torch.no_grad():
        for param in (*guide.parameters(), *parts(twin).parameters()):
            param.add_(1.0)
        twin.affine.assign(torch.zeros(3), torch.eye(3))
    assert_same(drawn, draws(approximation.posterior()))


def test_a_copy_with_the_network_or_without_it():
    approximation = scrambled().approximation()
    assert approximation.has_network
    without = approximation.copy(has_network=False)
    assert not without.has_network
    assert without.flow is without.affine
    assert not torch.equal(draws(without.posterior())["draws"], draws(approximation.posterior())["draws"])
    assert_same(draws(without.copy(has_network=True).posterior()), draws(approximation.posterior()))


@pytest.mark.parametrize("base", ["normal", "mixture"])
def test_a_start_at_modes_is_a_new_value(base):
    locs = torch.tensor([[-4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    two = dist.MixtureOfDiagNormals(locs, torch.ones(2, 3), torch.tensor([0.3, 0.7]).log())
    guide = AutoFlow(model, ElementwiseAffine, base=base)
    guide()
    before = guide.approximation()
    drawn = draws(before.posterior())
    starts, found = start_at_modes(before, Density(two.log_prob), 8)
    assert [round(float(mode.loc[0])) for mode in starts.modes] == [4, -4]
    assert starts.shares == pytest.approx((0.7, 0.3), abs=0.02)
    assert torch.allclose(found.affine.as_matrix()[0], locs[1], atol=1e-3)
    first = float((draws(found.posterior())["draws"][:, 0] > 0).float().mean())
    assert first == 1.0 if base == "normal" else 0.0 < first < 1.0
    assert_same(drawn, draws(before.posterior()))
