"""What long calls show, on stderr alone, and how they end by Ctrl-C."""

import os
import signal
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from tqdm.auto import tqdm

from pyro_nf.diagnostics import calibrate, corrected_posterior, diagnose, local_evidence, loo, progress, to_arviz

Y = torch.tensor([0.5, 1.0])


def model(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))


def fit(simulated):
    y = pyro.poutine.trace(simulated).get_trace().nodes["y"]["value"]
    return lambda: guide(y)


def verbs(**options):
    few = {"num_samples": 100, **options}
    data = to_arviz(model, guide, Y, **few)
    diagnose(model, guide, Y, num_sets=2, num_starts=2, **few)
    corrected_posterior(model, guide, Y, **few)
    local_evidence(model, guide, Y, **few)
    loo(data, **options)
    calibrate(model, fit, Y, num_simulations=20, seed=0, **few)


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_each_part_of_a_long_call_is_named(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    verbs()
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in (
        "to_arviz: draws and predictions",
        "to_arviz: draws of the prior",
        "diagnose: weights of draws",
        "diagnose: gradients at draws",
        "diagnose: other starts",
        "corrected_posterior: proposals",
        "local_evidence: weights of draws",
        "loo: observations",
        "calibrate: simulations",
    ):
        assert part in shown.err


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_short_calls_and_those_asked_to_are_silent(monkeypatch, capsys):
    verbs()
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    verbs(progress=False)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    with pytest.raises(ValueError, match="progress must be True or False; got 1"):
        diagnose(model, guide, Y, progress=1)


def test_parts_share_one_delay(monkeypatch):
    bars = []

    def bar(**options):
        bars.append(options)
        return tqdm(disable=True)

    monkeypatch.setattr(progress, "tqdm", bar)
    shown = progress.Progress("verb", True)
    for _ in range(2):
        time.sleep(0.05)
        assert list(shown.over("part", range(3), 3)) == [0, 1, 2]
    assert progress._DELAY > bars[0]["delay"] > bars[1]["delay"] > 0
    assert bars[0]["desc"] == "verb: part"


def interrupted_at(number, swallowed):
    """A way of fitting during whose call of this number, from 1, Ctrl-C comes, which it may take for its own."""
    calls = []

    def run(simulated):
        calls.append(None)
        if len(calls) == number:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                if not swallowed:
                    raise
        return fit(simulated)

    return run


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_ends_a_calibration_with_what_is_done(swallowed):
    before = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    with pytest.warns(UserWarning, match="interrupted: 21 of 24 simulations are judged"):
        found = calibrate(model, interrupted_at(22, swallowed), Y, num_simulations=24, num_samples=100, seed=0)
    whole = calibrate(model, fit, Y, num_simulations=24, num_samples=100, seed=0)
    assert (found.ranks["z"] == whole.ranks["z"][:21]).all()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted_at(5, swallowed), Y, num_simulations=24, num_samples=100, seed=0)
    assert before[0] == signal.getsignal(signal.SIGINT)
    assert torch.equal(before[1], torch.get_rng_state())
