"""Numerics that several flows share: bounded scales, roots and their gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# softplus(x + SOFTPLUS_SHIFT) is 1 at x = 0, which makes raw parameters of 0 the identity.
SOFTPLUS_SHIFT = math.log(math.e - 1)
# A single scale lies between e^-30 and e^30 (1e-13 and 1e13): beyond what a posterior's units need, within float32.
LOG_SCALE_BOUND = 30.0


def positive(raw: Tensor) -> Tensor:
    """Map R to (0, inf) with 0 -> 1, growing linearly: `softplus(raw + log(e - 1))`."""
    return torch.nn.functional.softplus(raw + SOFTPLUS_SHIFT)


def soft_bound(raw: Tensor, bound: float) -> Tensor:
    """Map R to (-bound, bound) smoothly, with slope 1 at 0: `raw / (1 + |raw| / bound)`."""
    return raw / (1 + raw.abs() / bound)


def unbound(value: Tensor, bound: float) -> Tensor:
    """Undo `soft_bound`, for |value| < bound."""
    return value / (1 - (value / bound).abs())


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `A x` for points `(*batch, n)` and a matrix `(m, n)`, or one for each, `(*batch, m, n)`."""
    if matrix.dim() == 2:  # one product for all points
        return torch.nn.functional.linear(x, matrix)
    product: Tensor = (matrix @ x[..., None])[..., 0]
    return product


def strictly_lower_index(dim: int, num_entries: int) -> Tensor:
    """Return where each entry of a strictly lower triangular matrix stands in its entries, zeros at `num_entries`."""
    index = torch.full((dim, dim), num_entries)
    index[tuple(torch.tril_indices(dim, dim, -1))] = torch.arange(dim * (dim - 1) // 2)
    return index


def strictly_lower(entries: Tensor, index: Tensor) -> Tensor:
    """Fill strictly lower triangular matrices, `(*batch, num_entries)` to `(*batch, dim, dim)`, or tensors like them.

    Gathering keeps the matrix free of in-place writes; `index` is that of `strictly_lower_index`.
    """
    flat = torch.nn.functional.pad(entries, (0, 1)).index_select(-1, index.flatten())
    matrix: Tensor = flat.unflatten(-1, index.shape)
    return matrix


def solve_triangular(matrix: Tensor, y: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """Solve `A x = y` for points `(*batch, n)` and a triangular matrix `(n, n)`, or one for each, `(*batch, n, n)`."""
    if matrix.dim() == 2:  # all points are the rows of one system, X A' = Y
        rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
        solved: Tensor = torch.linalg.solve_triangular(
            matrix.mT, rows, upper=not upper, left=False, unitriangular=unitriangular
        )
        return solved.reshape(y.shape)
    columns: Tensor = torch.linalg.solve_triangular(matrix, y[..., None], upper=upper, unitriangular=unitriangular)
    return columns[..., 0]


@torch.no_grad()
def solve_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Solve `f(x) = target` for an increasing elementwise function, `lower <= x <= upper`.

    Halvings of the bracket find half of the digits, and Newton steps, which double them and stay inside the bracket,
    the others. The number of steps is fixed by the dtype, so that the loop is the same for every input and can be
    batched and compiled. The result carries no gradient: see `implicit_gradient`.

    Args:
        function: Returns `f(x)` and its slope.
        target: Right hand side.
        lower: Where f is not above the target.
        upper: Where f is not below the target.
    """
    # 8 more for functions that bend on a scale much smaller than the bracket.
    halvings = math.ceil(-0.5 * math.log2(torch.finfo(target.dtype).eps)) + 8
    x = 0.5 * (lower + upper)
    # Tensors that have shapes alone, on the device "meta", have no digits to find.
    for step in range(1 if target.is_meta else halvings + 4):
        value, slope = function(x)
        above = value > target
        lower, upper = torch.where(above, lower, x), torch.where(above, x, upper)
        x = 0.5 * (lower + upper)
        if step >= halvings:
            newton = torch.where(above, upper, lower) - (value - target) / slope
            # Where the slope is too small to divide by, the comparison is false.
            x = torch.where((newton >= lower) & (newton <= upper), newton, x)
    return x


def implicit_gradient(root: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Give a numerically found root its exact first derivatives.

    Where `x(y, theta)` is defined by `f(x; theta) = y`, the implicit function theorem says
    `dx = J^{-1} (dy - d_theta f)`, `J = df/dx`. With the residual `r = y - f(x_0; theta)` at the fixed root `x_0`,
    `x_0 + J^{-1} (r - stop_gradient(r))` has the value `x_0` and just this derivative.

    Args:
        root: `x_0`, without gradient.
        residual: `y - f(x_0; theta)`, with gradients to `y` and `theta`.
        solve: Applies `J^{-1}`, `J` without gradient.
    """
    return root + solve(residual - residual.detach())
