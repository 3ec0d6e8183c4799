"""Linear flows: diagonal, by an LU factorisation, and rotations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf.flows.affine import LOG_SCALE_BOUND
from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import soft_bound
from pyro_nf.networks import ContextParameters

# Of |log s| and of the length of the rows of both triangles in `LULinear`. Solving with triangles whose entries grow
# freely multiplies errors from row to row: at 32 dimensions and entries of 5, no digit of float64 would be left.
LU_LOG_SCALE_BOUND = 5.0
LU_ROW_BOUND = 2.0
# How far from orthogonal a start may be: 1e-5 is single precision, or numbers typed with five decimals.
ORTHOGONALITY = 1e-5


class Diagonal(Flow):
    r"""Scaling of each coordinate, `y = exp(s) x`, with which NICE ends.

    `log_det = sum_i s_i`, with s softly bounded by +-30. Both directions cost O(dim). s starts at 0: the identity.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Dinh, Krueger, Bengio (2014), "NICE", arXiv:1410.8516, section 3.3.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.linear import Diagonal
        >>> Diagonal(2).forward_and_log_det(torch.ones(3, 2))[1].shape
        torch.Size([3])
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters({"log_scale": torch.zeros(dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `exp(s) x` and the sum of s."""
        (raw,) = self.params(context)
        return _scale(x, soft_bound(raw, LOG_SCALE_BOUND))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `exp(-s) y` and minus the sum of s."""
        (raw,) = self.params(context)
        return _scale(y, -soft_bound(raw, LOG_SCALE_BOUND))


class LULinear(Flow):
    r"""Linear map by an LU factorisation, `y = P L (U + diag(exp(s))) x`.

    P is a fixed permutation, L unit lower and U strictly upper triangular. `log_det = sum_i s_i`. Both directions cost
    O(dim^2), the inverse by two triangular solves. It starts as P, which is the identity by default.

    So that the solves stay accurate, s is softly bounded by +-5, and rows of L - I and of diag(exp(-s)) U are softly
    bounded to length 2. A map beyond, such as a rotation by 70 degrees, takes two of these.

    Args:
        dim: Number of coordinates.
        order: The permutation, `(P z)_i = z_{order[i]}`; `None` for none.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If `order` is not a permutation of `0 .. dim - 1`.

    References:
        Kingma, Dhariwal (2018), "Glow", arXiv:1807.03039, equations 10-11. The diagonal is positive here.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.linear import LULinear
        >>> LULinear(3, order=[2, 0, 1])(torch.tensor([1.0, 2.0, 3.0])).detach()
        tensor([3., 1., 2.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, dim: int, order: Sequence[int] | None = None, context_dim: int = 0) -> None:
        super().__init__((dim,), context_dim)
        order = list(range(dim) if order is None else order)
        if sorted(order) != list(range(dim)):
            raise ValueError(f"order must be a permutation of 0 .. {dim - 1}; got {order}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("inverse_order", self.order.argsort())
        self.params = ContextParameters({"packed": torch.zeros(dim, dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply by the factors."""
        lower, log_scale, upper = self._unpack(context)
        z = log_scale.exp() * x + (upper @ x[..., None])[..., 0]
        y = z + (lower @ z[..., None])[..., 0]
        return y[..., self.order], log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve with the factors, last first."""
        lower, log_scale, upper = self._unpack(context)
        column = y[..., self.inverse_order, None]
        z = torch.linalg.solve_triangular(lower, column, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper + log_scale.exp().diag_embed(), z, upper=True)[..., 0]
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # One matrix holds all: L - I below its diagonal, s on it, diag(exp(-s)) U above.
        (packed,) = self.params(context)
        log_scale = soft_bound(packed.diagonal(dim1=-2, dim2=-1), LU_LOG_SCALE_BOUND)
        upper = log_scale.exp()[..., None] * _bounded_rows(packed.triu(1))
        return _bounded_rows(packed.tril(-1)), log_scale, upper


class Rotation(Flow):
    r"""Orthogonal map, `y = R exp(A - A') x`, A strictly lower triangular, R fixed.

    `log_det = 0`, and the inverse is the transpose. `exp` is the matrix exponential of a skew-symmetric matrix: every
    rotation is one. It costs O(dim^3) once for each context, and O(dim^2) for each point, in both directions. A starts
    at zero, so that the flow starts as R.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.
        start: R, an orthogonal matrix `(dim, dim)`; `None` for the identity.
        trainable: Whether there is an A; if not, `y = R x` with any context.

    Raises:
        ValueError: If `start` is not an orthogonal matrix of this size.

    References:
        Rezende, Mohamed (2015), "Variational inference with normalizing flows", arXiv:1505.05770: NICE-ortho
        stands a fixed random R before each coupling.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.linear import Rotation, random_orthogonal
        >>> flow = Rotation(3, start=random_orthogonal(3, torch.Generator().manual_seed(0)))
        >>> y, log_det = flow.forward_and_log_det(torch.tensor([3.0, 0.0, 4.0]))
        >>> round(y.norm().item(), 4), log_det.item()
        (5.0, 0.0)
    """

    start: Tensor
    skew_index: Tensor

    def __init__(self, dim: int, context_dim: int = 0, start: Tensor | None = None, *, trainable: bool = True) -> None:
        super().__init__((dim,), context_dim)
        start = torch.eye(dim) if start is None else start
        if start.shape != (dim, dim) or not _is_orthogonal(start):
            raise ValueError(f"start must be an orthogonal matrix of shape ({dim}, {dim}); got {start}")
        self.register_buffer("start", start.detach().clone())
        self.params = None
        if trainable and dim > 1:  # in one dimension there is no plane to rotate in
            below = dim * (dim - 1) // 2
            # Where each entry of A stands in (skew, 0): gathering keeps the matrix free of in-place writes.
            index = torch.full((dim, dim), below)
            index[tuple(torch.tril_indices(dim, dim, -1))] = torch.arange(below)
            self.register_buffer("skew_index", index.to(start.device))
            self.params = ContextParameters({"skew": torch.zeros(below).to(start)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate, and return zero."""
        y = (self._matrix(context) @ x[..., None])[..., 0]
        return y, torch.zeros_like(y[..., 0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate back, and return zero."""
        x = (self._matrix(context).mT @ y[..., None])[..., 0]
        return x, torch.zeros_like(x[..., 0])

    def _matrix(self, context: Tensor | None) -> Tensor:
        if self.params is None:
            matrix = self.start if context is None else self.start.expand(*context.shape[:-1], *self.start.shape)
        else:
            (skew,) = self.params(context)
            below = torch.nn.functional.pad(skew, (0, 1))[..., self.skew_index]
            matrix = self.start @ torch.linalg.matrix_exp(below - below.mT)
        # One step of Newton and Schulz towards the nearest orthogonal matrix, which squares the distance to it: single
        # precision, in which the start was kept, becomes double, and the rounding of the exponential is mended.
        return 1.5 * matrix - 0.5 * matrix @ (matrix.mT @ matrix)


def random_orthogonal(dim: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Return an orthogonal matrix `(dim, dim)` that is uniformly distributed (Haar).

    Args:
        dim: Number of rows and columns.
        generator: Where to draw from; `None` for torch's global state.

    References:
        Mezzadri (2007), "How to generate random matrices from the classical compact groups", arXiv:math-ph/0609050,
        section 5: Q of a QR factorisation, with the signs of the diagonal of R.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.linear import random_orthogonal
        >>> q = random_orthogonal(4, torch.Generator().manual_seed(0))
        >>> torch.allclose(q @ q.T, torch.eye(4), atol=1e-6)
        True
    """
    # In double precision, so that q is orthogonal to the rounding of the dtype that it is returned in.
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    uniform: Tensor = q * r.diagonal().sign()
    return uniform.to(torch.get_default_dtype())


def _scale(x: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    y = log_scale.exp() * x
    return y, log_scale.sum(-1).expand(y.shape[:-1])


def _bounded_rows(matrix: Tensor) -> Tensor:
    # `soft_bound` of the length of each row.
    length: Tensor = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    return matrix / (1 + length / LU_ROW_BOUND)


def _is_orthogonal(matrix: Tensor) -> bool:
    error = matrix.mT @ matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return bool((error.abs() < ORTHOGONALITY).all())
