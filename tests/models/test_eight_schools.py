import pyro
import pytest
import torch
from pyro import poutine

from pyro_nf.models import eight_schools


def test_the_exact_evidence_is_the_published_one():
    grid = eight_schools.grid_posterior(*eight_schools.data())
    assert grid.log_evidence == pytest.approx(-31.31, abs=0.01)
    cell = (grid.mu[1] - grid.mu[0]) * (grid.log_tau[1] - grid.log_tau[0])
    assert float(grid.density.sum() * cell) == pytest.approx(1.0, abs=1e-6)
    finer = eight_schools.grid_posterior(*eight_schools.data(), num_mu=800, num_log_tau=800)
    assert finer.log_evidence == pytest.approx(grid.log_evidence, abs=1e-5)


def test_the_marginal_integrates_theta_out(float64):
    sigma, y = eight_schools.data(dtype=torch.float64)
    mu, tau = torch.tensor(3.0), torch.tensor(4.0)
    # theta_j given y_j is normal: importance sampling from it has no variance at all.
    precision = 1 / tau**2 + 1 / sigma**2
    posterior = torch.distributions.Normal((mu / tau**2 + y / sigma**2) / precision, precision**-0.5)
    theta = posterior.sample()
    values = {"mu": mu, "tau": tau, "theta": theta}
    trace = poutine.trace(poutine.condition(eight_schools.centered, data=values)).get_trace(sigma, y)
    log_marginal = trace.log_prob_sum() - posterior.log_prob(theta).sum()
    assert torch.allclose(eight_schools.log_marginal(mu, tau, sigma, y), log_marginal)


def test_both_forms_are_one_model(float64):
    sigma, y = eight_schools.data(dtype=torch.float64)
    mu, tau, trans = torch.tensor(1.0), torch.tensor(2.0), torch.randn(8)
    centered = {"mu": mu, "tau": tau, "theta": mu + tau * trans}
    noncentered = {"mu": mu, "tau": tau, "theta_trans": trans}
    one = poutine.trace(poutine.condition(eight_schools.centered, data=centered)).get_trace(sigma, y)
    two = poutine.trace(poutine.condition(eight_schools.noncentered, data=noncentered)).get_trace(sigma, y)
    assert torch.allclose(one.log_prob_sum() + 8 * tau.log(), two.log_prob_sum())
    assert torch.allclose(two.nodes["theta"]["value"], centered["theta"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [eight_schools.centered, eight_schools.noncentered])
def test_dtype_follows_the_data_and_y_can_be_predicted(model, dtype):
    sigma, _ = eight_schools.data(dtype=dtype)
    trace = poutine.trace(model).get_trace(sigma)
    assert trace.nodes["mu"]["value"].dtype == trace.nodes["y"]["value"].dtype == dtype
    assert trace.nodes["y"]["value"].shape == (8,)
    assert pyro.get_param_store().keys() == set()
