import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.result import Evaluation
from pyro_nf.inference.schedule import PlateauSchedule

X = torch.linspace(-1, 1, 20)
Y = 0.5 + 2.0 * X


def linear_gaussian(x, y):
    """y ~ N(a + b x, 1), a, b ~ N(0, 2^2): the evidence is a normal density."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def log_evidence(x, y):
    design = torch.stack([torch.ones_like(x), x], -1)
    cov = torch.eye(len(x)) + 4.0 * design @ design.T
    return float(dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(y))


@pytest.mark.parametrize("guide_class", [AutoFlow, AutoMultivariateNormal])
def test_it_finds_the_evidence_and_stops_by_itself(guide_class):
    guide = guide_class(linear_gaussian)
    result = FlowSVI(linear_gaussian, guide, seed=0, progress=False).run(X, Y)
    assert abs(result.elbo - log_evidence(X, Y)) < 0.02
    assert result.converged
    assert ("divergence" if guide_class is AutoFlow else "plateau") in result.stop_reason
    assert result.steps < 10_000
    assert result.num_skipped == 0
    assert result.history.shape == (result.steps,)
    assert "ELBO" in str(result)


def test_a_mean_field_guide_ends_at_its_own_optimum():
    result = FlowSVI(linear_gaussian, AutoNormal(linear_gaussian), seed=0, progress=False).run(X, Y)
    # a and b are orthogonal in this design, so that the posterior factorises.
    assert abs(result.elbo - log_evidence(X, Y)) < 0.02


def test_runs_with_one_seed_are_equal_bit_for_bit_and_leave_the_global_state():
    results = []
    for _ in range(2):
        pyro.clear_param_store()
        state = torch.get_rng_state()
        guide = AutoFlow(linear_gaussian)
        results.append(
            FlowSVI(linear_gaussian, guide, seed=5, progress=False, max_steps=60, learning_rate=0.01).run(X, Y)
        )
        assert torch.equal(torch.get_rng_state(), state)
        torch.randn(3)
    assert torch.equal(results[0].history, results[1].history)
    assert results[0].elbo == results[1].elbo


def test_max_steps_is_said_not_to_be_convergence():
    result = FlowSVI(
        linear_gaussian, AutoFlow(linear_gaussian), seed=0, progress=False, max_steps=30, learning_rate=0.01
    ).run(X, Y)
    assert not result.converged
    assert "max_steps=30" in result.stop_reason
    assert result.steps == 30


def test_hand_written_guide_and_model_parameters_are_fitted():
    def model():
        scale = pyro.param("scale", torch.tensor(5.0), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, scale).expand((50,)).to_event(1), obs=torch.full((50,), 2.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(loc, 1.0))

    FlowSVI(model, guide, seed=0, progress=False, learning_rate=0.05, max_steps=500).run()
    assert math.isclose(float(pyro.param("scale").detach()), 2.0, rel_tol=0.02)
    assert abs(float(pyro.param("loc").detach())) < 0.01


def test_draws_without_a_density_are_left_out_of_steps_and_named():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        # Infinite wherever a draw falls below -2.4: some of the steps, and never the optimum's centre.
        pyro.factor("wall", torch.where(z > -2.4, 0.0, -math.inf))

    result = FlowSVI(model, AutoNormal(model), seed=0, progress=False, num_particles=16, max_steps=400).run()
    assert result.num_skipped == 0
    assert bool(result.history.isfinite().all())
    assert not result.converged
    assert "draws have no density: site 'wall': its density is not finite in" in result.stop_reason


def test_steps_with_a_gradient_that_is_not_finite_are_skipped_counted_and_harmless():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        # Its value is 0 everywhere, its gradient is NaN wherever a draw falls below -1.5.
        inside = torch.where(z > -1.5, 1.0, 0.0)
        pyro.factor("wall", (inside + 0.0 * z).sqrt() - inside)

    guide = AutoNormal(model)
    result = FlowSVI(model, guide, seed=0, progress=False, num_particles=16, max_steps=400, learning_rate=0.01).run()
    assert 0 < result.num_skipped < 400
    assert all(torch.isfinite(p).all() for p in guide.parameters())


def test_a_run_without_a_finite_step_ends_early_and_names_the_site():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("broken", z - math.inf)

    guide = AutoNormal(model)
    guide()
    before = [p.detach().clone() for p in guide.parameters()]
    result = FlowSVI(model, guide, seed=0, progress=False).run()
    assert result.stop_reason.startswith("failed")
    assert "broken" in result.stop_reason
    assert not result.converged
    assert result.steps <= 200
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "accepted"),
    [
        ({"num_particles": 0}, "a whole number of at least 1; got 0"),
        ({"learning_rate": "fast"}, "a finite number greater than 0; got 'fast'"),
        ({"max_steps": 1.5}, "a whole number of at least 1; got 1.5"),
        ({"eval_every": True}, "a whole number of at least 1; got True"),
        ({"eval_particles": -1}, "a whole number of at least 1; got -1"),
        ({"clip_norm": math.nan}, "a finite number greater than 0; got nan"),
        ({"weight_decay": -1}, "a finite number of at least 0; got -1"),
        ({"num_starts": 2.0}, "a whole number of at least 0; got 2.0"),
        ({"max_seconds": 0}, "a finite number greater than 0; got 0"),
        ({"seed": "a"}, "a whole number of at least 0; got 'a'"),
        ({"progress": 1}, "True or False; got 1"),
        ({"callbacks": 3}, "a list of functions of an Evaluation; got 3"),
        ({"callbacks": [3]}, r"a list of functions of an Evaluation; got \[3\]"),
        (
            {"objective": pyro.infer.Trace_ELBO()},
            "one of pyro_nf.inference.elbo, .* got pyro.infer.trace_elbo.Trace_ELBO",
        ),
        ({"objective": ELBO}, "one of pyro_nf.inference.elbo"),
        ({"checkpoint": 3}, "a file's path, or None; got 3"),
        ({"checkpoint": "/no/such/folder/fit.pt"}, "a path in a folder that exists; got '/no/such/folder/fit.pt'"),
        ({"checkpoint": "/"}, "a file's path; got the folder '/': name a file in it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(option, accepted):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be {accepted}"):
        FlowSVI(linear_gaussian, AutoFlow(linear_gaussian), **option)


@pytest.mark.parametrize(
    "make", [list, tuple, np.asarray, lambda y: y.tolist()], ids=["list", "tuple", "array", "numbers"]
)
@pytest.mark.parametrize("guide", [AutoFlow, AutoNormal])
def test_data_that_are_no_tensors_are_named(make, guide):
    data = make(Y.numpy()) if make is np.asarray else make(Y)
    with pytest.raises(ValueError, match=r"the model's data must be tensors, on which it runs; got a .* for y: pass"):
        FlowSVI(linear_gaussian, guide(linear_gaussian), progress=False).run(X, y=data)


def test_a_model_that_takes_lists_is_left_alone_and_one_that_is_wrong_keeps_its_error():
    def listed(sizes, y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(sizes), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    FlowSVI(listed, AutoNormal(listed), progress=False, max_steps=2, learning_rate=0.01).run([3], Y)
    with pytest.raises(TypeError, match="size"):
        FlowSVI(listed, AutoNormal(listed), progress=False, max_steps=2).run(["3"], Y)

    pyro.clear_param_store()

    def held():
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=[1.0])

    with pytest.raises(ValueError, match="site 'y' observes a list: it must be a tensor"):
        FlowSVI(held, AutoNormal(held), progress=False, max_steps=2).run()


def test_a_weight_decay_shrinks():
    scales = []
    for weight_decay in (0.0, 10.0):
        pyro.clear_param_store()
        guide = AutoNormal(linear_gaussian)
        options = {"learning_rate": 0.02, "weight_decay": weight_decay, "max_steps": 400, "seed": 0, "progress": False}
        FlowSVI(linear_gaussian, guide, **options).run(X, Y)
        scales.append(float(guide.locs.b.detach()))
    assert abs(scales[1]) < 0.5 * abs(scales[0])


def test_callbacks_see_each_evaluation_and_the_state_that_it_describes():
    guide = AutoNormal(linear_gaussian)
    seen = []

    def look(evaluation):
        seen.append((evaluation, float(guide.locs.b.detach())))
        return len(seen) == 3

    options = {"learning_rate": 0.02, "eval_every": 10, "seed": 0, "progress": False}
    result = FlowSVI(linear_gaussian, guide, callbacks=[look, lambda evaluation: None], **options).run(X, Y)
    assert result.stop_reason == "stopped by a callback at step 30"
    assert not result.converged
    assert [evaluation.step for evaluation, _ in seen] == [10, 20, 30]
    assert [evaluation for evaluation, _ in seen] == list(result.evaluations[1:])
    assert len({b for _, b in seen}) == 3


def test_ctrl_c_returns_the_best_state_so_far():
    def press(evaluation):
        if evaluation.step == 200:
            raise KeyboardInterrupt

    guide = AutoNormal(linear_gaussian)
    svi = FlowSVI(linear_gaussian, guide, learning_rate=0.02, callbacks=[press], seed=0, progress=False)
    result = svi.run(X, Y)
    assert result.stop_reason == "interrupted after step 200"
    assert result.steps == 200
    assert result.elbo > log_evidence(X, Y) - 3


def test_an_error_on_the_way_leaves_the_best_state_in_the_guide():
    def fail(evaluation):
        if evaluation.step == 200:
            raise OSError("disk full")

    guide = AutoNormal(linear_gaussian)
    guide(X, Y)
    svi = FlowSVI(linear_gaussian, guide, learning_rate=0.02, callbacks=[fail], seed=0, progress=False)
    with pytest.raises(OSError, match="disk full"):
        svi.run(X, Y)
    assert 1.0 < float(guide.locs.b.detach()) < 2.5


def scaled(x, y):
    """The same model of a minibatch."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(X), len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


@pytest.mark.parametrize("kind", ["tensors", "mappings"])
def test_minibatches_as_arguments_give_the_posterior_of_all_data(kind):
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=5, shuffle=True)
    if kind == "mappings":
        batches = [{"x": x, "y": y} for x, y in batches]
    guide = AutoNormal(scaled)
    svi = FlowSVI(scaled, guide, learning_rate=0.05, max_steps=300, seed=0, progress=False, compile=False)
    svi.run_batches(batches)
    median = guide.median(X, Y)
    # Precision 20 + 1/4 for a; sum of squares 7.37 + 1/4 for b.
    assert abs(float(median["a"]) - 0.5 * 20 / 20.25) < 0.05
    assert abs(float(median["b"]) - 2 * 7.37 / 7.62) < 0.1


def test_a_last_batch_of_another_size_is_said_once_and_fitted():
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
    stop = [lambda evaluation: True]
    svi = FlowSVI(scaled, AutoNormal(scaled), learning_rate=0.02, max_steps=1000, callbacks=stop, progress=False)
    with pytest.warns(
        UserWarning, match=r"data of new shapes, \[\(4,\), \(4,\)\]: the step is prepared again"
    ) as record:
        svi.run_batches(batches)
    assert len(record) == 1


def test_batches_that_can_be_had_only_once_are_refused():
    svi = FlowSVI(scaled, AutoNormal(scaled), learning_rate=0.02, max_steps=10, progress=False)
    with pytest.raises(ValueError, match="batches must give minibatches at each iteration over it"):
        svi.run_batches((X, Y) for _ in range(2))


def test_a_learning_rate_is_found_and_reported():
    result = FlowSVI(linear_gaussian, AutoNormal(linear_gaussian), max_steps=300, seed=0, progress=False).run(X, Y)
    assert 3 * result.learning_rate in (0.1, 0.03, 0.01, 0.003)
    assert abs(result.elbo - log_evidence(X, Y)) < 0.05


def test_a_model_without_parameters_anywhere_is_refused():
    def guide(x, y):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="neither model nor guide has a parameter"):
        FlowSVI(linear_gaussian, guide, progress=False).run(X, Y)


def test_schedule_warms_up_holds_and_cools_down_to_zero():
    schedule = PlateauSchedule(1.0, max_steps=1000, warmup_steps=10, patience=2)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(100) == 1.0
    rising = [Evaluation(100 * i, float(i), 0.01) for i in range(4)]
    schedule.observe(rising)
    assert schedule.last_step == 1000
    flat = [*rising, Evaluation(400, 3.0, 0.01), Evaluation(500, 3.0, 0.01)]
    schedule.observe(flat)
    assert schedule.plateau_step == 500
    assert schedule.last_step == 750
    assert schedule.rate(625) == pytest.approx(0.5)
    assert schedule.rate(749) < 0.001


def test_schedule_cools_down_in_time_without_a_plateau():
    schedule = PlateauSchedule(1.0, max_steps=900)
    rates = [schedule.rate(step) for step in range(900)]
    assert rates[599] == 1.0
    assert rates[-1] < 0.001
