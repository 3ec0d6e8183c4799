"""Convolutions: against dense circulant matrices and cosine transforms, alone and in a coupling."""

import math

import pytest
import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.convolution import CircularConvolution, ConvolutionCoupling, SymmetricConvolution

dims = pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8])


def randomised(flow: Flow, scale: float = 1.0) -> Flow:
    torch.manual_seed(0)
    flow = flow.double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn_like(p))
    return flow


def dense(flow: Flow, dim: int) -> Tensor:
    """The matrix of a linear flow."""
    return flow(torch.eye(dim, dtype=torch.float64)).detach().T


def cosines(dim: int) -> Tensor:
    """The orthonormal DCT-II."""
    rows = [[math.cos(math.pi * k * (2 * n + 1) / (2 * dim)) for n in range(dim)] for k in range(dim)]
    matrix = torch.tensor(rows, dtype=torch.float64) * math.sqrt(2 / dim)
    matrix[0] /= math.sqrt(2)
    return matrix


@dims
def test_circular_has_a_circulant_matrix(dim: int) -> None:
    flow = randomised(CircularConvolution(dim))
    matrix = dense(flow, dim)
    w = matrix[:, 0]  # the kernel is the first column
    x = torch.randn(dim, dtype=torch.float64)
    expected = torch.stack([sum((w[(i - n) % dim] * x[n] for n in range(dim)), x.new_zeros(())) for i in range(dim)])
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(matrix)[1])
    assert float(torch.linalg.slogdet(matrix)[0]) == 1.0
    torch.testing.assert_close(flow.inv(y), x)


@dims
def test_log_det_is_dim_times_the_first_of_the_cepstrum(dim: int) -> None:
    flow = randomised(CircularConvolution(dim), 0.1)
    c = flow.params.cepstrum.detach()
    gain = torch.fft.fft(c).real.abs().max()
    log_det = flow.forward_and_log_det(torch.zeros(dim, dtype=torch.float64))[1]
    torch.testing.assert_close(log_det, dim * c[0] / (1 + gain / 5))


@dims
def test_the_cepstrum_gives_the_spectrum(dim: int) -> None:
    flow = randomised(CircularConvolution(dim), 0.1)
    log_spectrum = torch.fft.fft(flow.params.cepstrum.detach())
    spectrum = torch.fft.fft(dense(flow, dim)[:, 0])
    torch.testing.assert_close(spectrum, (log_spectrum / (1 + log_spectrum.real.abs().max() / 5)).exp())


@dims
def test_symmetric_is_diagonalised_by_cosines(dim: int) -> None:
    flow = randomised(SymmetricConvolution(dim))
    s = flow.params.log_gain.detach()
    s = s / (1 + s.abs() / 5)
    matrix = cosines(dim).T @ s.exp().diag() @ cosines(dim)
    torch.testing.assert_close(dense(flow, dim), matrix)
    torch.testing.assert_close(flow.forward_and_log_det(torch.zeros(dim, dtype=torch.float64))[1], s.sum())
    torch.testing.assert_close(matrix, matrix.T)


@pytest.mark.parametrize("make", [CircularConvolution, SymmetricConvolution])
@pytest.mark.parametrize("scale", [5.0, 1e6])
def test_gains_are_bounded(make: type[Flow], scale: float) -> None:
    flow = randomised(make(32), scale)
    gains = torch.linalg.svdvals(dense(flow, 32))
    assert math.exp(-5.001) < float(gains.min()) <= float(gains.max()) < math.exp(5.001)
    x = 1000 * torch.randn(10, 32, dtype=torch.float64)
    torch.testing.assert_close(flow.inv(flow(x)), x)


@pytest.mark.parametrize("kind", ["circular", "symmetric"])
def test_coupling_is_block_triangular(kind: str) -> None:
    mask = [True, False, True, True, False, True]
    flow = randomised(ConvolutionCoupling(6, mask, kind=kind, hidden_dims=(4,)), 0.5)  # type: ignore[arg-type]
    x = torch.randn(6, dtype=torch.float64)
    kept, moved = [1, 4], [0, 2, 3, 5]
    params = flow.network(x[kept]).detach().unflatten(-1, (4, 3))
    alone = (CircularConvolution if kind == "circular" else SymmetricConvolution)(4).double()
    (kernel,) = alone.parameters()
    kernel.data = params[:, 0]
    s = params[:, 1] / (1 + params[:, 1].abs() / 5)
    y, log_det = flow.forward_and_log_det(x)
    assert torch.equal(y[kept], x[kept])
    torch.testing.assert_close(y[moved], alone(x[moved]) * s.exp() + params[:, 2])
    jacobian = torch.autograd.functional.jacobian(flow, x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian[moved][:, moved])[1])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1])
    torch.testing.assert_close(flow.inv(y), x)


def test_kind_must_be_known() -> None:
    with pytest.raises(ValueError, match="kind must be 'circular' or 'symmetric'; got 'square'"):
        ConvolutionCoupling(4, kind="square")  # type: ignore[arg-type]


def test_mask_must_fit() -> None:
    with pytest.raises(ValueError, match="mask must hold dim=2 booleans, one of them true; got"):
        ConvolutionCoupling(2, [True])


@pytest.mark.parametrize("make", [CircularConvolution, SymmetricConvolution])
def test_empty_batches_keep_their_shape(make: type[Flow]) -> None:
    flow = make(3, context_dim=2)  # type: ignore[call-arg, arg-type]
    y, log_det = flow.forward_and_log_det(torch.zeros(2, 1, 3), torch.zeros(0, 2))
    assert y.shape == (2, 0, 3)
    assert log_det.shape == (2, 0)
