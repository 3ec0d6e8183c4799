"""Affine flows: initial values, and the normals that they give."""

import pyro.distributions as dist
import pytest
import torch

from pyro_nf.flows import ElementwiseAffine, Flow, LowerTriangularAffine

both = pytest.mark.parametrize("make", [ElementwiseAffine, LowerTriangularAffine])


@both
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 7.0, 1e12])
def test_starts_at_loc_and_scale(make: type[Flow], scale: float) -> None:
    loc = torch.tensor([1.0, -1000.0], dtype=torch.float64)
    flow = make(2, loc=loc, scale=scale)
    y, log_det = flow.forward_and_log_det(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(y, loc + scale)
    torch.testing.assert_close(log_det, 2 * torch.tensor(scale, dtype=torch.float64).log(), rtol=1e-12, atol=1e-12)


@both
def test_takes_vectors_and_integers(make: type[Flow]) -> None:
    flow = make(3, context_dim=2, loc=1, scale=torch.tensor([1.0, 2.0, 3.0]))
    y, _ = flow.forward_and_log_det(torch.ones(3), torch.randn(2))
    torch.testing.assert_close(y, torch.tensor([2.0, 3.0, 4.0]))


@both
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 1e14, torch.tensor([1.0, -2.0])])
def test_scale_must_be_positive(make: type[Flow], scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be "):
        make(2, scale=scale)


def test_lower_triangular_is_the_full_rank_normal() -> None:
    torch.manual_seed(0)
    flow = LowerTriangularAffine(4).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
    zero = torch.zeros(4, dtype=torch.float64)
    cholesky = torch.autograd.functional.jacobian(flow, zero)
    assert torch.equal(cholesky, cholesky.tril())
    base = dist.Normal(zero, 1.0).to_event(1)
    y = 3 * torch.randn(6, 4, dtype=torch.float64)
    exact = dist.MultivariateNormal(flow(zero), scale_tril=cholesky).log_prob(y)
    torch.testing.assert_close(dist.TransformedDistribution(base, [flow]).log_prob(y), exact)
