import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import corrected_posterior
from pyro_nf.diagnostics.correction import _chain, _systematic
from pyro_nf.guides import AutoFlow

Y = torch.tensor([0.5, -1.0, 2.0, 1.5])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def off(y):
    pyro.sample("mu", dist.Normal(0.9, 0.5))  # the posterior is N(0.6, 0.447)


@pytest.mark.parametrize("method", ["psis", "resample", "imh"])
def test_each_method_has_the_posteriors_mean_and_sd(method):
    pyro.set_rng_seed(0)
    found = corrected_posterior(conjugate, off, Y, method=method, num_samples=20_000)
    weights = found.log_weights.exp().to(found.draws["mu"])
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-4)
    mean = float((weights * found.draws["mu"]).sum())
    sd = float((weights * (found.draws["mu"] - mean) ** 2).sum()) ** 0.5
    assert mean == pytest.approx(0.6, abs=0.015)
    assert sd == pytest.approx(5**-0.5, abs=0.015)
    assert torch.equal(found.draws["double"], 2 * found.draws["mu"])
    assert math.isnan(found.acceptance_rate) == (method != "imh")
    assert method in str(found)


def test_a_guide_beyond_correction_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"cannot correct this guide: k-hat .* is not below"):
        corrected_posterior(conjugate, lambda y: pyro.sample("mu", dist.Normal(0.6, 0.1)), Y)


def test_draws_outside_the_support_have_no_weight_and_are_no_obstacle():
    pyro.set_rng_seed(0)

    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    found = corrected_posterior(model, lambda: pyro.sample("z", dist.Uniform(-1.0, 2.0)), num_samples=10_000)
    assert 0 <= float(found.draws["z"].min()) < 0.01 < 0.99 < float(found.draws["z"].max()) <= 1
    assert float(found.draws["z"].mean()) == pytest.approx(0.5, abs=0.02)


def test_a_wide_proposal_has_bounded_weights_and_the_same_evidence():
    pyro.set_rng_seed(0)

    def narrow(y):
        pyro.sample("mu", dist.Normal(0.6, 0.25))  # k-hat 1 - .25^2 / .447^2 = .69 in theory

    found = corrected_posterior(conjugate, narrow, Y, proposal_df=4.0, num_samples=10_000)
    assert found.khat < 0.5
    assert float(found.draws["mu"].std()) == pytest.approx(5**-0.5, abs=0.02)


def test_a_wide_proposal_works_for_flows_and_is_refused_where_normals_are_not_all():
    pyro.set_rng_seed(0)
    guide = AutoFlow(conjugate, init_scale=0.4)
    guide(Y)
    with torch.no_grad():
        guide.flow.flows[-1].affine.params.loc.fill_(0.6)
    found = corrected_posterior(conjugate, guide, Y, proposal_df=10.0, num_samples=5000)
    assert float(found.draws["mu"].mean()) == pytest.approx(0.6, abs=0.03)
    wide = AutoFlow(conjugate, base="student_t")
    wide(Y)
    with pytest.raises(ValueError, match="its base is wide already"):
        corrected_posterior(conjugate, wide, Y, proposal_df=10.0)

    def more(y):
        torch.randn(())
        off(y)

    with pytest.raises(ValueError, match="draws 2 normals for 1 coordinates"):
        corrected_posterior(conjugate, more, Y, proposal_df=10.0)


def test_resampling_takes_each_draw_as_often_as_its_weight_says():
    torch.manual_seed(0)
    log_weights = torch.tensor([0.5, 0.25, 0.15, 0.1]).double().log().numpy()
    counts = torch.bincount(torch.as_tensor(_systematic(log_weights, 20)), minlength=4)
    assert counts.tolist() == [10, 5, 3, 2]


def test_a_chain_visits_states_by_their_weight():
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 2.0, 4.0]).double()
    proposals = torch.randint(3, (60_000,))
    states, rate = _chain(weights[proposals].log().numpy(), 0)
    shares = torch.bincount(proposals[torch.as_tensor(states)]) / 60_000
    assert torch.allclose(shares.double(), weights / 7, atol=0.02)
    # E min(1, w' / w) over states by weight and uniform proposals
    expected = sum(weights[i] / 7 / 3 * min(1.0, weights[j] / weights[i]) for i in range(3) for j in range(3))
    assert rate == pytest.approx(float(expected), abs=0.01)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="method must be one of resample, psis, imh; got 'bayes'"):
        corrected_posterior(conjugate, off, Y, method="bayes")
    with pytest.raises(ValueError, match="at most num_proposals, which is at least 100; got 200 and 150"):
        corrected_posterior(conjugate, off, Y, num_samples=200, num_proposals=150)
    with pytest.raises(ValueError, match='num_proposals is num_samples for "psis"; got 500 and 200'):
        corrected_posterior(conjugate, off, Y, method="psis", num_samples=200, num_proposals=500)
    with pytest.raises(ValueError, match="proposal_df must be positive; got -1"):
        corrected_posterior(conjugate, off, Y, proposal_df=-1)
