import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_nf.models import DLGM, bernoulli_likelihood, normal_likelihood

X = (torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def test_layers_follow_the_equations():
    model = DLGM(6, (3, 2), (4,))
    xi = {"xi_1": torch.randn(30, 3), "xi_2": torch.randn(30, 2)}
    trace = poutine.trace(poutine.condition(model, data=xi)).get_trace(X)
    t0, t1 = model.networks
    g1, g2 = model.mixers
    logits = t0(t1(g2(xi["xi_2"])) + g1(xi["xi_1"]))
    expected = bernoulli_likelihood(logits).log_prob(X).sum()
    expected = expected + sum(dist.Normal(0.0, 1.0).log_prob(value).sum() for value in xi.values())
    assert torch.allclose(trace.log_prob_sum(), expected)


def test_a_minibatch_is_scaled_up():
    trace = poutine.trace(DLGM(6, (2,), (4,))).get_trace(X, batch_size=5)
    assert trace.nodes["x"]["value"].shape == (5, 6)
    assert trace.nodes["x"]["scale"] == 6.0
    assert torch.equal(trace.nodes["x"]["value"], X[trace.nodes["data"]["value"]])


@pytest.mark.parametrize(
    ("likelihood", "num_outputs"), [(bernoulli_likelihood, None), (normal_likelihood, 12)], ids=["bernoulli", "normal"]
)
def test_pyros_svi_trains_it(likelihood, num_outputs):
    model = DLGM(6, (2,), (8,), likelihood=likelihood, num_outputs=num_outputs)
    encoder = nn.Linear(6, 4)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("xi_1", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(X) for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert any("networks" in name for name in pyro.get_param_store())


def test_it_runs_under_vmap():
    model = DLGM(6, (3, 2), (4,))
    model(X)

    def log_prob(xi_1, xi_2):
        data = {"xi_1": xi_1, "xi_2": xi_2}
        return poutine.trace(poutine.condition(model, data=data)).get_trace(X).log_prob_sum()

    xi = torch.randn(7, 30, 3), torch.randn(7, 30, 2)
    with pyro.validation_enabled(False):
        batched = torch.func.vmap(log_prob)(*xi)
    assert torch.allclose(batched, torch.stack([log_prob(*pair) for pair in zip(*xi, strict=True)]), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(DLGM, 6, (), (4,)), r"latent_dims must hold the positive width of each layer; got \(\)"),
        (lambda: DLGM(6, (2,), (4,))(X[:, :5]), r"x must have shape \(size, data_dim=6\); got \(30, 5\)"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
