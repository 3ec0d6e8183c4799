import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.integrate import dblquad, quad

from pyro_nf.models.benchmarks import fertility, hard_posteriors, motorcycle
from pyro_nf.programs.sites import is_latent

RNG = np.random.default_rng(0)
NORMAL = stats.norm.logpdf


def random_values(posterior):
    """Draws of the model, as arrays, with those of flat sites."""
    trace = poutine.trace(posterior.model).get_trace(*posterior.args)
    return {name: site["value"].numpy() for name, site in trace.nodes.items() if is_latent(site)}


def log_density(posterior, values):
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    trace = poutine.trace(poutine.condition(posterior.model, tensors)).get_trace(*posterior.args)
    return float(trace.log_prob_sum())


def funnel(v, x):
    return NORMAL(v, 0, 3) + NORMAL(x, 0, np.exp(v / 2)).sum()


def banana(x1, x2):
    return NORMAL(x1, 0, 10) + NORMAL(x2 + 0.03 * x1**2 - 0.03 * 100, 0, 1)


def many_wells(x, v):
    return (-(x**4) + 6 * x**2 + x / 2 - v**2 / 2).sum()


def fertility_formula(posterior):
    country, decade, log_rate, _ = (np.asarray(arg) for arg in posterior.args)

    def formula(mean, scale, correlation, sigma, line):
        rho = correlation[1, 0]
        covariance = np.outer(scale, scale) * np.array([[1, rho], [rho, 1]])
        # LKJ(2) of two rows: density of rho proportional to 1 - rho^2, that of the factor less d rho / d L = 1.
        prior = NORMAL(mean, [1, 0], [1, 0.5]).sum() + stats.halfnorm.logpdf(scale, scale=[1, 0.5]).sum()
        prior += np.log(0.75 * (1 - rho**2)) + stats.halfnorm.logpdf(sigma, scale=0.5)
        prior += stats.multivariate_normal.logpdf(line, mean, covariance).sum()
        return prior + NORMAL(log_rate, line[country, 0] + line[country, 1] * decade, sigma).sum()

    return formula


def motorcycle_formula(posterior):
    time, y = (arg.numpy() for arg in posterior.args)
    box = 1.5 * np.ptp(time) / 2
    from_left = time - (time.min() + time.max()) / 2 + box

    def process(length_scale, amplitude, weights):
        total = np.zeros_like(time)
        for j, weight in enumerate(weights, 1):
            frequency = j * np.pi / 2 / box
            density = amplitude**2 * np.sqrt(2 * np.pi) * length_scale * np.exp(-((length_scale * frequency) ** 2) / 2)
            total += np.sqrt(density) * weight * np.sin(frequency * from_left) / np.sqrt(box)
        return total

    def formula(**v):
        log_prob, functions = 0.0, []
        for name in ("mean", "noise"):
            offset, length_scale, amplitude, weights = (
                v[f"{name}_{part}"] for part in ("offset", "length_scale", "amplitude", "weights")
            )
            log_prob += NORMAL(offset) + stats.halfnorm.logpdf(length_scale)
            log_prob += stats.halfnorm.logpdf(amplitude, scale=0.5) + NORMAL(weights).sum()
            functions.append(offset + process(length_scale, amplitude, weights))
        return log_prob + NORMAL(y, functions[0], np.exp(functions[1])).sum()

    return formula


def normal_formula(posterior):
    covariance = (posterior.args[0] @ posterior.args[0].mT).numpy()
    precision, log_det = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]
    return lambda z: -0.5 * (z @ precision @ z + log_det + len(z) * np.log(2 * np.pi))


FORMULAS = {
    "banana": lambda posterior: banana,
    "fertility": fertility_formula,
    "funnel": lambda posterior: funnel,
    "many_wells": lambda posterior: many_wells,
    "motorcycle": motorcycle_formula,
    "normal_100": normal_formula,
    "normal_1000": normal_formula,
}
DIMS = {
    "banana": 2,
    "fertility": 408,
    "funnel": 10,
    "many_wells": 32,
    "motorcycle": 66,
    "normal_100": 100,
    "normal_1000": 1000,
}


@pytest.mark.parametrize("name", hard_posteriors.names())
def test_the_log_density_is_the_formula(name):
    posterior = hard_posteriors.load(name)
    formula = FORMULAS[name](posterior)
    for _ in range(5):
        values = random_values(posterior)
        assert log_density(posterior, values) == pytest.approx(formula(**values), rel=1e-9)


@pytest.mark.parametrize("name", hard_posteriors.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_latents_have_the_dtype_and_shapes_of_the_figures(name, dtype):
    posterior = hard_posteriors.load(name, dtype=dtype)
    trace = poutine.trace(posterior.model).get_trace(*posterior.args)
    sites = {site: node["value"] for site, node in trace.nodes.items() if is_latent(node)}
    assert {value.dtype for value in sites.values()} == {dtype}
    # A Cholesky factor of two rows with ones as its rows' norms has one degree of freedom for its four entries.
    assert sum(value.numel() for value in sites.values()) - 3 * ("correlation" in sites) == DIMS[name]
    for figures in (posterior.mean, posterior.sd):
        if figures is not None:
            assert {site: value.shape for site, value in figures.items()} == {s: v.shape for s, v in sites.items()}
            assert {value.dtype for value in figures.values()} == {dtype}
    assert (posterior.mean is None) == (posterior.log_evidence is None) == (name in ("fertility", "motorcycle"))


def test_the_evidence_of_funnel_and_banana_is_one():
    posterior = hard_posteriors.load("banana")
    integral, _ = dblquad(
        lambda x2, x1: math.exp(log_density(posterior, {"x1": x1, "x2": x2})),
        -3.0,
        3.0,
        lambda x1: -0.03 * (x1**2 - 100) - 6,
        lambda x1: -0.03 * (x1**2 - 100) + 6,
        epsabs=1e-4,
    )
    assert integral == pytest.approx(math.erf(0.3 / math.sqrt(2)), abs=1e-4)
    scale = torch.tensor(3.0, dtype=torch.float64)
    narrow = hard_posteriors.HardPosterior("narrow", hard_posteriors.funnel, (scale, 1))
    integral, _ = dblquad(
        lambda x, v: math.exp(log_density(narrow, {"v": v, "x": [x]})),
        -1.0,
        1.0,
        lambda v: -6 * math.exp(v / 2),
        lambda v: 6 * math.exp(v / 2),
        epsabs=1e-4,
    )
    assert integral == pytest.approx(math.erf(1 / 3 / math.sqrt(2)), abs=1e-4)


def test_the_wells_are_as_quadrature_says():
    def density(x):
        return math.exp(0.5 * x + 6 * x**2 - x**4)

    whole, right = quad(density, -5, 5, points=[-1.7, 1.7])[0], quad(density, 0, 5, points=[1.7])[0]
    well = hard_posteriors.double_well()
    assert well.log_integral == pytest.approx(math.log(whole), abs=1e-9)
    assert well.right_mass == pytest.approx(right / whole, abs=1e-9)
    mean = quad(lambda x: x * density(x), -5, 5, points=[-1.7, 1.7])[0] / whole
    square = quad(lambda x: x**2 * density(x), -5, 5, points=[-1.7, 1.7])[0] / whole
    assert well.mean == pytest.approx(mean, abs=1e-9)
    assert well.sd == pytest.approx(math.sqrt(square - mean**2), abs=1e-9)
    evidence = hard_posteriors.load("many_wells").log_evidence
    assert evidence == pytest.approx(16 * (math.log(whole) + math.log(2 * math.pi) / 2))
    assert evidence == pytest.approx(164.696, abs=0.001)  # as published


@pytest.mark.parametrize("name", ["banana", "funnel", "normal_100"])
def test_draws_have_the_exact_moments(name):
    torch.manual_seed(0)
    posterior, num_draws = hard_posteriors.load(name), 20_000
    with pyro.plate("draws", num_draws, dim=-2):
        trace = poutine.trace(posterior.model).get_trace(*posterior.args)
    for site, mean in posterior.mean.items():
        draws = trace.nodes[site]["value"].reshape(num_draws, -1)
        sd = posterior.sd[site].reshape(-1)
        assert float(((draws.mean(0) - mean) / sd).abs().max()) < 5 / math.sqrt(num_draws)
        if site in posterior.width:
            low, high = draws.quantile(draws.new_tensor([0.05, 0.95]), 0)
            assert torch.allclose(high - low, draws.new_tensor(posterior.width[site]), rtol=0.1)
        else:
            assert torch.allclose(draws.std(0), sd, rtol=0.05)


@pytest.mark.parametrize("dim", [2, 100])
def test_the_condition_number_is_as_said(dim):
    factor = hard_posteriors.scale_tril_of_condition(dim)
    variances = torch.linalg.svdvals(factor) ** 2
    expected = torch.logspace(4, -4, dim, dtype=torch.float64)
    assert torch.allclose(variances, expected, rtol=1e-9)
    assert torch.equal(factor, factor.tril())
    assert bool((factor.diagonal() > 0).all())
    assert torch.equal(factor, hard_posteriors.scale_tril_of_condition(dim))


def test_an_unknown_name_is_reported_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"name must be one of banana, .*; got 'funnels'; did you mean 'funnel'\?"):
        hard_posteriors.load("funnels")


def test_the_hilbert_process_has_the_kernel_that_it_approximates():
    time = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64)
    length_scale, amplitude = (
        torch.tensor([0.5, 0.6], dtype=torch.float64),
        torch.tensor([1.5, 0.7], dtype=torch.float64),
    )
    # One row for each weight alone, so that the rows' products add up to the covariance.
    weights = torch.eye(60, dtype=torch.float64)[:, None]
    rows = motorcycle.hilbert_process(time, length_scale, amplitude, weights)
    covariance = torch.einsum("kbi,kbj->bij", rows, rows)
    apart = (time[:, None] - time) ** 2
    kernel = amplitude[:, None, None] ** 2 * torch.exp(-apart / (2 * length_scale[:, None, None] ** 2))
    assert torch.allclose(covariance[0], kernel[0], atol=1e-3)
    assert torch.allclose(covariance[1], kernel[1], atol=5e-3)


def test_a_length_scale_that_empties_the_spectrum_has_finite_gradients():
    time, _ = motorcycle.data(dtype=torch.float64)
    length_scale = torch.tensor(200.0, dtype=torch.float64, requires_grad=True)
    motorcycle.hilbert_process(
        time, length_scale, torch.ones_like(length_scale), torch.ones(40).double()
    ).sum().backward()
    assert bool(length_scale.grad.isfinite())


def test_the_motorcycle_data_are_standardised():
    time, acceleration = motorcycle.data(dtype=torch.float64)
    assert time.shape == acceleration.shape == (133,)
    assert len(time.unique()) == 94
    for column in (time, acceleration):
        assert float(column.mean()) == pytest.approx(0, abs=1e-12)
        assert float(column.std()) == pytest.approx(1, abs=1e-12)
    assert bool((time.diff() >= 0).all())


def test_fertility_has_the_countries_rates_and_no_groups():
    found = fertility.load_fertility(dtype=torch.float64)
    assert found.num_countries == 201
    assert torch.equal(found.country.unique(), torch.arange(201))
    assert set(found.decade.tolist()) == {-2.5, -1.5, -0.5, 0.5, 1.5, 2.5}
    assert found.log_rate.exp()[0].item() == pytest.approx(4.82)  # Aruba, 1960
    assert bool((found.log_rate.exp() > 0.8).all() and (found.log_rate.exp() < 9.5).all())


@pytest.mark.parametrize("model", [fertility.varying_coefficients, motorcycle.heteroscedastic_gp])
def test_data_can_be_drawn(model):
    if model is fertility.varying_coefficients:
        args, site = (torch.tensor([0, 0, 1]), torch.tensor([-0.5, 0.5, 0.5]), None, 2), "log_rate"
    else:
        args, site = (torch.linspace(-1.0, 1.0, 3),), "acceleration"
    trace = poutine.trace(model).get_trace(*args)
    assert trace.nodes[site]["value"].shape == (3,)
