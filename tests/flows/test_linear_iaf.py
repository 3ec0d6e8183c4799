"""Linear IAF beyond conformance: the combination of matrices."""

import pytest
import torch

from pyro_nf.flows.linear_iaf import LinearIAF


def randomised(dim: int, num_matrices: int, context_dim: int) -> LinearIAF:
    torch.manual_seed(0)
    flow = LinearIAF(dim, num_matrices, context_dim).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
    return flow


@pytest.mark.parametrize("num_matrices", [1, 2, 5])
def test_convex_combination_of_unit_lower_triangular_matrices(num_matrices: int) -> None:
    flow = randomised(4, num_matrices, context_dim=3)
    for context in torch.randn(3, 3, dtype=torch.float64):
        (free,) = flow.params(context)
        weights = torch.ones(1).double() if flow.mixture is None else flow.mixture(context).softmax(-1)
        rows, columns = torch.tril_indices(4, 4, -1)
        dense = torch.zeros(4, 4, dtype=torch.float64)
        for weight, entries in zip(weights, free, strict=True):
            single = torch.eye(4, dtype=torch.float64)
            single[rows, columns] = entries
            dense += weight * single
        x = torch.randn(6, 4, dtype=torch.float64)
        y, log_det = flow.forward_and_log_det(x, context)
        torch.testing.assert_close(y, x @ dense.T)
        torch.testing.assert_close(flow.inverse_and_log_det(y, context)[0], x)
        assert torch.equal(log_det, torch.zeros(6, dtype=torch.float64))


def test_own_matrix_gives_a_correlated_normal() -> None:
    flow = randomised(3, 1, context_dim=0)
    eye = torch.eye(3, dtype=torch.float64)
    factor = flow(eye).detach().T
    torch.testing.assert_close(torch.linalg.det(factor @ factor.T).item(), 1.0)
    torch.testing.assert_close(factor, eye + factor.tril(-1))


def test_matrices_part_in_training() -> None:
    torch.manual_seed(0)
    flow = LinearIAF(3, num_matrices=4, context_dim=2)
    context = torch.randn(50, 2)
    y, _ = flow.forward_and_log_det(torch.randn(50, 3), context)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), flow.params.tril)
    assert torch.linalg.matrix_rank(gradient) == 3  # 4 matrices of 3 entries each: no two move alike
    assert torch.cdist(gradient, gradient)[~torch.eye(4, dtype=torch.bool)].min() > 1e-2


def test_a_line_has_nothing_to_train() -> None:
    flow = LinearIAF(1, num_matrices=2, context_dim=3)
    assert not any(p.requires_grad for p in flow.parameters())
    assert torch.equal(flow.condition(torch.randn(4, 3))(torch.ones(1)), torch.ones(4, 1))


@pytest.mark.parametrize(("num_matrices", "context_dim"), [(0, 3), (-1, 0), (5, 0)])
def test_num_matrices_must_fit_the_context(num_matrices: int, context_dim: int) -> None:
    with pytest.raises(ValueError, match=f"num_matrices must be .*; got {num_matrices}"):
        LinearIAF(3, num_matrices, context_dim)
