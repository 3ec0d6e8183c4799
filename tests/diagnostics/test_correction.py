import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import LocScaleReparam

from pyro_nf.diagnostics import Verdict, corrected_posterior, diagnose
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
    assert set(found.draws) == {"mu"}
    assert torch.equal(found.deterministic["double"], 2 * found.draws["mu"])
    assert math.isnan(found.acceptance_rate) == (method != "imh")
    assert method in str(found)


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


class Line(pyro.nn.PyroModule):
    """The same as a module whose prior is an attribute, with a deterministic site that the data's size is not in."""

    def __init__(self):
        super().__init__()
        self.slope = pyro.nn.PyroSample(dist.Normal(0.0, 5.0))

    def forward(self, x, y=None):
        scale = pyro.deterministic("scale", 0.1 * x.abs().max())
        mean = pyro.deterministic("mean", self.slope * x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.0 * scale + 0.1), obs=y)


X = torch.linspace(-1, 1, 10)
# A reparametrised site is deterministic, and a function of the one that is drawn.
REPARAMETRISED = poutine.reparam(line, {"slope": LocScaleReparam(0.0)})


@pytest.mark.parametrize("method", ["psis", "resample", "imh"])
@pytest.mark.parametrize(
    ("model", "latent"),
    [(line, "slope"), (Line(), "slope"), (REPARAMETRISED, "slope_decentered")],
    ids=lambda v: str(v)[:8],
)
def test_draws_predict_for_other_arguments_and_functions_of_them_are_apart(model, latent, method):
    pyro.set_rng_seed(0)

    def guide(x, y=None):  # the posterior of the slope is N(2, 0.05) for y = 2 x; the decentered one is a fifth of it
        unit = 5.0 if latent == "slope_decentered" else 1.0
        pyro.sample(latent, dist.Normal(2.0 / unit, 0.06 / unit))

    found = corrected_posterior(model, guide, X, 2 * X, method=method, num_samples=300, num_proposals=None)
    assert set(found.draws) == {latent}
    assert "mean" in found.deterministic
    assert {len(value) for value in (*found.draws.values(), *found.deterministic.values())} == {300}
    predicted = Predictive(model, found.draws, return_sites=["y"])(X + 10)["y"]
    assert float(predicted[:, 0].mean()) == pytest.approx(18.0, abs=0.3)
    assert float(predicted[:, -1].mean()) == pytest.approx(22.0, abs=0.3)


def test_what_remains_is_said_and_a_missed_mode_is_not_called_right():
    pyro.set_rng_seed(0)
    found = corrected_posterior(conjugate, off, Y, num_samples=1000)
    assert found.mean_error == pytest.approx(0.035, abs=0.005)  # the root of 1 / 1000, and somewhat more
    assert "have an error of about 0.03 posterior sd" in str(found) or "about 0.04 posterior sd" in str(found)
    assert "The guide's own draws are off: its sd of mu is" in str(found)

    def two_modes():
        locs = torch.tensor([[-4.0], [4.0]])
        pyro.sample("z", dist.MixtureOfDiagNormals(locs, torch.ones(2, 1), torch.zeros(2)))

    found = corrected_posterior(two_modes, lambda: pyro.sample("z", dist.Normal(4.0, 1.0).expand([1]).to_event(1)))
    assert "a mode in which the guide has no draws would not be noticed" in str(found)
    assert "right" not in str(found)


def test_it_accepts_what_diagnose_calls_right_or_right_after_correction():
    for loc, scale in ((0.6, 0.447), (0.9, 0.5), (0.6, 0.2), (2.4, 0.447)):

        def guide(y, loc=loc, scale=scale):
            pyro.sample("mu", dist.Normal(loc, scale))

        pyro.set_rng_seed(0)
        refused = diagnose(conjugate, guide, Y, num_sets=1, num_starts=0).verdict is Verdict.NOT_RIGHT
        with pytest.raises(ValueError, match=r"^Importance weights cannot") if refused else nullcontext():
            corrected_posterior(conjugate, guide, Y, num_samples=1000)
        assert refused == (scale == 0.2 or loc == 2.4)


def test_a_guide_beyond_correction_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"cannot correct the guide \(k-hat .* is not below"):
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
    with pytest.raises(ValueError, match="method must be 'resample', 'psis' or 'imh'; got 'bayes'"):
        corrected_posterior(conjugate, off, Y, method="bayes")
    with pytest.raises(ValueError, match="num_proposals must be a whole number of at least 200; got 150"):
        corrected_posterior(conjugate, off, Y, num_samples=200, num_proposals=150)
    with pytest.raises(ValueError, match='num_proposals is num_samples for "psis"; got 500 and 200'):
        corrected_posterior(conjugate, off, Y, method="psis", num_samples=200, num_proposals=500)
    with pytest.raises(ValueError, match="proposal_df must be a finite number greater than 0; got -1"):
        corrected_posterior(conjugate, off, Y, proposal_df=-1)
