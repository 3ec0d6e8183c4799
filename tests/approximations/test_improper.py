"""Directions along which a posterior is improper."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.improper import flat_directions
from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.programs.coordinates import coordinate_names, model_log_density


def look(model, *args):
    names = coordinate_names(poutine.trace(model).get_trace(*args))
    density = Density(model_log_density(partial(model, *args)))
    torch.manual_seed(0)
    return flat_directions(density.gradients, torch.randn(2 * len(names) + 10, len(names))), names


def hidden():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("cell", 3), poutine.mask(mask=torch.tensor([True, True, False])):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0, 0.0]))


def flat_prior_without_data():
    pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("loc", dist.Normal(0.0, 1.0).mask(False))


def scale_without_data():
    pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("sigma", dist.HalfNormal(1.0).mask(False))


def only_the_sum_is_seen():
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0).mask(False)) for name in "ab")
    pyro.sample("y", dist.Normal(a + 3 * b, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "place"),
    [
        (hidden, r"along z\[2\]:"),
        (flat_prior_without_data, "along loc:"),
        (scale_without_data, "along sigma:"),
        (only_the_sum_is_seen, "along a combination of a, b:"),
    ],
)
def test_found_and_named(model, place, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found, names = look(model)
    finally:
        torch.set_default_dtype(before)
    assert len(found.basis) == 1
    with pytest.raises(ValueError, match=place):
        raise ValueError(found.describe(names))


def test_wide_priors_heavy_tails_and_different_units_are_no_flat_directions():
    def model():
        a, b = pyro.sample("a", dist.Normal(0.0, 1e4)), pyro.sample("b", dist.Cauchy(0.0, 1e3))
        pyro.sample("c", dist.Laplace(0.0, 1.0))
        pyro.sample("d", dist.HalfCauchy(25.0))
        pyro.sample("e", dist.Pareto(1.0, 0.5))
        pyro.sample("f", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, 1e-3), obs=torch.tensor(1.0))

    assert not look(model)[0]


def test_the_reference_makes_the_rest_what_it_is():
    found, _ = look(hidden)
    plain = model_log_density(hidden)
    proper = found.made_proper(plain)
    point = torch.tensor([0.3, 1.0, -1.0, 0.7])  # mu, z
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(proper(point), plain(point) + normal.log_prob(point[3]))


def test_a_slope_goes_out():
    found, _ = look(scale_without_data)
    proper = found.made_proper(model_log_density(scale_without_data))
    points = torch.tensor([[0.5, -1.0], [0.5, 2.0]])
    values = torch.stack([proper(point) for point in points])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(points).sum(-1)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_a_fit_leaves_it_out_and_names_it_and_so_does_the_verdict():
    pyro.clear_param_store()
    guide = AutoFlow(hidden)
    result = FlowSVI(hidden, guide, seed=0, progress=False).run()
    assert result.converged
    assert result.notes[0].startswith("The posterior is improper along z[2]:")
    # Of mu given the two that are seen, y = 1 and 2 with variance 2 each.
    draws = guide.sample_posterior(4000)["mu"]
    assert float(draws.mean()) == pytest.approx(0.75, abs=0.05)
    assert float(draws.std()) == pytest.approx(0.5**0.5, abs=0.05)
    diagnosis = diagnose(hidden, guide, num_samples=1000, num_sets=1)
    assert diagnosis.verdict == "not right"
    assert diagnosis.reasons[0].endswith("Along all other directions the guide is right.")
