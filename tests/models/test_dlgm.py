import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_nf.diagnostics import local_evidence
from pyro_nf.guides import AmortizedFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import KLAnnealedELBO
from pyro_nf.models import DLGM, VAE, BernoulliLikelihood, NormalLikelihood, load_digits
from pyro_nf.networks import GatedLinear, GatedMLP, ImageDecoder, ImageEncoder

X = (torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def test_layers_follow_the_equations():
    model = DLGM(6, (3, 2), (4,))
    xi = {"xi_1": torch.randn(30, 3), "xi_2": torch.randn(30, 2)}
    trace = poutine.trace(poutine.condition(model, data=xi)).get_trace(X)
    t0, t1 = model.networks
    g1, g2 = model.mixers
    logits = t0(t1(g2(xi["xi_2"])) + g1(xi["xi_1"]))
    expected = BernoulliLikelihood()(logits).log_prob(X).sum()
    expected = expected + sum(dist.Normal(0.0, 1.0).log_prob(value).sum() for value in xi.values())
    assert torch.allclose(trace.log_prob_sum(), expected)


def test_a_minibatch_is_scaled_up():
    trace = poutine.trace(DLGM(6, (2,), (4,))).get_trace(X, batch_size=5)
    assert trace.nodes["x"]["value"].shape == (5, 6)
    assert trace.nodes["x"]["scale"] == 6.0
    assert torch.equal(trace.nodes["x"]["value"], X[trace.nodes["data"]["value"]])


def test_an_autoencoder_is_its_decoder_and_its_likelihood():
    model = VAE(6, 2, GatedMLP(2, (4,), 12), NormalLikelihood())
    z = torch.randn(30, 2)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(X)
    expected = NormalLikelihood()(model.decoder(z)).log_prob(X).sum() + dist.Normal(0.0, 1.0).log_prob(z).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)
    few = poutine.trace(model).get_trace(X, batch_size=5)
    assert (few.nodes["x"]["value"].shape, few.nodes["x"]["scale"]) == ((5, 6), 6.0)


def test_the_networks_of_a_dlgm_are_a_choice():
    assert all(isinstance(network, GatedMLP) for network in DLGM(6, (3, 2), (4,), network=GatedMLP).networks)


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), NormalLikelihood()], ids=["bernoulli", "normal"])
def test_pyros_svi_trains_it(likelihood):
    model = DLGM(6, (2,), (8,), likelihood=likelihood)
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


MODELS = {
    "gated": lambda: (
        VAE(64, 8, GatedMLP(8, (40,), 64)),
        GatedLinear(64, 40),
    ),
    "convolutional": lambda: (
        VAE(64, 8, ImageDecoder(8, (1, 8, 8), channels=(8,), kernel_size=3)),
        ImageEncoder((1, 8, 8), 40, channels=(8,), kernel_size=3),
    ),
    "two layers": lambda: (DLGM(64, (8, 4), (40,), network=GatedMLP), GatedLinear(64, 40)),
}


@pytest.mark.parametrize("name", MODELS)
def test_digits_are_learnt_in_seconds(name):
    train, test = load_digits()
    model, encoder = MODELS[name]()
    guide = AmortizedFlow(model, encoder, "planar", affine="first")
    before = local_evidence(model, guide, test, num_samples=10)
    svi = FlowSVI(
        model,
        guide,
        objective=KLAnnealedELBO(50, sticking_the_landing=False),
        num_particles=1,
        learning_rate=5e-3,
        max_steps=200,
        seed=0,
        progress=False,
    )
    assert svi.run(train, batch_size=100).num_skipped == 0
    after = local_evidence(model, guide, test, num_samples=10)
    # Independent pixels, each at its own frequency, are at -25.3 nats.
    assert before.elbo.mean() < -40
    assert after.elbo.mean() > -25.0
    assert after.log_evidence.mean() > after.elbo.mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(DLGM, 6, (), (4,)), r"latent_dims must hold the width of each layer; got none"),
        (lambda: DLGM(6, (2,), (4,))(X[:, :5]), r"x must have shape \(size, data_dim=6\); got \(30, 5\)"),
        (lambda: VAE(6, 0, nn.Linear(2, 6)), "latent_dim must be a whole number of at least 1; got 0"),
        (
            lambda: VAE(6, 2, nn.Linear(2, 6), NormalLikelihood())(X),
            "decoder must return 2 x 6 = 12 outputs for a datum, for a NormalLikelihood of 6 values; got 6",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
