"""Sylvester flows beyond conformance: the dense formula, the bases, corners of the parameter space."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_nf.flows import Planar
from pyro_nf.flows.sylvester import Sylvester, _orthonormal

BASES: dict[str, dict[str, Any]] = {
    "orthogonal": {"basis": "orthogonal"},
    "orthogonal-2": {"basis": "orthogonal", "num_units": 2},
    "householder": {"basis": "householder"},
    "householder-2": {"basis": "householder", "num_units": 2, "num_reflections": 3},
    "triangular": {"basis": "triangular"},
    "reverse": {"basis": "triangular", "reverse": True},
}
bases = pytest.mark.parametrize("options", BASES.values(), ids=BASES)


def randomised(dim: int, scale: float, context_dim: int = 0, **options: Any) -> Sylvester:
    torch.manual_seed(0)
    flow = Sylvester(dim, context_dim=context_dim, **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn_like(p))
    return flow


def dense_basis(flow: Sylvester) -> Tensor:
    """Q from its definition: Gram-Schmidt, reflections as matrices, or the identity."""
    (dim,), units = flow.event_shape, flow.num_units
    eye = torch.eye(dim, dtype=torch.float64)
    if flow.basis == "triangular":
        return eye.flip(0) if flow.reverse else eye
    frame = flow.params.frame.detach()
    if flow.basis == "householder":
        product = eye
        for v in frame:
            product = product @ (eye - 2 * torch.outer(v, v) / (v @ v))
        return product[:, :units]
    columns: list[Tensor] = []
    for column in frame.T:
        for _ in range(2):  # twice is enough for orthogonality to rounding
            column = column - sum(((q @ column) * q for q in columns), torch.zeros_like(column))
        columns.append(column / column.norm())
    q = torch.stack(columns, 1)
    if units == dim:
        q[:, -1] *= torch.linalg.det(q)
    return q


def dense(flow: Sylvester, x: Tensor) -> Tensor:
    """The paper's formula, in full matrices."""
    matrices, log_scale, b, units = flow.params.matrices, flow.params.log_scale, flow.params.b, flow.num_units
    scale = (log_scale / (1 + log_scale.abs() / 3)).exp()
    slope = torch.nn.functional.softplus(matrices.diagonal() + torch.tensor(1.0).double().expm1().log())
    r1 = torch.diag((slope - 1) / scale) + matrices.triu(1) / units**0.5
    r2 = torch.diag(scale) + matrices.tril(-1).T / units**0.5
    q = dense_basis(flow)
    return x + q @ r1 @ torch.tanh(r2 @ q.T @ x + b)


@bases
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_dense_formula_and_its_determinant(options: dict[str, Any], scale: float) -> None:
    # Parameters far from 0 tell wrong orders of the matrices apart, which small ones hide.
    flow = randomised(4, scale, **options)
    for x in torch.randn(5, 4, dtype=torch.float64):
        y, log_det = flow.forward_and_log_det(x)
        torch.testing.assert_close(y, dense(flow, x))
        jacobian = torch.autograd.functional.jacobian(lambda x: dense(flow, x), x)
        torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1])
        torch.testing.assert_close(flow.inverse_and_log_det(y)[0], x)


@pytest.mark.parametrize("units", [1, 3, 6])
@pytest.mark.parametrize("basis", ["orthogonal", "householder"])
def test_basis_is_orthonormal(basis: Any, units: int) -> None:
    flow = randomised(6, 5.0, context_dim=2, num_units=units, basis=basis)
    *_, project, embed = flow._unpack(5 * torch.randn(20, 2, dtype=torch.float64))
    eye = torch.eye(units, dtype=torch.float64)
    columns = torch.stack([embed(row) for row in eye], -1)
    torch.testing.assert_close(columns.mT @ columns, eye.expand(20, units, units), rtol=0, atol=1e-14)
    torch.testing.assert_close(project(columns[..., 0]), eye[0].expand(20, units), rtol=0, atol=1e-14)


@pytest.mark.parametrize("smallest", [1e-3, 1e-9])
def test_nearly_singular_frame_gives_an_orthonormal_basis_and_finite_gradients(smallest: float) -> None:
    flow = randomised(4, 1.0)
    with torch.no_grad():
        flow.params.frame.copy_(torch.randn(4, 1) + smallest * torch.randn(4, 4, dtype=torch.float64))
    *_, embed = flow._unpack(None)
    columns = torch.stack([embed(row) for row in torch.eye(4, dtype=torch.float64)], -1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(flow(torch.randn(4, dtype=torch.float64)).sum(), flow.params.frame)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("units", [2, 3])
def test_orthogonal_basis_moves_continuously(units: int) -> None:
    # On the way entries of the frame and its determinant change sign, where a plain QR decomposition flips columns.
    start, end = torch.randn(2, 3, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None, None]
    frames = torch.lerp(start, end, t)
    bases = _orthonormal(frames)
    assert bases.diff(dim=0).abs().max() < 0.05
    assert torch.linalg.qr(frames)[0].diff(dim=0).abs().max() > 0.5
    if units == 3:
        assert torch.linalg.det(frames).sign().unique().numel() == 2


@pytest.mark.parametrize("basis", ["orthogonal", "householder"])
def test_fewer_units_leave_the_complement(basis: Any) -> None:
    flow = randomised(6, 5.0, num_units=2, basis=basis)
    q = dense_basis(flow)
    x = torch.randn(50, 6, dtype=torch.float64)
    moved = flow(x) - x
    torch.testing.assert_close(moved @ q @ q.T, moved)
    assert torch.linalg.matrix_rank(moved.detach()) == 2


@pytest.mark.parametrize("basis", ["orthogonal", "householder"])
def test_one_unit_is_a_planar_flow(basis: Any) -> None:
    flow, planar = randomised(4, 2.0, num_units=1, basis=basis), Planar(4).double()
    _, r2, b, _, _, embed = flow._unpack(None)
    q = embed(torch.ones(1, dtype=torch.float64))
    with torch.no_grad():
        planar.params.w.copy_(r2[0, 0] * q)
        planar.params.u.copy_(flow.params.matrices[0, 0] * q / r2[0, 0])  # w'u = raw, hence w'u_hat = m - 1
        planar.params.b.copy_(b)
    x = 3 * torch.randn(20, 4, dtype=torch.float64)
    for got, wanted in zip(flow.forward_and_log_det(x), planar.forward_and_log_det(x), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(flow.inverse_and_log_det(x), planar.inverse_and_log_det(x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_reverse_turns_the_coordinates_around() -> None:
    plain, reverse = (randomised(4, 1.0, basis="triangular", reverse=r) for r in (False, True))
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(reverse(x), plain(x.flip(-1)).flip(-1))
    jacobian = torch.autograd.functional.jacobian(plain, x[0])
    assert torch.equal(jacobian, jacobian.triu())
    assert not torch.equal(jacobian, jacobian.tril())


@bases
def test_every_unit_can_move_from_the_identity(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    flow = Sylvester(4, **options)
    y, log_det = flow.forward_and_log_det(torch.randn(50, 4))
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum() + log_det.sum(), flow.params.matrices)
    r1 = gradient.triu()
    assert bool((r1 != 0).equal(torch.ones_like(r1).triu().bool()))
    assert torch.unique(r1.diagonal()).numel() == flow.num_units


@pytest.mark.parametrize("raw", [1e3, -1e3, 30.0, -30.0])
@bases
def test_extreme_slopes_stay_finite_and_invertible(options: dict[str, Any], raw: float) -> None:
    flow = randomised(3, 1.0, **options)
    with torch.no_grad():
        flow.params.matrices.diagonal().fill_(max(raw, -700.0))
        flow.params.matrices[0, 0] = -raw if raw > -700 else 700.0
    y = torch.cat([torch.randn(20, 3), 1e4 * torch.randn(20, 3), torch.zeros(1, 3)]).double()
    x, log_det = flow.inverse_and_log_det(y)
    again, forward_log_det = flow.forward_and_log_det(x.detach())
    torch.testing.assert_close(again, y, rtol=1e-8, atol=1e-8)
    (x.sum() + log_det.sum() + forward_log_det.sum()).backward()
    assert all(bool(t.isfinite().all()) for t in (x, log_det, again, *(p.grad for p in flow.parameters())))


@pytest.mark.parametrize("basis", ["orthogonal", "householder", "triangular"])
def test_a_line_has_no_direction_to_train(basis: Any) -> None:
    names = [name for name, _ in Sylvester(1, basis=basis).named_parameters()]
    assert names == ["params.matrices", "params.log_scale", "params.b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "cayley"}, "basis must be 'orthogonal', 'householder' or 'triangular'; got 'cayley'"),
        ({"num_units": 0}, "num_units must be a whole number of at least 1; got 0"),
        ({"num_units": 5}, "num_units must lie between 1 and dim=4, .* got 5 for the orthogonal basis"),
        ({"num_units": 3, "basis": "triangular"}, "num_units must .* be dim .* got 3 for the triangular basis"),
        ({"num_reflections": 0, "basis": "householder"}, "num_reflections must be a whole number of at least 1; got 0"),
        ({"num_reflections": 2}, "num_reflections must be .* None but .* got 2 for the orthogonal basis"),
        ({"reverse": True}, "reverse must be False but .* got True for the orthogonal basis"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sylvester(4, **options)
