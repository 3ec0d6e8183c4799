import functools
import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import to_arviz
from pyro_nf.flows import ElementwiseAffine
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


def plain(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("unit", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, ElementwiseAffine)  # over a normal base the posterior, which is normal
    result = FlowSVI(model, guide, num_particles=64, learning_rate=0.05, max_steps=300, seed=0, progress=False).run(Y)
    return result, to_arviz(model, guide, Y, num_samples=500, num_prior_samples=2000, result=result)


@pytest.fixture
def data(fitted):
    return fitted[1]


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
    assert set(stats.data_vars) == {"log_p", "log_q", "log_weight", "elbo_trace"}
    assert float(np.exp(stats["log_weight"]).sum()) == pytest.approx(1.0)
    assert stats.attrs["reliable"] == 1
    assert stats.attrs["verdict"] == "right"
    assert stats.attrs["draws"] == data["posterior"].attrs["draws"]
    assert stats.attrs["draws"].startswith("the guide's own")
    assert "No L-BFGS runs from other starts were made" in stats.attrs["notes"]
    assert stats.attrs["khat"] < stats.attrs["khat_threshold"]
    expected = dist.Normal(torch.as_tensor(data["posterior"]["theta"].values[0]), 1.0)
    beta = torch.as_tensor(data["posterior"]["beta"].values[0]).sum(-1, keepdim=True)
    log_lik = dist.Normal(expected.loc + beta, 1.0).log_prob(Y)
    assert np.allclose(data["log_likelihood"]["y"].values[0], log_lik, atol=1e-4)


def test_draws_that_need_their_weights_are_said_to():
    def wide(y):
        pyro.sample("mu", dist.Normal(0.6, 0.6))  # the posterior is N(0.6, 0.447)

    attributes = to_arviz(plain, wide, Y, num_samples=2000, num_prior_samples=0)["sample_stats"].attrs
    assert attributes["verdict"] == "right after correction"
    assert attributes["reliable"] == 0
    assert "its sd of mu is 3" in attributes["reasons"]
    assert "% too large" in attributes["reasons"]


def test_arviz_takes_it_there_and_back(data, tmp_path):
    summary = az.summary(data, kind="stats")
    assert {"mu", "theta[0]", "beta[1]"} <= set(summary.index)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    back = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert np.array_equal(back["posterior"]["mu"], data["posterior"]["mu"])
    assert back["sample_stats"].attrs["khat"] == data["sample_stats"].attrs["khat"]
    assert back["sample_stats"].attrs["verdict"] == "right"


def groups(data):
    return {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)} - {""}


def test_all_groups_are_there(data):
    assert groups(data) == {
        "posterior",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "log_likelihood",
        "observed_data",
        "sample_stats",
    }
    assert data["posterior"].attrs["inference_library"] == "pyro_nf"
    assert "one chain" in data["posterior"].attrs["sampling"]


def test_the_fits_trace_has_its_own_dimension(fitted):
    result, data = fitted
    assert data["sample_stats"]["elbo_trace"].dims == ("step",)
    assert np.array_equal(data["sample_stats"]["elbo_trace"], result.history)


def test_predictive_draws_are_of_the_model(data):
    posterior, predicted = data["posterior"], data["posterior_predictive"]["y"]
    assert predicted.dims == ("chain", "draw", "unit")
    residual = predicted - posterior["theta"] - posterior["beta"].sum("beta_dim_0")
    assert float(residual.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(residual.std()) == pytest.approx(1.0, abs=0.1)
    prior, drawn = data["prior"], data["prior_predictive"]["y"]
    assert drawn.dims == ("chain", "draw", "unit")
    assert float(prior["beta"].std()) == pytest.approx(1.0, abs=0.1)
    assert np.allclose(prior["twice"], 2 * prior["mu"])
    residual = drawn - prior["theta"] - prior["beta"].sum("beta_dim_0")
    assert float(residual.std()) == pytest.approx(1.0, abs=0.1)
    assert float(drawn.std()) == pytest.approx(5**0.5, abs=0.15)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of 500 draws
def test_arviz_works_on_it(data):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    az.plot_pair(data, var_names=["mu", "beta"])
    plt.close("all")
    assert az.loo(data)["n_data_points"] == 4


def test_events_nested_plates_deterministics_integers_and_float64():
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    counts = torch.tensor([[1, 4, 0], [2, 2, 7]])

    def nested(x, counts, vectors, options, offset=0.5):
        with pyro.plate("column", 3, dim=-1):
            level = pyro.sample("level", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0))
            shifted = pyro.deterministic("shifted", level + offset)
            with pyro.plate("row", 2, dim=-2):
                pyro.sample("counts", dist.Poisson(shifted.exp()), obs=counts)
            pyro.sample("vectors", dist.Normal(shifted[:, None] + x, 1.0).to_event(1), obs=vectors.double())
        pyro.sample("total", dist.Normal(level.sum(), 1.0), obs=options["total"])

    options = {"total": torch.tensor(0.3, dtype=torch.float64), "scale": torch.ones(2)}
    args = (x, counts, x.float() + 1, options)
    data = to_arviz(nested, AutoNormal(nested), *args, num_samples=100, num_prior_samples=50)
    assert data["posterior"]["level"].dtype == np.float64
    assert data["posterior"]["shifted"].dims == ("chain", "draw", "column")
    for group, draws in (("posterior_predictive", 100), ("prior_predictive", 50)):
        assert dict(data[group]["counts"].sizes) == {"chain": 1, "draw": draws, "row": 2, "column": 3}
        assert data[group]["vectors"].dims == ("chain", "draw", "column", "vectors_dim_1")
        assert data[group]["total"].dims == ("chain", "draw")
    assert data["observed_data"]["counts"].dtype == np.int64
    assert data["observed_data"]["counts"].dims == ("row", "column")
    assert data["log_likelihood"]["vectors"].dims == ("chain", "draw", "column")
    assert data["log_likelihood"]["total"].dims == ("chain", "draw")
    assert set(data["constant_data"].data_vars) == {"x", "scale"}
    assert data["constant_data"]["x"].dims == ("column", "x_dim_1")
    log_lik = sum(
        data["log_likelihood"][name].sum(dim)
        for name, dim in (("counts", ["row", "column"]), ("vectors", "column"), ("total", ()))
    )
    prior = dist.Normal(0.0, 1.0).log_prob(torch.as_tensor(data["posterior"]["level"].values)).sum(-1)
    assert np.allclose(data["sample_stats"]["log_p"], log_lik + prior.numpy())


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_masked_data_are_nan_and_predicted(kind, tmp_path):
    mask = torch.tensor([True, False, True])

    def masked(y, seen):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("unit", 3), poutine.mask(mask=seen):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([1, 0, 3], dtype=kind)
    if kind.is_floating_point:
        y[1] = math.nan
    data = to_arviz(masked, AutoFlow(masked), y, mask, num_samples=100, num_prior_samples=0)
    assert np.array_equal(data["observed_data"]["y"], [1, math.nan, 3], equal_nan=True)
    assert np.isfinite(data["posterior_predictive"]["y"]).all()
    assert (data["log_likelihood"]["y"][..., 1] == 0).all()
    assert set(data["constant_data"].data_vars) == {"seen"}
    assert "prior" not in groups(data)
    data.to_netcdf(str(tmp_path / "masked.nc"))


def test_factors_have_no_data():
    def factored(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -z.abs())
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    data = to_arviz(factored, AutoFlow(factored), torch.tensor(0.5), num_samples=100)
    assert set(data["observed_data"].data_vars) == set(data["log_likelihood"].data_vars) == {"y"}
    assert set(data["posterior_predictive"].data_vars) == set(data["prior_predictive"].data_vars) == {"y"}


def test_what_cannot_be_drawn_is_left_out_and_named():
    def improper(y):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoFlow(improper)
    with pytest.warns(UserWarning, match="prior is left out, for the model cannot draw it"):
        data = to_arviz(improper, guide, torch.tensor(0.5), num_samples=100)
    assert "posterior_predictive" in groups(data)
    assert "prior" not in groups(data)
    to_arviz(improper, guide, torch.tensor(0.5), num_samples=100, num_prior_samples=0)


def test_names_that_the_model_and_to_arviz_share():
    def plain(y, num_samples=3):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("mu_plate", num_samples):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.zeros(3)
    with pytest.raises(ValueError, match="num_samples=100 may be meant for to_arviz or for the model"):
        to_arviz(plain, AutoFlow(plain), y, num_samples=100)
    to_arviz(plain, AutoFlow(plain), y, 3, num_samples=100)
    bound = functools.partial(plain, num_samples=3)
    data = to_arviz(bound, AutoFlow(bound), y, num_samples=100)
    assert data["posterior"].sizes["draw"] == 100

    def clashing(chain):
        pyro.sample("draw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=chain)

    with pytest.raises(ValueError, match="site 'draw' must be renamed"):
        to_arviz(clashing, AutoFlow(clashing), torch.tensor(0.0), num_samples=100)


def test_modules_handlers_and_plates_named_as_data():
    class Regression(pyro.nn.PyroModule):
        def forward(self, x, group, *rest):
            with pyro.plate("group", 3):
                level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("unit", 4):
                pyro.sample("y", dist.Normal(level[group] * x, 1.0))

    x, group = torch.arange(4.0) + 1, torch.tensor([0, 1, 2, 0])
    conditioned = poutine.condition(Regression(), data={"y": Y})
    data = to_arviz(conditioned, AutoFlow(conditioned), x, group, torch.ones(2), num_samples=100)
    assert set(data["constant_data"].data_vars) == {"x", "group", "rest_0"}
    assert data["constant_data"]["x"].dims == data["constant_data"]["group"].dims == ("unit",)
    assert data["posterior"]["level"].dims == ("chain", "draw", "group")
    assert np.array_equal(data["observed_data"]["y"], Y)


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 100; got 5"):
        to_arviz(model, AutoFlow(model), Y, num_samples=5)
    with pytest.raises(ValueError, match="num_prior_samples must be a whole number of at least 0; got -1"):
        to_arviz(model, AutoFlow(model), Y, num_prior_samples=-1)
    with pytest.raises(ValueError, match=r"model must be a function .* got None"):
        to_arviz(None, AutoFlow(model), Y)
