import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_nf.diagnostics import calibrate
from pyro_nf.diagnostics.calibration import _symmetry
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

Y = torch.zeros(4)


def fit_with(scale_factor=1.0, shift=0.0, fails=()):
    """Give each simulation its exact posterior, or one off by so much; made here, for workers cannot import tests."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("twice", 2 * mu)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)

    def fit(simulated):
        y = poutine.trace(simulated).get_trace().nodes["y"]["value"]
        if any(low < float(y.sum()) < high for low, high in fails):
            raise RuntimeError("a bad day")
        cov = torch.linalg.inv(torch.eye(2) + len(y) * torch.ones(2, 2))
        loc = cov @ torch.ones(2) * y.sum()
        sd = cov.diagonal().sqrt()
        return lambda: pyro.sample("mu", dist.MultivariateNormal(loc + shift * sd, scale_factor**2 * cov))

    return model, fit


def test_a_right_guide_passes():
    model, fit = fit_with()
    found = calibrate(model, fit, Y, num_simulations=200, seed=0)
    assert found.calibrated
    assert found.reasons == ()
    assert found.failures == {}
    assert found.ranks["mu"].shape == found.probabilities["mu"].shape == (200, 2)
    assert set(found.ranks) == {"mu"}
    assert found.uniformity["mu"].shape == found.symmetry["mu"].shape == (2,)
    z = (found.coverage["mu"] - found.levels[:, None]) / found.coverage_se[:, None]
    assert np.abs(z).max() < 3.5
    assert "\ncalibrated: ranks are uniform" in str(found)


@pytest.mark.parametrize(("scale_factor", "word"), [(0.5, "narrow"), (2.0, "wide")])
def test_a_wrong_width_is_flagged(scale_factor, word):
    model, fit = fit_with(scale_factor)
    found = calibrate(model, fit, Y, num_simulations=100, seed=0)
    assert not found.calibrated
    assert any(reason.startswith(f"mu[0]: posterior too {word}") for reason in found.reasons)
    true_cover = 2 * stats.norm.cdf(stats.norm.ppf((1 + found.levels) / 2) * scale_factor) - 1
    assert np.abs(found.coverage["mu"].mean(1) - true_cover).max() < 0.12
    assert "NOT calibrated" in str(found)


def test_a_bias_is_flagged():
    model, fit = fit_with(shift=-0.7)
    found = calibrate(model, fit, Y, num_simulations=100, seed=0)
    assert any("mu[1]: draws too low (VSBC" in reason for reason in found.reasons)


def test_workers_give_the_same_and_nothing_global_changes():
    model, fit = fit_with()
    pyro.param("kept", torch.tensor(1.0))
    before = torch.get_rng_state()
    one, two = (
        calibrate(model, fit, Y, num_simulations=20, num_samples=100, num_workers=num, seed=3) for num in (1, 2)
    )
    assert np.array_equal(one.ranks["mu"], two.ranks["mu"])
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["kept"]
    other = calibrate(model, fit, Y, num_simulations=20, num_samples=100, seed=4)
    assert not np.array_equal(one.ranks["mu"], other.ranks["mu"])


def test_failures_are_counted_and_named():
    model, fit = fit_with(fails=[(-1.0, 1.0)])
    found = calibrate(model, fit, Y, num_simulations=40, num_samples=100, seed=0)
    assert 0 < len(found.failures) < 40
    assert len(found.ranks["mu"]) == 40 - len(found.failures)
    assert set(found.failures.values()) == {"RuntimeError: a bad day"}
    assert f"{len(found.failures)} more failed ({next(iter(found.failures))}" in str(found)


def test_a_flow_fitted_to_each_simulation():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    def fit(simulated):
        guide = AutoFlow(simulated, ElementwiseAffine)
        options = {"learning_rate": 0.1, "num_particles": 8, "eval_particles": 100, "max_steps": 40}
        FlowSVI(simulated, guide, **options, compile=False, progress=False).run()
        return guide

    found = calibrate(model, fit, torch.zeros(5), num_simulations=20, num_samples=200, seed=0)
    assert found.failures == {}
    assert found.calibrated


def test_discrete_and_masked_data_and_a_deterministic_in_a_plate():
    """Whose data must be drawn in their own shape: poutine.uncondition draws the deterministic site again."""
    mask = torch.tensor([True, True, False])

    def model(count):
        with pyro.plate("unit", 3):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.deterministic("log_rate", rate.log())
            with poutine.mask(mask=mask):
                pyro.sample("count", dist.Poisson(rate), obs=count)

    def fit(simulated):
        count = poutine.trace(simulated).get_trace().nodes["count"]["value"] * mask

        def guide():
            with pyro.plate("unit", 3):
                pyro.sample("rate", dist.Gamma(2.0 + count, 1.0 + mask.float()))

        return guide

    found = calibrate(model, fit, torch.zeros(3), num_simulations=100, num_samples=200, seed=0)
    assert found.failures == {}
    assert found.calibrated
    assert found.ranks["rate"].shape == (100, 3)


def test_the_symmetry_test_has_the_size_that_it_says():
    uniform = np.random.default_rng(0).uniform(size=(2000, 50))
    found = np.array([_symmetry(row) for row in uniform])
    assert np.mean(found < 0.05) == pytest.approx(0.04, abs=0.015)  # it has few values
    # The table for two independent samples, which p and 1 - p are not, rejects too often.
    assert np.mean([stats.ks_2samp(row, 1 - row).pvalue < 0.05 for row in uniform]) > 0.07
    assert _symmetry(uniform[0] ** 2) < 0.01
    assert _symmetry(np.full(5, 0.5)) == 1.0


def test_bad_input_gets_a_sentence():
    model, fit = fit_with()
    with pytest.raises(ValueError, match="num_simulations must be a whole number of at least 20; got 3"):
        calibrate(model, fit, Y, num_simulations=3)
    with pytest.raises(ValueError, match="fit failed in all 20 simulations, in the first by ValueError: fit must"):
        calibrate(model, lambda simulated: None, Y, num_simulations=20)

    def factored(y):
        pyro.factor("penalty", -pyro.sample("z", dist.Normal(0.0, 1.0)).abs())
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"model must not have a pyro.factor, .* got 'penalty'"):
        calibrate(factored, fit, torch.tensor(0.0))

    def improper(y):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="model must have a sampler for each site"):
        calibrate(improper, fit, torch.tensor(0.0))
    with pytest.raises(ValueError, match="observed sites, to draw data for; it has none"):
        calibrate(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), fit)
