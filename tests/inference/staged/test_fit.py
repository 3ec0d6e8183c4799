"""Fits by the default plan: what needs no flow gets none, units do not matter; and which fits have no stages."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from example_models import Y, banana, normal_mean, skewed_regression
from pyro_nf.diagnostics import diagnose
from pyro_nf.flows import ElementwiseAffine, stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.staged import DEFAULT


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"learning_rate": 0.1}, "a learning_rate"),
        ({"objective": ELBO()}, "an objective"),
        ({"max_steps": 100}, "max_steps below 3,000"),
    ],
)
def test_a_plan_goes_with_nothing_that_makes_a_single_stage(options, what):
    with pytest.raises(ValueError, match=f"plan must be None with {what}"):
        FlowSVI(banana, AutoFlow(banana), plan=DEFAULT, **options)


def normal(loc=1e3, scale=1e-3):
    cov = scale**2 * torch.tensor([[1.0, 0.99], [0.99, 1.0]]).double()
    pyro.sample("z", dist.MultivariateNormal(torch.full((2,), loc).double(), cov))


def test_a_normal_posterior_of_any_unit_needs_no_flow():
    guide = AutoFlow(normal)
    result = FlowSVI(normal, guide, seed=0, progress=False).run()
    assert [stage.name for stage in result.stages] == ["normal"]
    assert result.stages[0].kept
    assert result.elbo == pytest.approx(0.0, abs=0.002)
    assert result.converged
    assert "divergence" in result.stop_reason
    assert result.steps == result.stages[0].steps == len(result.history) <= 40
    draws = guide.sample_posterior(50_000)["z"]
    assert torch.allclose(draws.mean(0), torch.tensor(1e3).double(), atol=2e-5, rtol=0)
    assert torch.allclose(draws.std(0), torch.tensor(1e-3).double(), rtol=0.02)


def test_a_skewed_posterior_gets_a_transport_map():
    guide = AutoFlow(skewed_regression)
    result = FlowSVI(skewed_regression, guide, seed=0, progress=False).run()
    first, second = result.stages[:2]
    assert (first.name, second.name) == ("normal", "map")
    assert second.kept
    assert first.gap > 0.01
    assert second.gap < 0.003
    assert "flow" not in [stage.name for stage in result.stages]
    assert result.converged
    assert diagnose(skewed_regression, guide).elbo == pytest.approx(result.elbo, abs=0.01)


@pytest.mark.slow  # some 6,000 steps of a flow
def test_a_bent_posterior_gets_a_flow():
    guide = AutoFlow(banana)
    result = FlowSVI(banana, guide, seed=0, progress=False).run()
    first, second, flow = result.stages[:3]
    assert (first.name, second.name, flow.name) == ("normal", "map", "flow")
    assert first.gap > 0.1
    assert flow.gap < 0.02
    assert flow.ess_fraction > 0.95
    assert result.elbo == pytest.approx(0.0, abs=0.02)
    assert result.steps == sum(stage.steps for stage in result.stages)
    assert result.evaluations[-1].step == result.steps


# What ends a fit by steps soon; a first stage is begun in any case.
SHORT = {"max_seconds": 0.1, "num_particles": 4, "eval_particles": 10, "compile": False, "progress": False, "seed": 0}


@pytest.mark.parametrize(
    "options",
    [{}, {"learning_rate": 0.01}, {"objective": ELBO()}, {"max_steps": 100}, {"checkpoint": "fit.pt"}],
    ids=["default", "rate", "objective", "steps", "checkpoint"],
)
def test_whoever_asks_for_something_else_gets_a_single_stage(options, tmp_path):
    if "checkpoint" in options:
        options = {"checkpoint": tmp_path / options["checkpoint"]}
    result = FlowSVI(normal_mean, AutoFlow(normal_mean), **options, **SHORT).run(Y)
    assert [stage.name for stage in result.stages] == ([] if options else ["normal"])


def test_other_guides_minibatches_and_a_fitted_flow_are_a_single_stage():
    y = torch.randn(100)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    fitted = AutoFlow(normal_mean, partial(ElementwiseAffine, loc=0.1))
    for own, guide in ((model, AutoFlow(model)), (normal_mean, AutoNormal(normal_mean)), (normal_mean, fitted)):
        assert FlowSVI(own, guide, **SHORT).run().stages == ()


def test_a_callback_ends_all_stages_and_the_same_seed_gives_the_same():
    guides = [AutoFlow(banana, partial(stacks.realnvp, depth=2, hidden_dims=(8,))) for _ in range(2)]
    stop = [lambda evaluation: evaluation.step > 70]  # the first block of the flow's
    results = [FlowSVI(banana, guide, callbacks=stop, seed=3, progress=False).run() for guide in guides]
    assert [stage.name for stage in results[0].stages] == ["normal", "map", "flow"]
    assert [evaluation.step for evaluation in results[0].evaluations] == [40, 70, 70, 170]
    assert "callback" in results[0].stop_reason
    assert results[0].elbo == results[1].elbo
    states = [guide.state_dict() for guide in guides]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # networks not yet fitted included


def test_heavy_tails_get_a_wider_part():
    def heavy():
        pyro.sample("x", dist.StudentT(torch.tensor(20.0).double()))

    before, tails = FlowSVI(heavy, AutoFlow(heavy, ElementwiseAffine), seed=0, progress=False).run().stages[-2:]
    assert tails.name == "tails"
    assert tails.khat < before.khat
