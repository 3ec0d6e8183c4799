"""What a model or an objective does in Python may change during a fit: no recorded step outlives it."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_nf.approximations.density import Density
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI, step_compiler
from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.steps import GraphError, GraphSteps
from pyro_nf.programs.traces import log_prob_sum

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])
OPTIONS = {
    "learning_rate": 0.03,
    "num_particles": 8,
    "max_steps": 45,
    "eval_every": 15,
    "eval_particles": 50,
    "seed": 0,
    "progress": False,
}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Record, and go without the compiler."""
    monkeypatch.setattr(GraphSteps, "compile", lambda self, num_steps: None)


class Model(nn.Module):
    """A model with all kinds of state, which callbacks change."""

    def __init__(self):
        super().__init__()
        self.sd, self.shifted, self.size = 10.0, False, 5
        self.parts, self.options = [Y], {"shift": 0.0}
        self.dropout = nn.Dropout(0.5)

    def forward(self, y, weights=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        shift = self.options["shift"] + (2.0 if self.shifted else 0.0) + (weights[0] if weights else 0.0)
        with pyro.plate("d", self.size):
            pyro.sample("y", dist.Normal(mu + shift, self.sd), obs=self.dropout(self.parts[0] + 0 * y)[: self.size])


def change_attribute(model, given):
    model.sd = 1.0


def change_switch(model, given):
    model.shifted = True


def change_size(model, given):
    model.size = 3


def change_list(model, given):
    model.parts[0] = Y + 3


def change_dict(model, given):
    model.options["shift"] = torch.tensor(1.5)


def change_data_in_place(model, given):
    given[0] = 20.0


def change_mode(model, given):
    model.eval()


CHANGES = [change_attribute, change_switch, change_size, change_list, change_dict, change_data_in_place, change_mode]


def fit(change, form, at=15, **options):
    pyro.clear_param_store()
    model, given = Model(), [0.0]

    def callback(evaluation):
        if evaluation.step == at:
            change(model, given)

    if change is not change_mode:
        model.eval()
    guide = AutoNormal(model)
    result = FlowSVI(model, guide, compile=form, callbacks=[callback], **(OPTIONS | options)).run(Y, given)
    return result, [param.detach().clone() for param in guide.parameters()]


@pytest.mark.parametrize("change", CHANGES)
def test_a_recorded_step_follows_what_a_callback_changes(change):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded, plain = fit(change, True), fit(change, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert recorded[0].execution != "plain"
    if change is change_data_in_place:  # other arguments are looked at first, which takes draws of a plain fit's
        assert float(recorded[0].history[15:].mean()) == pytest.approx(float(plain[0].history[15:].mean()), abs=0.5)
        return
    torch.testing.assert_close(recorded[0].history, plain[0].history, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recorded[1], plain[1], rtol=1e-4, atol=1e-4)


def test_parameters_that_are_frozen_on_the_way_stay():
    for form in (True, False):
        pyro.clear_param_store()
        model = Model().eval()
        guide = AutoNormal(model)
        seen = []

        def freeze(evaluation, guide=guide, seen=seen):
            guide.locs.mu.requires_grad_(False)
            seen.append((float(guide.locs.mu.detach()), float(guide.scales.mu.detach())))

        result = FlowSVI(model, guide, compile=form, callbacks=[freeze], **OPTIONS).run(Y)
        assert result.execution != ("plain" if form else "compiled")
        assert len({loc for loc, _ in seen}) == 1
        assert len({scale for _, scale in seen}) == 3


class OwnWarmUp(ELBO):
    """An objective whose warm-up is a Python number."""

    strength = 1.0

    def start_block(self, step, scatter, like):
        super().start_block(step, scatter, like)
        self.strength = min(1.0, 0.01 + step / 30)

    def estimate(self, program, draws):
        def terms(particle):
            log_p, log_q = log_prob_sum(particle.model), log_prob_sum(particle.guide)
            return {"elbo": (log_p - log_q).detach(), "surrogate": self.strength * log_p - log_q}

        found = program.vmap_traces(terms, draws)
        return found["elbo"].mean(), found["surrogate"].mean()


def test_an_objective_of_the_users_warms_up():
    histories = []
    for form in (True, False):
        pyro.clear_param_store()
        model = Model().eval()
        svi = FlowSVI(model, AutoNormal(model), objective=OwnWarmUp(), compile=form, **OPTIONS)
        histories.append(svi.run(Y).history)
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-4)


def test_what_changes_too_often_runs_plain_with_one_warning():
    model = Model().eval()

    def curriculum(evaluation):
        model.sd *= 0.9

    options = OPTIONS | {"eval_every": 10, "max_steps": 100}
    svi = FlowSVI(model, AutoNormal(model), compile=True, callbacks=[curriculum], **options)
    with pytest.warns(UserWarning, match="the step runs plain from here on, which is slower") as record:
        result = svi.run(Y)
    assert len(record) == 1
    assert result.execution == "plain"
    assert "changed too often" in result.execution_reason


def test_what_has_changed_at_the_end_is_no_convergence():
    model = Model().eval()
    calls = []

    def late(y):
        calls.append(0)
        model.sd = 10.0 if len(calls) < threshold else 1.0
        model(y)

    threshold = 10**6
    svi = FlowSVI(late, AutoNormal(late), compile=True, **OPTIONS)
    svi.run(Y)
    threshold, calls[:] = len(calls) - 2, []  # after the last comparison but one
    pyro.clear_param_store()
    svi = FlowSVI(late, AutoNormal(late), compile=True, **OPTIONS)
    result = svi.run(Y)
    assert not result.converged
    assert "at the end the model has an ELBO of" in result.stop_reason


def batch_model(kind):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        size = {
            "largest": lambda: int(x.max()),
            "classes": lambda: len(set(x.tolist())),
            "array": lambda: float(x.numpy().sum()),
            "unique": lambda: len(x.unique()),
            "positive": lambda: len(x[x > 1]),
            "branch": lambda: 1.0 if bool((x > 2).any()) else 0.0,
        }[kind]()
        with pyro.plate("d", 8, len(x)):
            pyro.sample("x", dist.Normal(mu + size, 1.0), obs=x)

    return model


@pytest.mark.parametrize("kind", ["largest", "classes", "array", "unique", "positive", "branch"])
def test_numbers_that_are_read_from_minibatches_are_not_those_of_the_first(kind):
    batches = [torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, 4.0, 0.0])]
    histories = []
    for form in (True, False):
        pyro.clear_param_store()
        model = batch_model(kind)
        svi = FlowSVI(model, AutoNormal(model), compile=form, **(OPTIONS | {"max_steps": 12, "eval_every": 6}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            histories.append(svi.run_batches(batches).history)
        assert len(said) == form
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-4)


def test_an_attribute_that_follows_the_batches_is_noticed():
    """What no look at data can show: the number comes from elsewhere, with the second batch."""
    lengths = []

    def batches():
        for number in range(2):
            lengths.append(number)
            yield Y + 0

    class Batches:
        __iter__ = staticmethod(batches)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu + 5.0 * lengths[-1], 1.0).expand([5]).to_event(1), obs=y)

    options = OPTIONS | {"max_steps": 16, "eval_every": 8}
    with pytest.warns(UserWarning, match="the step runs plain from here on"):
        FlowSVI(model, AutoNormal(model), compile=True, **options).run_batches(Batches())


def test_randomness_of_the_models_own_and_flows_at_their_optimum_are_no_change(monkeypatch):
    renewed = []
    monkeypatch.setattr(step_compiler.StepCompiler, "_renew", lambda self, changed: renewed.append(changed))

    def noisy(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu + torch.rand(()), 1.0).expand([5]).to_event(1), obs=y)

    def exact():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    model = Model()  # with dropout
    look = [lambda evaluation: None]
    for run, args in ((noisy, (Y,)), (model, (Y,)), (exact, ())):
        pyro.clear_param_store()
        guide = AutoNormal(run, init_scale=1.0)
        assert FlowSVI(run, guide, compile=True, callbacks=look, **OPTIONS).run(*args).execution != "plain"
    assert not renewed


def test_stages_follow_what_a_callback_changes():
    model = Model().eval()

    def look(evaluation):
        model.sd = 1.0

    guide = AutoFlow(model, ElementwiseAffine)
    result = FlowSVI(model, guide, callbacks=[look], seed=0, progress=False).run(Y)
    draws = guide.sample_posterior(10_000, Y)["mu"]
    assert result.converged
    assert float(draws.mean()) == pytest.approx(9 / 5.04, abs=0.03)
    assert float(draws.std()) == pytest.approx(5.04**-0.5, abs=0.02)


def test_a_density_is_recorded_anew_and_in_the_end_no_longer():
    factor = [1.0]
    density = Density(lambda point: -factor[0] * point.square().sum())
    points = torch.randn(20, 2)
    density.values(points[:5])
    assert not density.renew(points)
    for number in range(3):
        factor[0] *= 2
        assert density.renew(points)
        torch.testing.assert_close(density.values(points[:5]), -factor[0] * points[:5].square().sum(-1))
        assert not density.renew(points), number
    factor[0] *= 2
    with pytest.warns(UserWarning, match="the model's log density has changed 4 times"):
        assert density.renew(points)
    factor[0] *= 2
    torch.testing.assert_close(density.values(points[:5]), -factor[0] * points[:5].square().sum(-1))


def test_a_step_that_can_no_longer_be_recorded_runs_plain_and_says_so(monkeypatch):
    model = Model().eval()

    def fail(self):
        raise GraphError("no more")

    def change(evaluation):
        model.sd = 1.0
        monkeypatch.setattr(GraphSteps, "verify", fail)

    svi = FlowSVI(model, AutoNormal(model), compile=True, callbacks=[change], **OPTIONS)
    with pytest.warns(UserWarning, match="the step runs plain, not compiled: no more"):
        assert svi.run(Y).execution == "plain"


def test_a_model_that_counts_its_runs_is_not_recorded():
    runs = []

    def counting(y):
        runs.append(0)
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu, 1.0 + 10.0 / len(runs)).expand([5]).to_event(1), obs=y)

    svi = FlowSVI(counting, AutoNormal(counting), compile=True, **OPTIONS)
    with pytest.warns(UserWarning, match="the step runs plain, not compiled: the graph's results differ"):
        assert svi.run(Y).execution == "plain"
