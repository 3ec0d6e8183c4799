import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import loo, to_arviz

Y = torch.tensor([0.5, -1.0, 2.0, 1.5, 0.1, -0.4, 0.9, 1.2], dtype=torch.float64)


def model(y, sigma=1.0):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    with pyro.plate("unit", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def guide_for(sigma=1.0, scale_factor=1.0, shift=0.0):
    """The exact posterior, or one off by so many standard deviations."""

    def guide(y, **_):
        precision = 1 + len(y) / sigma**2
        sd = precision**-0.5
        pyro.sample("mu", dist.Normal(y.sum() / sigma**2 / precision + shift * sd, scale_factor * sd))

    return guide


def exact_loo(y, sigma=1.0):
    """log p(y_i | the others), for each i."""
    found = []
    for i in range(len(y)):
        rest = torch.cat([y[:i], y[i + 1 :]])
        precision = 1 + len(rest) / sigma**2
        loc = rest.sum() / sigma**2 / precision
        found.append(dist.Normal(loc, (1 / precision + sigma**2) ** 0.5).log_prob(y[i]))
    return torch.stack(found).numpy()


def pointwise(found):
    return found["loo_i" if "loo_i" in dir(found) else "elpd_i"]


def total(found):
    return float(pointwise(found).sum())


@pytest.mark.parametrize(("scale_factor", "shift"), [(1.0, 0.0), (1.3, 0.3), (1.5, -0.5)])
def test_it_is_leave_one_out_whatever_the_guide(scale_factor, shift):
    data = to_arviz(model, guide_for(1.0, scale_factor, shift), Y, num_samples=20_000)
    found = loo(data)
    exact = exact_loo(Y)
    assert np.allclose(pointwise(found), exact, atol=0.03)
    assert total(found) == pytest.approx(exact.sum(), abs=0.05)
    assert found["se"] == pytest.approx(math.sqrt(len(Y) * exact.var()), rel=0.1)  # by n or, in ArviZ 1.3, n - 1
    assert not found["warning"]
    if shift:  # which ArviZ, for it takes the draws to be the posterior's, does not find
        assert abs(total(az.loo(data, pointwise=True)) - exact.sum()) > 0.1


def test_for_exact_draws_it_is_arvizs():
    data = to_arviz(model, guide_for(), Y, num_samples=4000)
    ours, theirs = loo(data), az.loo(data, pointwise=True)
    assert type(ours) is type(theirs)
    assert np.allclose(pointwise(ours), pointwise(theirs), atol=1e-6)
    assert np.allclose(ours["pareto_k"], theirs["pareto_k"], atol=1e-4)
    for name in ("se", "n_samples", "n_data_points", "good_k", "warning"):
        assert ours[name] == pytest.approx(theirs[name])
    assert str(ours).splitlines()[-1] == str(theirs).splitlines()[-1]


def test_it_is_arvizs_for_approximate_posteriors_too():
    stats = pytest.importorskip("arviz_stats")
    data = to_arviz(model, guide_for(1.0, 0.9, 0.2), Y, num_samples=4000)
    ours = loo(data)
    log_p, log_q = data["sample_stats"]["log_p"], data["sample_stats"]["log_q"]
    theirs = stats.loo_approximate_posterior(data, log_p, log_q, pointwise=True)
    assert np.allclose(ours.elpd_i, theirs.elpd_i, atol=1e-10)
    assert np.allclose(ours.pareto_k, theirs.pareto_k, atol=1e-10)
    assert (ours.elpd, ours.se, ours.p) == pytest.approx((theirs.elpd, theirs.se, theirs.p))
    assert str(ours) == str(theirs)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 on pandas 3.1 and matplotlib 3.11
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_arviz_compares_and_plots_it():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    found = {
        name: loo(to_arviz(model, guide_for(sigma, 1.2), Y, sigma=sigma, num_samples=2000))
        for name, sigma in {"right": 1.0, "wide": 4.0}.items()
    }
    table = az.compare(found)
    assert list(table.index) == ["right", "wide"]
    difference = exact_loo(Y).sum() - exact_loo(Y, 4.0).sum()
    assert abs(float(table["elpd_diff"].iloc[1])) == pytest.approx(difference, abs=0.1)
    az.plot_khat(found["right"])
    plt.close("all")


def test_masked_data_are_left_out():
    seen = torch.tensor([True, False] * 4)

    def masked(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        with pyro.plate("unit", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.where(seen, Y, math.nan)
    data = to_arviz(masked, lambda y: guide_for()(Y[seen]), y, num_samples=4000)
    found = loo(data)
    assert found["n_data_points"] == 4
    assert total(found) == pytest.approx(exact_loo(Y[seen]).sum(), abs=0.05)


def test_one_of_several_sites_and_one_number():
    def several(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("first", dist.Normal(mu, 1.0), obs=y[0])
        with pyro.plate("unit", 3):
            pyro.sample("rest", dist.Normal(mu, 1.0), obs=y[1:4])

    data = to_arviz(several, lambda y: guide_for()(y[:4]), Y.float(), num_samples=4000)
    exact = exact_loo(Y[:4])
    assert total(loo(data, var_name="first")) == pytest.approx(exact[0], abs=0.05)
    assert np.allclose(pointwise(loo(data, var_name="rest")), exact[1:], atol=0.05)
    with pytest.raises(ValueError, match="var_name must be one of the observed sites 'first', 'rest'; got None"):
        loo(data)


def test_an_observation_too_influential_is_reported():
    y = torch.cat([Y, torch.tensor([25.0], dtype=Y.dtype)])
    data = to_arviz(model, guide_for(), y, num_samples=1000)
    with pytest.warns(UserWarning, match="k-hat is above 0.67 for 1 of 9 observations"):
        found = loo(data)
    assert found["warning"]


def test_bad_input_gets_a_sentence():
    data = to_arviz(model, guide_for(), Y, num_samples=100)
    with pytest.raises(ValueError, match="got 'x'"):
        loo(data, var_name="x")
    with pytest.raises(ValueError, match="data must hold log_likelihood, and log_p and log_q in sample_stats"):
        loo({"posterior": data["posterior"]})

    def bounded(y):
        top = pyro.sample("top", dist.Uniform(0.0, 3.0))
        pyro.sample("y", dist.Uniform(0.0, top, validate_args=False), obs=y)

    def prior(y):
        pyro.sample("top", dist.Uniform(0.0, 3.0))

    with warnings.catch_warnings():
        data = to_arviz(bounded, prior, torch.tensor(1.0), num_samples=200)
    with pytest.raises(
        ValueError, match="finite log-likelihoods; that of 'y' is NaN or infinite for 61 of 200 draws at 1 of 1 obs"
    ):
        loo(data)


@pytest.fixture(scope="module")
def sound():
    pyro.set_rng_seed(0)
    return to_arviz(model, guide_for(1.0, 1.2), Y, num_samples=400, num_prior_samples=0)


def changed(data, group, name, draws, value, rows=None):
    """The data with these draws' figures (of these rows) replaced."""
    result = data.copy()
    values = result[group][name].values.copy()
    values[(0, draws) if rows is None else (0, draws, rows)] = value
    result[group][name] = (result[group][name].dims, values)
    return result


@pytest.mark.parametrize(
    ("name", "value"), [("log_p", math.nan), ("log_p", math.inf), ("log_q", math.nan), ("log_q", -math.inf)]
)
def test_broken_weights_are_counted(sound, name, value):
    broken = changed(sound, "sample_stats", name, slice(3), value)
    with pytest.raises(ValueError, match=f"{name} in sample_stats is NaN or infinite for 3 of 400 draws"):
        loo(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_likelihoods_are_counted_and_their_observations_named(sound, value):
    broken = changed(sound, "log_likelihood", "y", slice(3), value, 5)
    with pytest.raises(ValueError, match="'y' is NaN or infinite for 3 of 400 draws at 1 of 8 observations, row 5"):
        loo(broken)


def test_draws_outside_the_support_have_no_weight_and_are_counted(sound):
    outside = changed(sound, "sample_stats", "log_p", slice(40), -math.inf)
    with pytest.warns(UserWarning, match="40 of 400 draws lie outside the model's support and have no weight"):
        found = loo(outside)
    rest = loo(sound.isel(draw=slice(40, None)))
    assert np.allclose(pointwise(found), pointwise(rest), atol=0.02)
    with pytest.raises(ValueError, match="data must hold draws inside the model's support"):
        loo(changed(sound, "sample_stats", "log_p", slice(400), -math.inf))


@pytest.mark.parametrize("number", [0, 1, 99])
def test_too_few_draws_get_a_sentence(sound, number):
    with pytest.raises(ValueError, match=f"data must hold at least 100 draws; got {number}"):
        loo(sound.isel(draw=slice(number)))


def test_masked_data_are_never_an_elpd_of_zero(sound):
    nothing = sound.copy()
    nothing["observed_data"]["y"] = nothing["observed_data"]["y"] * math.nan
    with pytest.raises(ValueError, match="data must hold observations of 'y'; all 8 are masked"):
        loo(nothing)
    unknown = changed(sound, "log_likelihood", "y", slice(400), 0.0, slice(2))
    del unknown.observed_data
    with pytest.raises(ValueError, match=r"data must hold observed_data, .* is 0 in all draws for 2 of 8 .*rows 0, 1"):
        loo(unknown)


def test_an_observation_that_is_partly_missing_counts():
    def pairs(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        with pyro.plate("unit", 4):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([4, 2]).to_event(1), obs=y)

    data = to_arviz(pairs, guide_for(), Y.reshape(4, 2), num_samples=400, num_prior_samples=0)
    assert loo(data)["n_data_points"] == 4
    data["observed_data"]["y"][0, 1] = math.nan
    assert loo(data)["n_data_points"] == 4
    data["observed_data"]["y"][0, 0] = math.nan
    assert loo(data)["n_data_points"] == 3
