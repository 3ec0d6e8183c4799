"""The evidence of each datum: options within bounds, and what cannot be had counted and named."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import local_evidence

X = torch.tensor([1.0, 2.0, 3.0])


def model(x):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


@pytest.mark.parametrize("chunk_size", [1, 3, 50])
def test_chunks_of_any_size_give_the_evidence(chunk_size):
    found = local_evidence(model, guide, X, num_samples=5, chunk_size=chunk_size)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    assert torch.allclose(found.elbo, exact, atol=1e-5)
    assert torch.allclose(found.log_evidence, exact, atol=1e-5)


@pytest.mark.parametrize("name", ["num_samples", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, math.nan, "3", None])
def test_options_out_of_range_get_a_sentence(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1; got"):
        local_evidence(model, guide, X, **{name: value})


def broken_at(x, rows, value):
    """A model whose density is so in these rows."""
    density = torch.zeros(len(x))
    density[rows] = value

    def broken(x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("density", dist.Unit(density + 0 * z, validate_args=False), obs=z.new_empty(len(x), 0))

    return broken


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_without_a_density_are_counted_and_named(value):
    x = torch.zeros(10)
    with pytest.raises(ValueError, match=r"1 of 10 data have .* weight, row 4 \(row 4 in 7 of 7 draws\)"):
        local_evidence(broken_at(x, [4], value), guide, x, num_samples=7)
    with pytest.raises(ValueError, match=r"7 of 10 data have .* weight, rows 0, 1, 2, 3, 4 and 2 more"):
        local_evidence(broken_at(x, list(range(7)), value), guide, x, num_samples=7)


def test_data_outside_the_support_have_no_evidence_and_are_named():
    with pytest.warns(UserWarning, match="no draw of .* support for 1 of 3 data, row 1: their log evidence is minus"):
        found = local_evidence(broken_at(X, [1], -math.inf), guide, X, num_samples=7)
    assert found.log_evidence.isneginf().tolist() == [False, True, False]
