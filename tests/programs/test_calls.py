"""Options of a function beside arguments of a model: what may be meant for either is refused, for every verb alike."""

import functools
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule

from pyro_nf import Arguments
from pyro_nf.diagnostics import (
    calibrate,
    compare,
    corrected_posterior,
    diagnose,
    local_evidence,
    to_arviz,
)
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.interface.arguments import unpacked
from pyro_nf.programs.calls import innermost, takes_model_arguments

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])


@takes_model_arguments
def verb(model, guide, *args, num_samples=10, size=1, **kwargs):
    """What reached the model, and what the function."""
    return unpacked(args, kwargs), num_samples


def plain(y, num_samples=3):
    """A model with a size of its own."""


def keyword_only(y, *, num_samples=3):
    pass


class Module(PyroModule):
    def forward(self, y, num_samples=3):
        pass


class Callable:
    def __call__(self, y, num_samples=3):
        pass

    def method(self, y, num_samples=3):
        pass


@functools.wraps(plain)
def wrapped(*args, **kwargs):
    pass


CLASHING = {
    "function": plain,
    "keyword only": keyword_only,
    "module": Module(),
    "callable": Callable(),
    "bound method": Callable().method,
    "wrapped": wrapped,
    "handler": poutine.condition(plain, data={}),
    "handlers": poutine.scale(poutine.condition(Module(), data={}), 2.0),
    "handler of a method": poutine.scale(Callable().method, 2.0),
    "partial of a handler": functools.partial(poutine.condition(plain, data={}), Y),
}


@pytest.mark.parametrize("model", CLASHING.values(), ids=CLASHING)
def test_a_name_of_both_is_refused_and_arguments_as_one_always_work(model):
    def guide(*args, **kwargs):
        pass

    args = () if isinstance(model, functools.partial) and model.args == (Y,) else (Y,)
    with pytest.raises(ValueError, match="num_samples=7 may be meant for verb or for the model"):
        verb(model, guide, *args, num_samples=7)
    given = Arguments(*args, num_samples=7)
    assert verb(model, guide, given) == ((args, {"num_samples": 7}), 10)
    assert verb(model, guide, given, num_samples=8) == ((args, {"num_samples": 7}), 8)
    # What names no option, and what no parameter shadows, is as ever.
    assert verb(model, guide, *args) == ((args, {}), 10)
    assert verb(model, guide, *args, size=4) == ((args, {}), 10)
    bound = functools.partial(model, num_samples=7)
    assert verb(bound, guide, *args, num_samples=8) == ((args, {}), 8)


def anything(*args, **kwargs):
    pass


@pytest.mark.parametrize("model", [anything, lambda y, **options: None, min, "no".join, lambda: None])
def test_what_the_model_does_not_name_is_the_functions(model):
    assert verb(model, anything, Y, num_samples=7) == (((Y,), {}), 7)


def test_what_is_bound_by_position_or_can_only_be_the_functions_is_no_clash():
    assert verb(plain, plain, Y, 7, num_samples=8) == (((Y, 7), {}), 8)
    assert verb(functools.partial(plain, Y, 7), anything, num_samples=8) == (((), {}), 8)
    assert verb(model=lambda model=1: None, guide=anything, num_samples=8) == (((), {}), 8)
    with pytest.raises(ValueError, match="guide=3 may be meant for verb or for the model"):
        verb(lambda guide=1: None, anything, guide=3)
    with pytest.raises(ValueError, match="or for the guide, which has a parameter 'num_samples' too"):
        verb(lambda y, **more: None, plain, Y, num_samples=7)


def test_arguments_are_all_or_none():
    assert repr(Arguments(1, self=2)) == "Arguments(1, self=2)"
    for args, kwargs in [((Arguments(1), 2), {}), ((2, Arguments(1)), {}), ((Arguments(1),), {"x": 2})]:
        with pytest.raises(ValueError, match=r"Arguments must hold all of the model's arguments; got (int|x=) beside"):
            unpacked(args, kwargs)
    assert unpacked((1,), {"x": 2}) == ((1,), {"x": 2})


def test_the_arguments_within_partials_and_handlers():
    inner = poutine.scale(functools.partial(plain, Y), 2.0)
    assert innermost(functools.partial(inner, num_samples=2), (1,), {"x": 3}) == (
        plain,
        (Y, 1),
        {"num_samples": 2, "x": 3},
    )


def model(y, num_samples=1000, num_starts=0, num_simulations=0, chunk_size=0, method=0, quantiles=0, latents=0):
    shift = num_samples - 1000
    with pyro.plate("rows", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)


def guide(y, num_samples=1000, num_starts=0):
    with pyro.plate("rows", len(y)):
        pyro.sample("mu", dist.Normal((y - (num_samples - 1000)) / 2, 0.5**0.5))


def evidence(shift):
    return float(dist.Normal(shift, 2**0.5).log_prob(Y).sum())


def test_the_verbs_have_one_rule():
    given = Arguments(Y, num_samples=1003)
    few = {"num_sets": 1, "num_starts": 0}
    found = diagnose(model, guide, given, num_samples=200, **few)
    assert found.log_evidence == pytest.approx(evidence(3), abs=0.01)
    assert diagnose(model, guide, Y, 1003, 0, num_samples=200, **few).num_samples == 200
    assert local_evidence(model, guide, given, num_samples=20).log_evidence.sum() == pytest.approx(
        evidence(3), abs=0.01
    )
    assert len(corrected_posterior(model, guide, given, num_samples=200).draws["mu"]) == 200
    data = to_arviz(model, guide, given, num_samples=150, num_prior_samples=0)
    assert data["posterior"].sizes["draw"] == 150
    calls = {
        "diagnose": lambda: diagnose(model, guide, Y, num_samples=1003),
        "corrected_posterior": lambda: corrected_posterior(model, guide, Y, num_samples=1003),
        "local_evidence": lambda: local_evidence(model, guide, Y, chunk_size=3),
        "to_arviz": lambda: to_arviz(model, guide, Y, num_samples=1003),
        "calibrate": lambda: calibrate(model, lambda simulated: None, Y, num_samples=1003),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"may be meant for {name} or for the model"):
            call()


def test_calibrate_takes_arguments_as_one():
    def fit(simulated):
        y = poutine.trace(simulated).get_trace().nodes["y"]["value"]
        return lambda: guide(y, num_samples=1003)

    given = Arguments(Y, num_samples=1003)
    found = calibrate(model, fit, given, num_simulations=20, num_samples=100, seed=0)
    assert found.calibrated
    assert found.failures == {}


def test_a_guides_methods_have_it_too():
    auto = AutoFlow(model, "auto")
    given = Arguments(Y, num_samples=1003)
    assert auto.sample_posterior(5, given)["mu"].shape == (5, 5)
    assert auto.sample_posterior(num_samples=5, y=Y)["mu"].shape == (5, 5)
    assert auto.quantiles([0.5], given)["mu"].shape == (1, 5)
    assert auto.median(given)["mu"].shape == (5,)
    assert auto.log_prob({"mu": torch.zeros(5)}, given).shape == ()
    with pytest.raises(ValueError, match=r"may be meant for AutoFlow.sample_posterior or for the model"):
        auto.sample_posterior(5, Y, num_samples=1003)
    with pytest.raises(ValueError, match=r"may be meant for AutoFlow.warm_start or for the model"):
        auto.warm_start(Y, num_starts=2)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1; got 0"):
        auto.sample_posterior(0, Y)
    assert str(inspect.signature(AutoFlow.sample_posterior)).startswith("(self, num_samples: int, *args")


def test_a_fit_takes_arguments_as_one_and_compare_passes_them_on():
    options = {"num_starts": 2, "max_steps": 20, "eval_every": 10, "learning_rate": 0.05, "num_particles": 8}
    auto = AutoFlow(model, ElementwiseAffine)
    svi = FlowSVI(model, auto, **options, compile=False, progress=False, seed=0)
    fit = svi.run(Arguments(Y, num_samples=1003, num_starts=1))
    assert (fit.args, fit.kwargs) == ((Y,), {"num_samples": 1003, "num_starts": 1})
    table = compare({"a": fit}, num_samples=200, num_sets=1, num_starts=0)
    assert table["log_evidence"]["a"] == pytest.approx(evidence(3), abs=0.05)
    batches = [Arguments(Y, num_samples=1003)]
    assert abs(svi.run_batches(batches).elbo - evidence(3)) < 1
