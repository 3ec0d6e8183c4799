"""Recorded and compiled steps: equal to plain ones, or refused with a reason."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI, steps
from pyro_nf.inference.optim import GuardedAdam, State
from pyro_nf.inference.steps import GraphError, GraphSteps
from pyro_nf.models import eight_schools
from pyro_nf.programs.program import Randomness

pytestmark = pytest.mark.usefixtures("float64")


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=5) as index:
        pyro.sample("y", dist.Normal(x[index] @ beta, sigma), obs=y[index])


def hand_written(x, y):
    loc = pyro.param("loc", lambda: torch.zeros(2))
    scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
    pyro.sample("beta", dist.Normal(loc, scale).to_event(1))
    pyro.sample("sigma", dist.LogNormal(pyro.param("a", lambda: torch.zeros(())), 0.5))


def couplings(dim):
    return stacks.realnvp(dim, depth=2, hidden_dims=(8,))


def normal_flow(model):
    return AutoFlow(model, couplings)


def student_flow(model):
    return AutoFlow(model, couplings, base="student_t")


def fit(model, make, args, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = hand_written if make is hand_written else make(model)
    svi = FlowSVI(
        model,
        guide,
        num_particles=8,
        learning_rate=1e-2,
        max_steps=100,
        eval_every=50,
        seed=1,
        progress=False,
        **options,
    )
    result = svi.run(*args)
    return result, [value.detach().clone() for _, value in sorted(pyro.get_param_store().items())]


def case(name):
    if name == "eight schools":
        return eight_schools.noncentered, eight_schools.data()
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    return regression, (x, x @ torch.tensor([1.0, -1.0]))


GUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    normal_flow,
    student_flow,
]
CASES = [("eight schools", guide) for guide in GUIDES] + [
    ("regression", guide) for guide in (AutoNormal, normal_flow, hand_written)
]


def assert_equal_fits(one, other):
    for result, params in (one, other):
        assert result.num_skipped == 0
        assert result.steps == 100
        assert params
    torch.testing.assert_close(one[0].history, other[0].history, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one[1], other[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_recorded_is_plain(name, make, monkeypatch):
    model, args = case(name)
    monkeypatch.setattr(GraphSteps, "compile", lambda self, num_steps: None)
    plain, recorded = fit(model, make, args, compile=False), fit(model, make, args, compile=True)
    assert plain[0].execution == "plain"
    assert_equal_fits(plain, recorded)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), CASES)
def test_compiled_is_plain(name, make):
    model, args = case(name)
    plain, compiled = fit(model, make, args, compile=False), fit(model, make, args, compile=True)
    assert compiled[0].execution == "compiled"
    assert_equal_fits(plain, compiled)


def test_a_model_that_depends_on_values_runs_plain_and_says_so():
    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if pyro.param("p", lambda: torch.tensor(1.0)) > 0:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    guide = AutoNormal(branching)
    with pytest.warns(UserWarning, match="the step runs plain, not compiled: .*"):
        result = FlowSVI(branching, guide, max_steps=10, progress=False, compile=True).run()
    assert result.execution == "plain"


def test_a_model_that_cannot_be_batched_runs_plain_and_says_so():
    def counting():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.item() + z, 1.0), obs=torch.tensor(0.5))

    svi = FlowSVI(counting, AutoNormal(counting), num_particles=4, max_steps=10, progress=False, compile=True)
    with (
        pytest.warns(UserWarning, match="the model cannot be batched over draws and runs them one by one"),
        pytest.warns(UserWarning, match="the step runs plain, not compiled"),
    ):
        assert svi.run().execution == "plain"


def test_a_graph_that_differs_is_refused():
    param = torch.zeros(3, requires_grad=True)
    state = State.start(param.detach().clone())
    calls = []

    def step(state, learning_rate, draws, leaves):
        calls.append(0)
        loss = (param - len(calls)).square().sum()  # each call another: the graph has the first one's
        (grad,) = torch.autograd.grad(loss, param)
        return GuardedAdam().update(state, loss.detach(), grad, learning_rate), loss.detach()

    steps = GraphSteps(step, [param], state, Randomness(torch.zeros(1, 0), {}), ())
    with pytest.raises(GraphError, match="the graph's results differ from the plain step's"):
        steps.verify()
    assert not param.any()


def test_a_graph_that_torchscript_does_not_take_runs_as_it_is(monkeypatch):
    options = {"learning_rate": 0.01, "max_steps": 300, "seed": 0, "num_particles": 4, "progress": False}

    def fit():
        model, args = case("regression")
        pyro.clear_param_store()
        return FlowSVI(model, AutoNormal(model), **options).run(*args)

    scripted = fit()

    def refuse(*args, **kwargs):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    plain = fit()
    assert scripted.execution == plain.execution == "recorded"
    torch.testing.assert_close(scripted.history, plain.history)


def test_without_a_compiler_the_graph_runs_as_recorded(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(steps, "compile_graph", refuse)
    guide = AutoNormal(eight_schools.noncentered)
    with pytest.warns(
        UserWarning, match="the step runs recorded, not compiled: RuntimeError: no C\\+\\+ compiler .the compiler needs"
    ):
        result = FlowSVI(eight_schools.noncentered, guide, max_steps=20, progress=False, compile=True).run(
            *eight_schools.data()
        )
    assert result.execution == "recorded"


def test_steps_that_come_one_by_one_are_compiled_one_by_one(monkeypatch):
    asked = []
    monkeypatch.setattr(GraphSteps, "compile", lambda self, num_steps: asked.append(num_steps))
    model, args = case("regression")
    options = {"learning_rate": 0.01, "max_steps": 10, "progress": False, "compile": True, "num_particles": 4}
    FlowSVI(model, AutoNormal(model), eval_every=5, **options).run_batches([args])
    FlowSVI(model, AutoNormal(model), eval_every=5, **options).run(*args)
    assert asked == [1, 5]


def test_auto_records_only_where_it_pays():
    guide = AutoNormal(eight_schools.noncentered)
    svi = FlowSVI(eight_schools.noncentered, guide, max_steps=20, progress=False, compile="auto")
    assert svi.run(*eight_schools.data()).execution == "plain"


def test_compile_is_one_of_three():
    with pytest.raises(ValueError, match="compile must be True, False or 'auto'; got 'yes'"):
        FlowSVI(eight_schools.noncentered, AutoNormal(eight_schools.noncentered), compile="yes")
