"""Fits side by side: of one model to the same data, in whatever tensors and arguments, and of nothing else."""

import functools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.diagnostics import compare

X = torch.tensor([0.5, -1.0, 2.0, 1.0])
Y = torch.tensor([1.0, 2.0, 0.5, 1.5])


def model(x, y, scale=1.0):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, scale), obs=y)


def guide(*args, **kwargs):
    pyro.sample("b", dist.Normal(0.1, 0.4))


def wide(*args, **kwargs):
    pyro.sample("b", dist.Normal(0.1, 0.6))


def fit(model=model, args=(X, Y), guide=guide, **kwargs):
    return SimpleNamespace(model=model, guide=guide, args=args, kwargs=kwargs, seconds=1.0, converged=True)


def table(other):
    return compare({"a": fit(), "b": other}, num_samples=200, num_sets=1, num_starts=0, progress=False)


SAME = {
    "same tensors": fit(guide=wide),
    "clones": fit(args=(X.clone(), Y.clone())),
    "by name": fit(args=(), x=X, y=Y.clone()),
    "bound": fit(functools.partial(model, X.clone()), args=(Y,)),
    "conditioned": fit(poutine.condition(functools.partial(model, y=None), {"y": Y}), args=(X,)),
    "an option's default": fit(scale=1.0),
    "double precision": fit(args=(X, Y.double())),
}


@pytest.mark.parametrize("other", SAME.values(), ids=SAME)
def test_equal_data_may_come_as_they_like(other):
    assert set(table(other).index) == {"a", "b"}


def renamed(x, y):
    b = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def other_prior(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def two(x, y):
    model(x, y)
    pyro.sample("more", dist.Normal(0.0, 1.0), obs=y[0])


def prior_of_slope(x, y):
    pyro.sample("slope", dist.Normal(0.0, 1.0))


OTHER = {
    "data": (fit(args=(X, Y + torch.tensor([0.0, 0.0, 1e-3, 0.0]))), "its data at site 'y' differ in 1 of 4 numbers"),
    "fewer rows": (fit(args=(X[:3], Y[:3])), r"observed site 'y' has shape \(3,\), and there \(4,\)"),
    "regressors": (fit(args=(X + 0.1, Y)), "at the same draw its log density is"),
    "an option": (fit(scale=2.0), "at the same draw its log density is"),
    "a prior": (fit(other_prior), "at the same draw its log density is"),
    "a scale": (fit(poutine.scale(model, 0.5)), "at the same draw its log density is"),
    "latents": (
        fit(renamed, guide=prior_of_slope),
        "latent sites are 'slope'",
    ),
    "sites": (fit(two), "its observed sites are 'y', 'more', and there 'y'"),
}


@pytest.mark.parametrize(("other", "sentence"), OTHER.values(), ids=OTHER)
def test_fits_of_other_models_or_data_have_no_common_gap(other, sentence):
    with pytest.raises(ValueError, match=rf"fits\['b'\] must be of the same model and data as fits\['a'\].*{sentence}"):
        table(other)


def test_draws_outside_the_support_of_both_do_not_differ():
    def bounded(y):
        b = pyro.sample("b", dist.Uniform(0.0, 1.0, validate_args=False))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    fits = {name: fit(bounded, (torch.tensor(0.5),)) for name in "ab"}
    assert len(compare(fits, num_samples=200, num_sets=1, num_starts=0)) == 2
