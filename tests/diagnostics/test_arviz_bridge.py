import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import to_arviz
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

Y = torch.tensor([0.5, -1.0, 2.0, 1.5])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("unit", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta + beta.sum(), 1.0), obs=y)


@pytest.fixture(scope="module")
def data():
    pyro.set_rng_seed(0)
    guide = AutoFlow(model)
    FlowSVI(model, guide, seed=0, progress=False, max_steps=600).run(Y)
    return to_arviz(model, guide, Y, num_samples=500)


def test_groups_dims_and_coords(data):
    posterior = data["posterior"]
    assert dict(posterior["theta"].sizes) == {"chain": 1, "draw": 500, "unit": 4}
    assert posterior["beta"].dims == ("chain", "draw", "beta_dim_0")
    assert list(posterior["unit"].values) == [0, 1, 2, 3]
    assert np.allclose(posterior["twice"], 2 * posterior["mu"])
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "unit")
    assert np.allclose(data["observed_data"]["y"], Y)


def test_weights_and_their_diagnosis(data):
    stats = data["sample_stats"]
    assert set(stats.data_vars) == {"log_p", "log_q", "log_weight"}
    assert float(np.exp(stats["log_weight"]).sum()) == pytest.approx(1.0)
    assert stats.attrs["reliable"] == 1
    assert stats.attrs["khat"] < stats.attrs["khat_threshold"]
    expected = dist.Normal(torch.as_tensor(data["posterior"]["theta"].values[0]), 1.0)
    beta = torch.as_tensor(data["posterior"]["beta"].values[0]).sum(-1, keepdim=True)
    log_lik = dist.Normal(expected.loc + beta, 1.0).log_prob(Y)
    assert np.allclose(data["log_likelihood"]["y"].values[0], log_lik, atol=1e-4)


def test_arviz_takes_it_there_and_back(data, tmp_path):
    summary = az.summary(data, kind="stats")
    assert {"mu", "theta[0]", "beta[1]"} <= set(summary.index)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    back = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert np.array_equal(back["posterior"]["mu"], data["posterior"]["mu"])
    assert back["sample_stats"].attrs["khat"] == data["sample_stats"].attrs["khat"]


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="num_samples must be at least 100; got 5"):
        to_arviz(model, AutoFlow(model), Y, num_samples=5)
