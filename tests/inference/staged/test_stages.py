"""Each stage alone, on a density: where it applies, what it makes of an approximation, and what it leaves as it was."""

import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.distributions.bases import NormalBase, StudentTBase
from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.flows import ElementwiseAffine, Paced, WhitenedAffine, stacks
from pyro_nf.inference.staged import (
    DEFAULT,
    Approximation,
    Normal,
    Plan,
    Problem,
    StepPlan,
    Steps,
    Tails,
    TransportMap,
)
from pyro_nf.inference.staged.measure import gap, measure
from pyro_nf.interface.waits import silent

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def seeded(float64):
    torch.manual_seed(0)


def start(dim=2, base=NormalBase):
    network = Paced(stacks.realnvp(dim, depth=2, hidden_dims=(4,)))
    return Approximation(base(dim), network, WhitenedAffine(dim, scale=0.1), has_network=False)


def no_training(*args):
    raise AssertionError("this stage has no optimizer")


def problem(log_density, train=no_training, report=silent):
    return Problem(Density(log_density), train, 4, report)


def figures(approximation):
    """Draws and their densities, which are those of an approximation that nobody has changed."""
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([part.flatten() for part in approximation.posterior().rsample_and_log_prob((50,))])


COV = torch.tensor([[1.0, 0.9], [0.9, 2.0]], dtype=torch.float64)


def correlated(x):
    return dist.MultivariateNormal(torch.tensor([3.0, -2.0], dtype=torch.float64), COV).log_prob(x)


def bend(z):
    x, y = z
    return -0.5 * (x**2 + ((y - 0.2 * x**2) / 2) ** 2) - math.log(4 * math.pi)


# --- the normal


def test_the_normal_finds_a_normal_and_leaves_what_it_was_given():
    before = start()
    seen = figures(before)
    fitted = Normal().fit(problem(correlated), before)
    loc, scale_tril = fitted.approximation.affine.as_matrix()
    assert torch.allclose(loc, torch.tensor([3.0, -2.0]), atol=1e-3)
    assert torch.allclose(scale_tril @ scale_tril.mT, COV, rtol=1e-3)
    assert fitted.steps is None
    assert fitted.starts.modes
    assert float(fitted.history[-1]) == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(figures(before), seen)
    assert Normal().applies(before)
    assert not fitted.approximation.has_network


def test_the_normal_puts_a_mixture_on_its_modes():
    locs = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    two = dist.MixtureOfDiagNormals(locs, torch.ones(2, 2), torch.tensor([0.3, 0.7]).log())
    fitted = Normal().fit(problem(two.log_prob), start(base=MixtureBase))
    assert len(fitted.starts.modes) == 2
    draws = fitted.approximation.posterior().sample((5000,))
    assert float((draws[:, 0] > 0).double().mean()) == pytest.approx(0.7, abs=0.03)


def test_a_report_ends_the_normal_where_it_is():
    told = []

    def three(what, done, total, elbo):
        told.append(what)
        return told.count("natural gradients") < 3

    fitted = Normal().fit(problem(bend, report=three), start())
    assert len(fitted.history) == 3
    assert set(told) > {"natural gradients"}  # it has told of the search for modes too


# --- the map


def test_the_map_makes_a_normal_better_and_leaves_it_as_it_was():
    task = problem(bend)
    normal = Normal().fit(task, start()).approximation
    seen = figures(normal)
    assert TransportMap().applies(normal)
    found = TransportMap().fit(task, normal).approximation
    assert found.affine.mapped
    assert not normal.affine.mapped
    gaps = [gap(measure(task.density, each.posterior())[0]) for each in (normal, found)]
    assert gaps[0] > 0.008
    assert gaps[1] < 0.001
    assert torch.equal(figures(normal), seen)


def test_the_map_does_not_apply_to_a_base_that_has_parameters_or_where_there_is_none():
    assert not TransportMap().applies(start(base=MixtureBase))
    assert not TransportMap().applies(start(base=StudentTBase))
    assert not TransportMap().applies(start(dim=101))
    many = Approximation(NormalBase(3), ElementwiseAffine(3), ElementwiseAffine(3), has_network=False)
    assert not TransportMap().applies(many)


# --- steps of an optimizer


class Train:
    """Moves an approximation in place of an optimizer, and notes what it was asked for."""

    account = SimpleNamespace(history=torch.arange(3.0))

    def __call__(self, approximation, plan):
        self.given, self.plan = approximation, plan
        self.seen = figures(approximation)
        found = approximation.copy()
        with torch.no_grad():
            found.affine.affine.params.loc.add_(1.0)
        return found, self.account


def test_steps_ask_for_what_their_plan_says_and_return_what_comes_of_it():
    train, before = Train(), start()
    seen = figures(before)
    fitted = Steps("mine", 0.02, 300, 30, has_network=False, graph="own").fit(problem(bend, train), before)
    assert train.plan == StepPlan("mine", 0.02, 300, 30, "own")
    assert not train.given.has_network
    assert torch.equal(train.seen, seen)
    assert fitted.steps is Train.account
    assert torch.equal(fitted.history, Train.account.history)
    assert torch.allclose(fitted.approximation.affine.as_matrix()[0], torch.ones(2))
    assert torch.equal(figures(before), seen)


def test_steps_of_a_flow_have_a_network_and_may_whiten_first():
    task = problem(bend, train := Train())
    mapped = TransportMap().fit(task, Normal().fit(task, start()).approximation).approximation
    loc, scale_tril = mapped.affine.as_matrix()
    Steps("flow", 0.006, 100, 10).fit(task, mapped)
    assert train.given.has_network
    assert train.given.affine.mapped
    assert torch.equal(train.seen, figures(mapped))  # the network is the identity
    Steps("flow", 0.006, 100, 10, whitens=True).fit(task, mapped)
    assert not train.given.affine.mapped
    assert torch.allclose(train.given.affine.origin, loc)
    assert torch.allclose(train.given.affine.scale, scale_tril)
    assert mapped.affine.mapped


def test_steps_without_a_network_are_for_a_base_with_parameters():
    affine = Steps("affine", 0.03, 400, 50, has_network=False)
    assert not affine.applies(start())
    assert affine.applies(start(base=StudentTBase))
    assert Steps("flow", 0.006, 100, 10).applies(start())


# --- tails


def heavy(x):
    return dist.StudentT(torch.tensor(20.0)).log_prob(x).sum()


def test_tails_widen_a_part_of_a_normal_where_the_posterior_has_heavy_ones():
    normal = Normal().fit(problem(heavy), start(1)).approximation
    seen = figures(normal)
    assert Tails().applies(normal)
    fitted = Tails().fit(problem(heavy), normal)
    assert 0 < float(fitted.approximation.base.defensive_weight) <= 0.1
    assert fitted.approximation.base.defended
    torch.manual_seed(2)
    before, _ = measure(Density(heavy), normal.posterior(), num_sets=3)
    assert fitted.weights.khat < before.khat - 0.1
    assert fitted.weights.elbo > before.elbo - 0.01
    assert not normal.base.defended
    assert torch.equal(figures(normal), seen)


def test_tails_find_nothing_where_they_are_light_and_do_not_apply_to_other_bases():
    def light(x):
        return -0.5 * x.square().sum()

    normal = Normal().fit(problem(light), start(1)).approximation
    assert Tails().fit(problem(light), normal) is None
    assert not Tails().applies(start(base=StudentTBase))
    assert not Tails().applies(start(base=MixtureBase))


def test_tails_find_nothing_where_draws_have_no_density():
    def cut_off(x):
        return heavy(x) + torch.where(x[0] > -1.0, 0.0, -math.inf)

    normal = Normal().fit(problem(heavy), start(1)).approximation
    assert Tails().fit(problem(cut_off), normal) is None
    assert Tails().fit(problem(lambda x: heavy(x) - math.inf), normal) is None


# --- the plan


def test_stages_say_what_they_cost_and_the_plan_is_of_them():
    stages = (*DEFAULT.stages, *DEFAULT.finish)
    assert all(stage.num_points(256) > 0 for stage in stages)
    assert [stage.name for stage in stages] == ["normal", "map", "affine", "flow", "flow, longer", "tails"]
    assert Steps("flow", 0.006, 2000, 100).num_points(256) == 25_600
    with pytest.raises(ValueError, match="stages must hold at least one stage"):
        Plan(())
    with pytest.raises(ValueError, match=r"stages must be a tuple of stages, .*; got 'normal'"):
        Plan("normal")
    with pytest.raises(ValueError, match="finish must be a tuple of stages"):
        Plan((Normal(),), (3,))
