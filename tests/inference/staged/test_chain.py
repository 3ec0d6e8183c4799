"""A chain of stages: the best is kept, whatever a stage does or whoever ends it."""

import dataclasses
import math

import pytest
import torch

from example_models import Y, banana, normal_mean
from pyro_nf.approximations.modes import Starts
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI, Status
from pyro_nf.inference.staged import Approximation, Fitted, Normal, Plan, Steps, Tails, TransportMap
from pyro_nf.inference.staged.fit import fit_in_stages
from pyro_nf.inference.watch import Watch


@dataclasses.dataclass
class Doing:
    """A stage that does something to a copy of what is known so far, in three steps of no optimizer."""

    name: str
    do: object = lambda approximation: approximation
    max_gap: float = 0.001
    starts: Starts | None = None

    def num_points(self, num_particles):
        return 0

    def applies(self, so_far):
        return True

    def fit(self, problem, so_far):
        found = so_far.copy()
        return Fitted(self.do(found) or found, torch.zeros(3), starts=self.starts)


@dataclasses.dataclass(frozen=True)
class Spoiled(Steps):
    """Steps of an optimizer, after which the location is moved by a number."""

    by: float = 10.0

    def fit(self, problem, so_far):
        fitted = super().fit(problem, so_far)
        move(self.by)(fitted.approximation)
        return fitted


def move(by):
    """Move an approximation's location by a number."""

    def do(approximation):
        loc, scale_tril = approximation.affine.as_matrix()
        approximation.affine.assign(loc + by, scale_tril)

    return do


def interrupt(*args):
    raise KeyboardInterrupt


def refuse(*args):
    raise ValueError("no")


def run(plan, guide, *args, watch=None, **options):
    svi = FlowSVI(guide.given_model, guide, seed=0, progress=False, **options)
    return fit_in_stages(svi.program.bind(*args), guide, svi.options, Watch() if watch is None else watch, plan)


def affine_flow(model):
    return AutoFlow(model, ElementwiseAffine)


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def kept(result):
    return [(stage.name, stage.kept) for stage in result.stages]


FEW = ("flow", 0.01, 50, 25)


# --- what is better is kept


def test_each_stage_begins_from_the_best_so_far_and_the_guide_becomes_it():
    seen = []

    def right(approximation):
        seen.append(float(approximation.affine.as_matrix()[0]))
        approximation.affine.assign(torch.full((1,), 9 / 5.04), torch.full((1, 1), 5.04**-0.5))

    guide = affine_flow(normal_mean)
    stages = {"nearer": move(1.0), "away": move(30.0), "right": right, "not begun": refuse}
    result = run(Plan(tuple(Doing(*stage) for stage in stages.items())), guide, Y)
    assert kept(result) == [("nearer", True), ("away", False), ("right", True)]
    assert result.status is Status.CONVERGED
    assert result.steps == len(result.history) == 9
    assert result.best_step == 9
    assert result.stages[-1].gap < 1e-5
    draws = guide.sample_posterior(20_000, Y)["mu"]
    assert float(draws.mean()) == pytest.approx(9 / 5.04, abs=0.02)
    assert seen == [1.0]


def test_a_stage_that_does_not_apply_is_left_out_and_one_that_finds_nothing_is_no_stage():
    stage, nothing = Doing("not applied", refuse), Doing("nothing")
    stage.applies = lambda so_far: False
    nothing.fit = lambda problem, so_far: None
    result = run(Plan((stage, nothing, Doing("last"))), affine_flow(normal_mean), Y)
    assert [stage.name for stage in result.stages] == ["last"]
    guide = affine_flow(normal_mean)
    guide(Y)
    before = state(guide)
    result = run(Plan((stage, nothing)), guide, Y)
    assert kept(result) == [("start", True)]
    assert math.isfinite(result.elbo)
    assert same(before, state(guide))


def test_a_stage_that_is_worse_is_taken_back():
    guide = affine_flow(banana)
    result = run(Plan((Normal(), Spoiled(*FEW), Spoiled(*FEW))), guide)
    assert kept(result) == [("normal", True), ("flow", False), ("flow", False)]
    assert result.elbo == result.stages[0].elbo
    assert result.best_step <= 40
    assert result.steps == result.stages[0].steps + 100
    alone = affine_flow(banana)
    run(Plan((Normal(),)), alone)
    assert same(state(alone), state(guide))
    assert float(guide.sample_posterior(1000)["x"].mean().abs()) < 1.0


def test_a_stage_that_ends_in_nan_loses_nothing():
    guide = affine_flow(banana)
    spoiled = Spoiled(*FEW, by=math.nan)
    result = run(Plan((Normal(), spoiled, spoiled)), guide)
    assert [stage.kept for stage in result.stages] == [True, False, False]
    assert result.stages[2].elbo == -math.inf
    assert math.isfinite(result.elbo)
    assert all(bool(value.isfinite().all()) for value in guide.sample_posterior(100).values())


@pytest.mark.parametrize("by", [30.0, math.nan])
@pytest.mark.parametrize("starts", [None, Starts((), (), -9.24, 8)], ids=["as it is", "measured"])
def test_a_first_stage_that_is_worse_than_the_start_is_put_back(by, starts):
    guide = AutoFlow(normal_mean, ElementwiseAffine, init_loc_fn=lambda site: torch.tensor(1.8), init_scale=0.45)
    guide(Y)
    before = state(guide)
    result = run(Plan((Doing("normal", move(by), starts=starts),)), guide, Y)
    assert kept(result) == [("normal", False)]
    assert same(before, state(guide))
    assert result.elbo == pytest.approx(-9.24, abs=0.02)


def test_a_wider_part_is_added_to_the_best_and_not_where_there_is_none():
    guide = affine_flow(banana)
    result = run(Plan((Normal(), Doing("away", move(10.0))), finish=(Tails(),)), guide)
    assert [name for name, _ in kept(result)][:2] == ["normal", "away"]
    if len(result.stages) == 3:  # it helps
        assert result.stages[2].name == "tails"
        assert result.stages[2].khat < result.stages[0].khat
    assert bool(guide.base.defended) == (len(result.stages) == 3)


# --- where it ends


def test_stages_take_no_more_than_max_steps_together():
    first = run(Plan((Normal(),)), affine_flow(banana)).steps
    plan = Plan((Normal(), Steps("one", 0.01, 60, 20), Steps("two", 0.01, 60, 20), Doing("not begun", refuse)))
    result = run(plan, affine_flow(banana), max_steps=first + 100)
    assert [stage.steps for stage in result.stages] == [first, 60, 40]
    assert result.steps == first + 100
    assert result.status is Status.PLATEAU_NOT_REACHED
    assert result.stop_reason == f"not converged: the ELBO reached no plateau within max_steps={first + 100}"


def test_the_reason_names_the_steps_of_the_stages_where_these_are_fewer():
    plan = Plan((Normal(), TransportMap(), Steps("flow", 0.001, 60, 30), Steps("flow, longer", 0.001, 60, 30)))
    result = run(plan, affine_flow(banana), max_steps=3000)
    assert not result.converged
    assert result.stop_reason == "not converged: the ELBO reached no plateau within the 190 steps of its stages"


def test_a_fit_that_raises_leaves_the_guide_whole():
    guide = AutoFlow(banana)
    guide()
    before = state(guide)
    with pytest.raises(ValueError, match="no") as caught:
        run(Plan((Doing("raising", refuse),)), guide)
    assert guide.get_posterior().flow is guide.flow  # while the traceback still holds the frames
    assert same(before, state(guide))
    del caught
    with pytest.raises(ValueError, match="no"):
        run(Plan((Normal(), Doing("raising", refuse))), guide)
    assert guide.get_posterior().flow is guide.flow
    assert not same(before, state(guide))  # it has the normal
    assert bool(torch.isfinite(guide.sample_posterior(10)["x"]).all())


class Ending(Watch):
    """A watch whose time is over once a callback was called."""

    left = 1e9

    @property
    def seconds_left(self):
        return self.left

    def ask(self, evaluation):
        Ending.left = 1e-6
        return super().ask(evaluation)


def test_a_stage_without_enough_time_is_not_begun(monkeypatch):
    monkeypatch.setattr(Ending, "left", 1e9)
    late = Doing("late", refuse)
    late.num_points = lambda num_particles: 10_000
    result = run(Plan((Normal(), late)), affine_flow(banana), watch=Ending(max_seconds=5.0))
    assert [stage.name for stage in result.stages] == ["normal"]
    assert result.status is Status.TIME
    assert "max_seconds=5.0 left none for more" in result.stop_reason


class Unmeasurable(Approximation):
    """One that is interrupted while it is measured."""

    def posterior(self):
        raise KeyboardInterrupt


def unmeasurable(approximation):
    return Unmeasurable(approximation.base, approximation.network, approximation.affine, approximation.has_network)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("do", [interrupt, unmeasurable], ids=["fit", "measurement"])
def test_an_interrupt_in_any_part_of_a_stage_leaves_the_best(number, do):
    guide = affine_flow(banana)
    guide()
    before = state(guide)
    plan = Plan((*[Normal()] * number, Doing("interrupted", do), Doing("not begun", refuse)), finish=(Tails(),))
    result = run(plan, guide)
    assert result.status is Status.INTERRUPTED
    assert result.stop_reason.startswith("interrupted after step")
    assert [stage.name for stage in result.stages] == (["normal"] if number else ["start"])
    assert same(before, state(guide)) == (not number)
    assert bool(torch.isfinite(guide.sample_posterior(10)["x"]).all())
    assert result.elbo > -10


def test_an_interrupt_in_steps_that_have_moved_the_guide_leaves_the_best():
    guide = affine_flow(banana)

    def half_done(evaluation):
        if evaluation.step > 60:  # the first block of the steps
            with torch.no_grad():
                guide.affine.affine.params.loc.fill_(math.nan)
            raise KeyboardInterrupt

    plan = Plan((Normal(), Steps(*FEW), Doing("not begun", refuse)), finish=(Tails(),))
    result = run(plan, guide, watch=Watch([half_done]))
    assert result.status is Status.INTERRUPTED
    assert [stage.name for stage in result.stages][:1] == ["normal"]
    assert bool(torch.isfinite(guide.sample_posterior(10)["x"]).all())
    assert result.elbo > -10


def test_an_interrupt_in_the_last_stage_keeps_what_was_there():
    guide = affine_flow(normal_mean)
    result = run(Plan((Normal(),), finish=(Doing("interrupted", interrupt),)), guide, Y)
    assert [stage.name for stage in result.stages] == ["normal"]
    assert float(guide.sample_posterior(2000, Y)["mu"].mean()) == pytest.approx(9 / 5.04, abs=0.05)
