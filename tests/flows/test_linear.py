"""Linear flows: against dense matrices, far from initialisation, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.linear import Diagonal, LULinear, Rotation, random_orthogonal


def randomised(flow: Flow, scale: float = 1.0) -> Flow:
    torch.manual_seed(0)
    flow = flow.double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn_like(p))
    return flow


def dense(function: Callable[[Tensor], Tensor], dim: int) -> Tensor:
    """The matrix of a linear function."""
    return function(torch.eye(dim, dtype=torch.float64)).detach().T


def test_diagonal_scales_each_coordinate() -> None:
    flow = Diagonal(3)
    with torch.no_grad():
        flow.params.log_scale.copy_(torch.tensor([0.0, 3.0, -1e9]))
    y, log_det = flow.forward_and_log_det(torch.ones(3))
    expected = torch.tensor([0.0, 3 / 1.1, -30.0])  # softly bounded by 30
    torch.testing.assert_close(y, expected.exp())
    torch.testing.assert_close(log_det, expected.sum())


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_lu_is_the_product_of_its_factors(dim: int) -> None:
    order = [*range(1, dim), 0]
    flow = randomised(LULinear(dim, order))
    packed = flow.params.packed.detach()
    s = packed.diagonal() / (1 + packed.diagonal().abs() / 5)
    mixing = packed / dim**0.5
    lower = torch.eye(dim, dtype=torch.float64) + mixing.tril(-1)
    permutation = torch.eye(dim, dtype=torch.float64)[order]
    matrix = permutation @ lower @ (mixing.triu(1) + s.exp().diag())
    torch.testing.assert_close(dense(flow, dim), matrix)
    torch.testing.assert_close(dense(flow.inv, dim), torch.linalg.inv(matrix))
    log_det = flow.forward_and_log_det(torch.zeros(dim, dtype=torch.float64))[1]
    torch.testing.assert_close(log_det, torch.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [1, 2, 3], []])
def test_order_must_be_a_permutation(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"order must be a permutation of 0 .. 2; got"):
        LULinear(3, order)


@pytest.mark.parametrize("dim", [1, 2, 5, 32])
@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0])
def test_rotation_is_orthogonal_at_any_parameters(dim: int, scale: float) -> None:
    flow = randomised(Rotation(dim, start=random_orthogonal(dim)), scale)
    matrix = dense(flow, dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-13 * dim)
    assert torch.equal(dense(flow.inv, dim), matrix.T)


def test_rotation_in_a_plane_turns_by_its_parameter() -> None:
    flow = Rotation(2).double()
    torch.nn.init.constant_(flow.params.skew, 0.3)
    angle = torch.tensor(0.3, dtype=torch.float64)
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    torch.testing.assert_close(dense(flow, 2), turned)


def test_rotation_is_an_exponential_after_the_start() -> None:
    start = random_orthogonal(5)
    flow = randomised(Rotation(5, start=start))
    lower = torch.zeros(5, 5, dtype=torch.float64)
    lower[tuple(torch.tril_indices(5, 5, -1))] = flow.params.skew.detach()
    # A skew-symmetric matrix times i is Hermitian: its exponential by eigenvectors.
    angles, vectors = torch.linalg.eigh(1j * (lower - lower.T))
    exponential = (vectors @ torch.diag((-1j * angles).exp()) @ vectors.mH).real
    torch.testing.assert_close(dense(flow, 5), start.double() @ exponential, rtol=0, atol=1e-6)  # start is in float32


def test_a_fixed_rotation_has_no_parameters() -> None:
    start = random_orthogonal(4, torch.Generator().manual_seed(1))
    flow = Rotation(4, start=start, trainable=False)
    assert not list(flow.parameters())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(flow(x), x @ start.T)
    y, log_det = Rotation(4, 2, start, trainable=False).forward_and_log_det(x[0], torch.zeros(5, 2))
    assert y.shape == (5, 4)
    assert log_det.shape == (5,)


@pytest.mark.parametrize("start", [torch.eye(2), 2 * torch.eye(3), torch.ones(3, 3), torch.full((3, 3), torch.nan)])
def test_start_must_be_orthogonal(start: Tensor) -> None:
    with pytest.raises(ValueError, match=r"start must be an orthogonal matrix of shape \(3, 3\); got"):
        Rotation(3, start=start)


def test_a_start_is_copied() -> None:
    start = torch.eye(2)
    flow = Rotation(2, start=start)
    start.zero_()
    assert torch.equal(flow(torch.ones(2)), torch.ones(2))


def test_random_orthogonal_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_orthogonal(3, generator) for _ in range(2000)])
    torch.testing.assert_close(draws @ draws.mT, torch.eye(3).expand(2000, 3, 3), rtol=0, atol=1e-5)
    # Entries have mean 0 and variance 1/3; without the fix of signs, the diagonal of Q would have one sign.
    torch.testing.assert_close(draws.mean(0), torch.zeros(3, 3), rtol=0, atol=0.06)
    torch.testing.assert_close(draws.square().mean(0), torch.full((3, 3), 1 / 3), rtol=0, atol=0.04)
    assert 0.45 < float((torch.linalg.det(draws) > 0).float().mean()) < 0.55
    first, again = (random_orthogonal(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
