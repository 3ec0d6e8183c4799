"""Minibatches whose data are no data: refused in the first pass, counted and named in later ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_nf.inference import FlowSVI, minibatches
from pyro_nf.programs.program import BoundProgram

X = torch.linspace(-2, 2, 100)


def normal(batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(X), len(batch)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=batch)


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(X), len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def vectors(batch):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("n", len(X) // 2, len(batch)):
        pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(2)), obs=batch)


def masked(batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(X), len(batch)), poutine.mask(mask=~batch.isnan()):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=batch)


def broken(batches, number, index=3, value=math.nan):
    """Put a value that is no data into a batch."""
    batches = [batch.clone() for batch in batches]
    batches[number][index] = value
    return batches


class Passes:
    """Minibatches that are other ones from some pass on."""

    def __init__(self, *passes):
        self.passes, self.number = passes, 0

    def __iter__(self):
        self.number += 1
        return iter(self.passes[min(self.number, len(self.passes)) - 1])


def fit(batches, model=normal, max_steps=60, **options):
    pyro.clear_param_store()
    options = {"learning_rate": 0.1, "eval_every": 10, "num_particles": 4, "eval_particles": 10} | options
    svi = FlowSVI(model, AutoNormal(model), max_steps=max_steps, seed=0, compile=False, progress=False, **options)
    return svi.run_batches(batches)


@pytest.mark.parametrize("number", [0, 1, 9])
@pytest.mark.parametrize("rate", [0.1, None])
def test_nan_in_any_batch_of_the_first_pass_is_refused(number, rate):
    message = f"minibatch {number + 1} of pass 1: the data of site 'y' hold 1 NaN"
    with pytest.raises(ValueError, match=message):
        fit(broken(X.split(10), number), learning_rate=rate)


def test_so_it_is_in_events_keywords_and_a_smaller_last_batch():
    with pytest.raises(ValueError, match="minibatch 3 of pass 1: the data of site 'y' hold 1 NaN"):
        fit(broken(X.view(-1, 2).split(10), 2), vectors)
    with pytest.raises(ValueError, match="minibatch 2 of pass 1: the data of site 'y' hold 1 NaN"):
        fit([{"x": x, "y": y} for x, y in zip(X.split(10), broken(X.split(10), 1), strict=True)], regression)
    with pytest.raises(ValueError, match="minibatch 4 of pass 1: the data of site 'y' hold 1 NaN"):
        fit(broken(X.split(30), 3))


def test_masked_nan_are_data():
    result = fit(broken(X.split(10), 4), masked)
    assert result.num_skipped == 0
    assert "skipped" not in result.stop_reason


def test_nan_of_later_passes_are_counted_named_and_no_convergence():
    batches = X.split(10)
    with pytest.warns(UserWarning, match="steps were skipped"):
        result = fit(Passes(batches, broken(broken(batches, 2), 7)), max_steps=200)
    assert not result.converged
    assert result.num_skipped > 0
    assert result.stop_reason.startswith(f"not converged: {result.num_skipped} of {result.steps} steps were skipped, ")
    names = "minibatch 3 of pass 2, minibatch 8 of pass 2, minibatch 3 of pass 3"
    assert f"{names}, {result.num_skipped - 3} more: the data of site 'y' hold 1 NaN" in result.stop_reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_covariates_are_named_too(value):
    whole = [(x, x) for x in X.split(10)]
    spoilt = list(zip(broken(X.split(10), 5, value=value), X.split(10), strict=True))
    with pytest.warns(UserWarning, match="1 of 20 steps were skipped, minibatch 6 of pass 2: "):
        result = fit(Passes(whole, spoilt), regression, max_steps=20)
    assert (result.converged, result.num_skipped) == (False, 1)


def test_large_blocks_of_batches_are_not_kept(monkeypatch):
    monkeypatch.setattr(minibatches, "_MAX_KEPT", 4 * 10 * 4)
    with pytest.warns(UserWarning, match="minibatch 6 of pass 2: too large to be looked at"):
        fit(Passes(X.split(10), broken(X.split(10), 5)), max_steps=20)


def test_checks_of_the_first_pass_are_bounded_and_few(monkeypatch):
    monkeypatch.setattr(minibatches, "MAX_CHECKED", 3)
    with pytest.warns(UserWarning, match="minibatch 5 of pass 1: the data of site 'y' hold 1 NaN"):
        fit(broken(X.split(10), 4), max_steps=10)


def test_a_check_is_one_run_and_changes_no_draw(monkeypatch):
    runs = []
    original = BoundProgram.check_data
    monkeypatch.setattr(BoundProgram, "check_data", lambda program: runs.append(original(program)))
    first = fit(X.split(10))
    assert len(runs) == 9  # the first batch is the fit's own first run
    monkeypatch.setattr(minibatches, "MAX_CHECKED", 0)
    assert torch.equal(fit(X.split(10)).history, first.history)
    assert len(runs) == 9
