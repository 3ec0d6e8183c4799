"""A fit that shows what it does, and can be ended at any moment with the best until then."""

import itertools
import os
import signal
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from example_models import Y, banana, normal_mean
from pyro_nf.approximations.density import Density
from pyro_nf.approximations.gaussian import nearest_normal
from pyro_nf.approximations.modes import find_modes
from pyro_nf.approximations.transport import nearest_triangular
from pyro_nf.diagnostics import diagnose
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI, Status
from pyro_nf.inference.loop import StepFit
from pyro_nf.inference.staged import Normal, Plan, Steps, TransportMap
from pyro_nf.inference.watch import Watch


def affine_flow(own):
    return AutoFlow(own, ElementwiseAffine)


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Slow:
    """A model whose every run takes its time, or does something at one of them."""

    def __init__(self, own, seconds=0.0, at=-1, act=lambda: None):
        self.own, self.seconds, self.at, self.act, self.calls = own, seconds, at, act, 0

    def __call__(self, *args):
        self.calls += 1
        time.sleep(self.seconds)
        if self.calls == self.at:
            self.act()
        self.own(*args)


# --- the bar and the callbacks


def test_one_bar_tells_stage_elbo_gap_and_time(capsys):
    steps = [Steps(name, 0.01, 60, 30) for name in ("flow", "flow, longer")]
    plan = Plan((Normal(), TransportMap(), *steps))
    FlowSVI(banana, affine_flow(banana), plan=plan, seed=0, max_seconds=600.0).run()
    text = capsys.readouterr().err
    assert text.count("\n") == 1  # of one bar, once it is closed
    for part in ("normal: L-BFGS", "normal: natural gradients", "map: natural gradients", "flow", "flow, longer"):
        assert f"FlowSVI: {part}" in text
    assert "ELBO -0." in text
    assert "gap 0." in text
    assert "at most 5" in text
    assert "<00:00" in text  # seconds left, of the part


def test_no_bar_without_progress(capsys):
    FlowSVI(normal_mean, AutoFlow(normal_mean), seed=0, progress=False).run()
    assert capsys.readouterr() == ("", "")


def test_callbacks_see_every_stage_and_the_state_that_it_left():
    guide, seen = AutoFlow(normal_mean), []
    look = [lambda evaluation: seen.append((evaluation, float(guide.sample_posterior(500)["mu"].mean())))]
    result = FlowSVI(normal_mean, guide, callbacks=look, seed=0, progress=False).run()
    assert [evaluation for evaluation, _ in seen] == list(result.evaluations)
    assert len(seen) == 1
    assert seen[0][0].elbo == pytest.approx(result.elbo, abs=1e-3)
    assert seen[0][1] == pytest.approx(9 / 5.04, abs=0.1)


@pytest.mark.parametrize("at", [0, 1])
def test_a_callback_ends_the_first_stages(at):
    seen = []

    def stop(evaluation):
        seen.append(evaluation)
        return len(seen) > at

    result = FlowSVI(banana, affine_flow(banana), callbacks=[stop], seed=0, progress=False).run()
    assert [stage.name for stage in result.stages] == ["normal", "map"][: at + 1]
    assert result.status is Status.STOPPED
    assert result.stop_reason.startswith(f"stopped by a callback at step {seen[-1].step}")
    assert not result.converged


# --- time


@pytest.mark.parametrize(
    ("options", "seconds", "limit"),
    [
        ({}, 0.02, 0.3),  # ends while it climbs
        ({"learning_rate": 0.01, "compile": False, "num_particles": 4, "eval_particles": 4}, 0.02, 0.5),  # in a block
        ({"max_steps": 300, "compile": False, "num_particles": 4, "eval_particles": 4}, 0.02, 0.5),  # in a trial
    ],
    ids=["stages", "steps", "rates"],
)
def test_a_fit_ends_in_time_with_the_best_and_says_so(options, seconds, limit):
    slow = Slow(normal_mean, seconds)
    guide = affine_flow(slow)
    start = time.perf_counter()
    result = FlowSVI(slow, guide, max_seconds=limit, seed=0, progress=False, **options).run(Y)
    assert time.perf_counter() - start < 20 * limit
    if result.status is not Status.CONVERGED:  # a normal may be right at once
        assert result.status is Status.TIME
        assert f"max_seconds={limit}" in result.stop_reason
    assert result.elbo > -20  # of the guide as it starts, -18.3
    assert all(bool(value.isfinite().all()) for value in guide.state_dict().values())


class Looking(Watch):
    """A watch that is looked at after so many steps."""

    def __init__(self, every):
        super().__init__()
        self.every = every

    def num_steps(self, steps, seconds, unroll):
        return self.every


def test_steps_are_the_same_in_whatever_parts_they_are_taken():
    histories = []
    for every in (2, 14, 100):
        pyro.clear_param_store()
        options = {"max_steps": 300, "learning_rate": 0.01, "num_particles": 8, "seed": 0}
        svi = FlowSVI(normal_mean, AutoNormal(normal_mean), **options)
        data = itertools.repeat(svi.program.bind(Y))
        histories.append(StepFit(svi.program, data, svi.options, Looking(every)).run().history)
    assert torch.equal(histories[0], histories[1])
    assert torch.equal(histories[0], histories[2])


def test_minibatches_end_in_time_too():
    def batch(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("d", 5, len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    svi = FlowSVI(batch, AutoNormal(batch), learning_rate=0.01, max_seconds=1.0, progress=False, compile=False)
    assert svi.run_batches([Y[:3], Y[2:]]).status is Status.TIME


# --- Ctrl-C


def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # for the signal to come


def raise_it():
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [press, raise_it])
@pytest.mark.parametrize(
    "options",
    [
        {"plan": Plan((Normal(), TransportMap(), Steps("flow", 0.01, 60, 20)))},
        {"learning_rate": 0.05, "compile": False, "num_particles": 4},
    ],
    ids=["staged", "single"],
)
@pytest.mark.parametrize("at", [20, 60, 150])
def test_an_interrupted_fit_leaves_the_best_until_then(act, options, at):
    target = Slow(banana, at=at, act=act)
    guide = affine_flow(target)
    guide()
    before = state(guide)
    calls = target.calls
    target.at += calls
    result = FlowSVI(target, guide, seed=0, progress=False, eval_every=20, eval_particles=20, **options).run()
    if target.calls >= target.at:
        assert result.status is Status.INTERRUPTED
        assert result.stop_reason.startswith("interrupted after step")
        assert not result.converged
    assert same(before, state(guide)) or result.steps
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(bool(value.isfinite().all()) for value in guide.state_dict().values())


def test_a_second_ctrl_c_is_raised_at_once():
    watch = Watch()
    with watch.looking_out():
        press()
        assert watch.ended is Status.INTERRUPTED
        assert not watch.report("steps", 1, 2, 0.0)
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- what made it worse


class Lying(Density):
    """A density whose gradients lead away from the sixth time on."""

    num_asked = 0

    def gradients(self, points):
        gradients, values = super().gradients(points)
        self.num_asked += 1
        return (gradients + 50.0 if self.num_asked > 5 else gradients), values


def test_natural_gradients_that_lead_away_return_to_the_best_on_their_way():
    density = Lying(lambda point: -0.5 * point.square().sum())
    loc, scale_tril, elbos = nearest_normal(density, torch.full((2,), 3.0), torch.eye(2))
    assert float(elbos[-1]) < -5
    assert float(loc.norm()) < 1.0
    assert bool(torch.isfinite(scale_tril).all())


# --- what is reported


def test_steps_end_where_a_report_says_so():
    def enough(what, done, total, elbo):
        told.append((what, done, total))
        return done < 3

    density = Density(lambda point: -0.5 * (point**4).sum())
    for fit in (nearest_normal, nearest_triangular):
        told = []
        elbos = fit(density, torch.ones(2), torch.eye(2), report=enough)[-1]
        assert len(elbos) == 3
        assert [done for _, done, _ in told] == [1, 2, 3]


def test_climbs_end_where_a_report_says_so():
    density, asked = Density(lambda point: -((1 - point[0]) ** 2) - 100 * (point[1] - point[0] ** 2) ** 2), []

    def advance(ended):
        asked.append(ended)
        return len(asked) < 6

    modes = find_modes(density, torch.tensor([[-1.2, 1.0], [2.0, -2.0]]), advance)
    assert asked.count(0) < 30
    assert modes
    assert not modes[0].converged


# --- threads


def test_threads_take_turns():
    found, errors = {}, []

    def fit(number):
        def own():
            pyro.sample("z", dist.Normal(float(number), 0.1))

        try:
            guide = AutoFlow(own)
            result = FlowSVI(own, guide, seed=number, progress=False).run()
            diagnosis = diagnose(own, guide, num_samples=200, num_sets=1, num_starts=2)
            found[number] = (result.elbo, float(guide.median()["z"]), diagnosis.elbo)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fit, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for number, (elbo, median, other) in found.items():
        assert elbo == pytest.approx(0.0, abs=0.01)
        assert other == pytest.approx(0.0, abs=0.05)
        assert median == pytest.approx(number, abs=0.01)
    assert len(found) == 3


def test_a_fit_inside_a_callback_is_no_deadlock():
    inner = []

    def diagnosed(evaluation):
        inner.append(diagnose(normal_mean, guide, Y, num_samples=100, num_sets=1, num_starts=0).elbo)

    guide = AutoFlow(normal_mean)
    FlowSVI(normal_mean, guide, callbacks=[diagnosed], seed=0, progress=False).run(Y)
    assert len(inner) == 1


# --- notes


def test_a_model_that_observes_nothing_is_said_to_be_a_prior():
    result = FlowSVI(banana, affine_flow(banana), callbacks=[lambda e: True], seed=0, progress=False).run()
    assert result.notes == ("the model observes nothing: this is its prior",)
    assert "(Note: the model observes nothing" in str(result)
    assert FlowSVI(normal_mean, AutoFlow(normal_mean), progress=False).run(Y).notes == ()


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.01, "max_steps": 3}], ids=["staged", "single"])
def test_forgotten_data_are_warned_of(options):
    def forgetful(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu * x, 1.0).to_event(1), obs=y)

    guide = AutoFlow(forgetful, ElementwiseAffine)
    stop = [lambda evaluation: True]
    with pytest.warns(UserWarning, match="y is None, and the model observes nothing") as record:
        FlowSVI(forgetful, guide, callbacks=stop, progress=False, compile=False, **options).run(Y)
    assert len(record) == 1


def test_a_perfect_fit_is_not_told_in_words_of_failure():
    def steep():  # no climb in float32 comes to where the slope is that small
        pyro.sample("z", dist.Normal(torch.full((2,), 1e4), torch.tensor([1e-2, 10.0])).to_event(1))

    result = FlowSVI(steep, AutoFlow(steep, ElementwiseAffine), seed=0, progress=False).run()
    if result.converged and result.starts.without_mode:
        assert "starts" not in str(result)
