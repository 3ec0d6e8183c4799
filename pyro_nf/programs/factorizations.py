"""Matrix functions that never raise: what they cannot do for a matrix is NaN for that matrix alone.

torch's raise where one matrix of a batch has no factorization, and under `vmap` the batch is all draws.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_nf.compiler import trees


def _cholesky(matrix: Tensor, upper: bool = False, *, out: None = None) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    return _where(info == 0, factor)


def _inv(A: Tensor, *, out: None = None) -> Tensor:  # noqa: N803 - as torch calls it
    inverse, info = torch.linalg.inv_ex(A)
    return _where(info == 0, inverse)


def _solve(A: Tensor, B: Tensor, *, left: bool = True, out: None = None) -> Tensor:  # noqa: N803 - as torch calls them
    # As torch decides between one vector and many. Not solve_ex, whose derivative solves again, and raises.
    is_vector = B.dim() == 1 or (A.dim() - 1 == B.dim() and B.shape == A.shape[:-1])
    factors, pivots, info = torch.linalg.lu_factor_ex(A)
    right = B[..., None] if is_vector else B
    solution = _where(info == 0, torch.linalg.lu_solve(factors, pivots, right, left=left or is_vector))
    return solution[..., 0] if is_vector else solution


def _lu_factor(A: Tensor, *, pivot: bool = True, out: None = None) -> tuple[Tensor, Tensor]:  # noqa: N803
    factors, pivots, info = torch.linalg.lu_factor_ex(A, pivot=pivot)
    return _where(info == 0, factors), pivots


def _of_finite(function: Callable[..., Any], matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Give a function that raises where entries are not finite the identity there."""
    finite = matrix.isfinite().flatten(-2).all(-1)
    eye = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
    results = function(torch.where(finite[..., None, None], matrix, eye), *args, **kwargs)
    return trees.map_leaves(partial(_where, finite), results)


def _where(usable: Tensor, result: Tensor) -> Tensor:
    if not (result.is_floating_point() or result.is_complex()):
        return result
    return torch.where(usable[(...,) + (None,) * (result.dim() - usable.dim())], result, math.nan)


_RAISES_IF_NOT_FINITE = (
    torch.linalg.eigh,
    torch.linalg.eigvalsh,
    torch.linalg.eig,
    torch.linalg.eigvals,
    torch.linalg.svd,
    torch.linalg.svdvals,
    torch.linalg.pinv,
    torch.pinverse,
    Tensor.pinverse,
    torch.svd,
    Tensor.svd,
)

NEVER_RAISING: dict[Any, Callable[..., Any]] = {
    torch.linalg.cholesky: _cholesky,
    torch.cholesky: _cholesky,
    Tensor.cholesky: _cholesky,
    torch.linalg.inv: _inv,
    torch.inverse: _inv,
    Tensor.inverse: _inv,
    torch.linalg.solve: _solve,
    torch.linalg.lu_factor: _lu_factor,
    **{function: partial(_of_finite, function) for function in _RAISES_IF_NOT_FINITE},
}
"""What replaces functions of torch, of the same arguments; `out` is not taken."""
