"""Householder flows beyond conformance: reflections, and what they cannot be."""

import pytest
import torch

from pyro_nf.flows.householder import Householder, reflect


def matrix(flow: Householder) -> torch.Tensor:
    return torch.autograd.functional.jacobian(flow, torch.zeros(flow.event_shape, dtype=torch.float64))


def randomised(dim: int, num_reflections: int, seed: int = 0) -> Householder:
    torch.manual_seed(seed)
    flow = Householder(dim, num_reflections).double()
    with torch.no_grad():
        flow.params.directions.copy_(5 * torch.randn(num_reflections, dim))
    return flow


@pytest.mark.parametrize("num_reflections", [1, 2, 5])
def test_product_of_reflections(num_reflections: int) -> None:
    flow = randomised(4, num_reflections)
    product = eye = torch.eye(4, dtype=torch.float64)
    for v in flow.params.directions.detach():
        product = (eye - 2 * torch.outer(v, v) / (v @ v)) @ product
    torch.testing.assert_close(matrix(flow), product, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.linalg.det(product).item(), (-1.0) ** num_reflections)


@pytest.mark.parametrize("num_reflections", [1, 2, 3, 8])
def test_starts_as_identity_or_one_reflection(num_reflections: int) -> None:
    torch.manual_seed(0)
    flow = Householder(3, num_reflections).double()
    eye = torch.eye(3, dtype=torch.float64)
    v = flow.params.directions.detach()[-1]
    start = eye if num_reflections % 2 == 0 else eye - 2 * torch.outer(v, v) / (v @ v)
    torch.testing.assert_close(matrix(flow), start, rtol=0, atol=1e-14)


def test_gradient_parts_a_pair() -> None:
    torch.manual_seed(0)
    flow = Householder(3)
    first, second = torch.autograd.grad((flow(torch.randn(3)) * torch.randn(3)).sum(), flow.params.directions)[0]
    assert first.norm() > 0.1
    torch.testing.assert_close(first, -second)


def test_dim_reflections_reach_an_orthogonal_matrix() -> None:
    # The reflection along a - b takes a to b where both have the same length, and leaves what is orthogonal to both.
    torch.manual_seed(0)
    wanted = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    wanted[:, 0] *= torch.linalg.det(wanted).sign()
    columns, directions = torch.eye(4, dtype=torch.float64), []
    for i in range(4):
        directions.append(columns[i] - wanted[:, i])
        columns = reflect(columns, directions[-1][None])
    flow = Householder(4, 4).double()
    with torch.no_grad():
        flow.params.directions.copy_(torch.stack(directions))
    torch.testing.assert_close(matrix(flow), wanted)


@pytest.mark.parametrize("size", [0.0, 1e-100, 1e100])
def test_vectors_of_any_length(size: float) -> None:
    flow = randomised(3, 3)
    with torch.no_grad():
        flow.params.directions[1] *= size
    x = torch.randn(5, 3, dtype=torch.float64)
    y, _ = flow.forward_and_log_det(x)
    (gradient,) = torch.autograd.grad(y.sum(), flow.params.directions)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(flow.inverse_and_log_det(y)[0], x)


@pytest.mark.parametrize(("num_reflections", "sign"), [(2, 1.0), (3, -1.0)])
def test_a_line_has_nothing_to_train(num_reflections: int, sign: float) -> None:
    flow = Householder(1, num_reflections, context_dim=2)
    assert not any(p.requires_grad for p in flow.parameters())
    torch.testing.assert_close(flow.condition(torch.randn(4, 2))(torch.full((1,), 3.0)), torch.full((4, 1), 3.0 * sign))


def test_num_reflections_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_reflections must be a whole number of at least 1; got 0"):
        Householder(3, 0)
