import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import diagnose, local_evidence
from pyro_nf.diagnostics.weights import pareto_smooth, summarize
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.networks import MLP

Y = torch.tensor([0.5, -1.0, 2.0, 1.5])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def evidence(y):
    cov = torch.eye(len(y)) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(len(y)), cov).log_prob(y))


def normal_guide(scale_factor=1.0, shift=0.0):
    """The exact posterior N(sum y / (n + 1), 1 / (n + 1)), or one off by so much."""

    def guide(y):
        sd = (len(y) + 1) ** -0.5
        pyro.sample("mu", dist.Normal(y.sum() / (len(y) + 1) + shift * sd, scale_factor * sd))

    return guide


def test_the_exact_posterior_has_the_evidence_without_error():
    found = diagnose(conjugate, normal_guide(), Y, num_samples=1000)
    assert found.reliable
    assert found.reasons == ()
    assert found.elbo == pytest.approx(evidence(Y), abs=1e-5)
    assert found.log_evidence == pytest.approx(evidence(Y), abs=1e-5)
    assert found.elbo_mcse < 1e-6
    assert found.ess_fraction == pytest.approx(1.0, abs=1e-5)
    assert "Verdict: right: the guide's own means are off by at most 0.00 posterior sd" in str(found)


def test_errors_cover_the_evidence():
    z = [
        (found.log_evidence - evidence(Y)) / found.log_evidence_se
        for found in (diagnose(conjugate, normal_guide(1.2, 0.2), Y, num_samples=500) for _ in range(40))
    ]
    assert np.mean(np.abs(z) < 2) > 0.8
    assert abs(np.mean(z)) < 0.6


def test_a_guide_too_narrow_is_flagged_and_the_reason_given():
    found = diagnose(conjugate, normal_guide(0.4), Y)
    assert not found.reliable
    assert "k-hat" in found.reasons[0]
    assert found.elbo < evidence(Y) - 0.3
    assert "Verdict: not right. Importance weights cannot correct the guide" in str(found)


def test_draws_outside_the_support_are_flagged():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(pyro.sample("z", dist.Normal(0.0, 1.0)) > 0, 0.0, -math.inf))

    def guide():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    found = diagnose(model, guide, num_samples=1000)
    assert not found.reliable
    assert found.verdict == "right after correction"
    assert "have no density under the model" in found.reasons[0]
    assert found.log_evidence == pytest.approx(math.log(0.5), abs=0.1)


def test_khat_is_the_tails_shape():
    # Weights exp(k e), e exponential, have a Pareto tail of shape k.
    exponential = np.random.default_rng(0).exponential(size=20_000)
    for k in (0.3, 0.6, 0.9):
        smoothed, khat = pareto_smooth(k * exponential)
        assert khat == pytest.approx(k, abs=0.08)
        assert summarize((k * exponential)[None]).khat == khat
        assert np.exp(smoothed).sum() == pytest.approx(1.0)


def test_equal_weights_have_no_tail():
    smoothed, khat = pareto_smooth(np.full(500, 3.0))
    assert khat == -math.inf
    assert np.allclose(np.exp(smoothed), 1 / 500)


def test_bad_input_gets_a_sentence():
    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="plate 'rows' is subsampled"):
        diagnose(subsampled, AutoFlow(subsampled), Y)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 100; got 10"):
        diagnose(conjugate, normal_guide(), Y, num_samples=10)
    with pytest.raises(ValueError, match="5 draws have a NaN"):
        summarize(np.where(np.arange(200) < 5, np.nan, 0.0)[None])
    with pytest.raises(ValueError, match="no draw of the guide has a finite weight"):
        summarize(np.full((2, 200), -np.inf))
    with pytest.raises(ValueError, match="all stand in one plate; got 'mu' in no plate"):
        local_evidence(conjugate, normal_guide(), Y)


def test_local_evidence_of_a_conjugate_model():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(6, 2)
    guide = AmortizedFlow(model, MLP(2, (), 2), "planar")
    found = local_evidence(model, guide, x, num_samples=4000)
    truth = dist.Normal(0.0, 2.0**0.5).expand((2,)).to_event(1).log_prob(x)
    assert found.elbo.shape == found.log_evidence.shape == (6,)
    assert torch.allclose(found.log_evidence, truth, atol=0.15)
    assert (found.elbo < found.log_evidence).all()
