"""Fits in stages: what needs no flow gets none, units do not matter, and no stage makes the posterior worse."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import diagnose
from pyro_nf.diagnostics.weights import summarize
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI, stages
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.staged.chain import fit_in_stages
from pyro_nf.programs.program import Program


def normal(loc=1e3, scale=1e-3):
    cov = scale**2 * torch.tensor([[1.0, 0.99], [0.99, 1.0]]).double()
    pyro.sample("z", dist.MultivariateNormal(torch.full((2,), loc).double(), cov))


def regression():
    x = torch.linspace(-1, 1, 20).double()
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()).double(), 10.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros(()).double(), 2.0))
    pyro.sample("y", dist.Normal(slope * x, sigma).to_event(1), obs=2 * x + 0.5 * (9 * x).sin())


def banana():
    x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


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


def test_a_skewed_posterior_gets_a_curve():
    guide = AutoFlow(regression)
    result = FlowSVI(regression, guide, seed=0, progress=False).run()
    normal, curve = result.stages[:2]
    assert (normal.name, curve.name) == ("normal", "curve")
    assert curve.kept
    assert normal.gap > 0.01
    assert curve.gap < 0.003
    assert "flow" not in [stage.name for stage in result.stages]
    assert result.converged
    assert diagnose(regression, guide).elbo == pytest.approx(result.elbo, abs=0.01)


@pytest.mark.slow
def test_a_bent_posterior_gets_a_flow():
    guide = AutoFlow(banana)
    result = FlowSVI(banana, guide, seed=0, progress=False).run()
    normal, curve, flow = result.stages[:3]
    assert (normal.name, curve.name, flow.name) == ("normal", "curve", "flow")
    assert normal.gap > 0.1
    assert flow.gap < 0.02
    assert flow.ess_fraction > 0.95
    assert result.elbo == pytest.approx(0.0, abs=0.02)
    assert result.steps == sum(stage.steps for stage in result.stages)
    assert result.evaluations[-1].step == result.steps
    assert list(guide.stages()) == []  # a fitted guide goes on as it is


def test_a_stage_that_is_worse_is_taken_back():
    guide = AutoFlow(banana)
    guide()

    fit = a_fit(guide, lambda number, loc: number and loc.add_(10.0))
    result = fit_in_stages(fit, Program(banana, guide), guide.density(), 2, 10_000, (), {})
    kept = [stage.kept for stage in result.stages]
    assert kept[0]
    assert kept[2:] == [False, False]
    assert result.elbo == result.stages[int(kept[1])].elbo
    assert result.best_step <= 100
    assert float(guide.sample_posterior(1000)["x"].mean().abs()) < 1.0


def a_fit(guide, spoil):
    """A short fit in place of a stage, and then whatever `spoil` does to the guide."""

    def fit(plan):
        result = FlowSVI(banana, guide, learning_rate=0.01, max_steps=50, seed=0, progress=False).run()
        with torch.no_grad():
            spoil(plan.number, guide.flow.flows[-1].affine.params.loc)
        return result

    return fit


def test_a_stage_that_ends_in_nan_loses_nothing():
    guide = AutoFlow(banana)
    guide()
    fit = a_fit(guide, lambda number, loc: number and loc.fill_(float("nan")))
    result = fit_in_stages(fit, Program(banana, guide), guide.density(), 2, 10_000, (), {})
    assert [stage.kept for stage in result.stages][2:] == [False, False]
    assert result.stages[2].elbo == -float("inf")
    assert all(bool(value.isfinite().all()) for value in guide.sample_posterior(100).values())


def test_a_fit_that_raises_leaves_the_guide_whole():
    guide = AutoFlow(banana)
    guide()

    def fit(*args):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        fit_in_stages(fit, Program(banana, guide), guide.density(), 2, 10_000, (), {})
    assert guide.get_posterior().flow is guide.flow  # while the traceback still holds the frames
    del caught


def test_stages_take_no_more_than_max_steps_together():
    guide = AutoFlow(banana)
    guide()
    asked = []

    def fit(plan):
        asked.append(plan.max_steps)
        return FlowSVI(banana, guide, learning_rate=0.01, max_steps=min(plan.max_steps, 60), progress=False).run()

    result = fit_in_stages(fit, Program(banana, guide), guide.density(), 2, 170, (), {})
    assert asked == [100, 40]
    assert result.steps == 170


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.01}, {"objective": ELBO()}, {"max_steps": 100}, {"checkpoint": "fit.pt"}],
    ids=["rate", "objective", "steps", "checkpoint"],
)
def test_whoever_asks_for_something_else_gets_a_single_stage(options):
    assert FlowSVI(banana, AutoFlow(banana), **options, progress=False)._in_stages((), {}) is None


def test_other_guides_and_minibatches_are_a_single_stage():
    y = torch.randn(100)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    assert FlowSVI(model, AutoFlow(model))._in_stages((), {}) is None
    assert FlowSVI(banana, AutoNormal(banana))._in_stages((), {}) is None


def test_a_callback_ends_all_stages_and_the_same_seed_gives_the_same():
    guides = [AutoFlow(banana), AutoFlow(banana)]
    stop = [lambda evaluation: evaluation.step > 70]  # the first block of the flow's
    results = [FlowSVI(banana, guide, callbacks=stop, seed=3, progress=False).run() for guide in guides]
    assert [stage.name for stage in results[0].stages] == ["normal", "curve", "flow"]
    assert [evaluation.step for evaluation in results[0].evaluations] == [40, 70, 70, 170]
    assert "callback" in results[0].stop_reason
    assert results[0].elbo == results[1].elbo
    states = [guide.state_dict() for guide in guides]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # networks not yet fitted included


def weights(log_w):
    return summarize(log_w.double().numpy()[None])


def test_small_differences_are_told_by_gaps_and_large_ones_by_elbos():
    torch.manual_seed(0)
    noise = torch.randn(5000)
    exact, rough = weights(0.01 * noise - 0.002), weights(0.1 * noise.flip(0))
    assert rough.elbo > exact.elbo  # by chance alone
    assert stages._is_better(exact, rough)
    assert not stages._is_better(rough, exact)
    # One of two modes, exactly: no gap in sight. Both, roughly: a higher ELBO.
    one, both = weights(0.001 * noise - 0.7), weights(0.3 * noise)
    assert one.log_evidence - one.elbo < both.log_evidence - both.elbo
    assert stages._is_better(both, one)
    assert not stages._is_better(None, one)
    assert stages._is_better(one, None)


@pytest.mark.parametrize("fails", [False, True])
def test_heavy_tails_get_a_wider_share_also_where_draws_without_it_have_no_weight(monkeypatch, fails):
    def heavy():
        pyro.sample("x", dist.StudentT(torch.tensor(20.0).double()))

    measure, num_tails = stages._measure, 0

    def measured(*args, num_sets=1, known=None):
        nonlocal num_tails
        found, known = measure(*args, num_sets=num_sets, known=known)
        num_tails += num_sets > 1
        return (None if fails and num_tails == 1 else found), known

    monkeypatch.setattr(stages, "_measure", measured)
    before, tails = FlowSVI(heavy, AutoFlow(heavy), seed=0, progress=False).run().stages[-2:]
    assert tails.name == "tails"
    assert tails.khat < before.khat
