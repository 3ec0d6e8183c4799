"""Linear flows: diagonal, by an LU factorisation, and rotations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import (
    LOG_SCALE_BOUND,
    multiply,
    soft_bound,
    solve_triangular,
    strictly_lower,
    strictly_lower_index,
)
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters

# Of |log s| in `LULinear`: beside other entries of order 1, pivots far from 1 would make a matrix that is singular to
# rounding.
LU_LOG_SCALE_BOUND = 5.0
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

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
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
    O(dim^2), the inverse by two triangular solves. s is softly bounded by +-5; L and U are trained in units of
    `1 / sqrt(dim)`. It starts as P, which is the identity by default.

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

    @checked
    def __init__(self, dim: Size, order: Sequence[int] | None = None, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        order = list(range(dim) if order is None else order)
        if sorted(order) != list(range(dim)):
            raise ValueError(f"order must be a permutation of 0 .. {dim - 1}; got {order}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("inverse_order", self.order.argsort())
        self.params = ContextParameters({"packed": torch.zeros(dim, dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply by the factors."""
        lower, upper, log_scale = self._unpack(context)
        y = multiply(lower, multiply(upper, x))
        return y.index_select(-1, self.order), log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve with the factors, last first."""
        lower, upper, log_scale = self._unpack(context)
        z = solve_triangular(lower, y.index_select(-1, self.inverse_order), upper=False, unitriangular=True)
        x = solve_triangular(upper, z, upper=True)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # One matrix holds all: L - I below its diagonal, s on it, U above. The triangles are in units of 1 / sqrt(dim):
        # a row sums over up to dim coordinates, and stays of order 1 for any dim.
        (packed,) = self.params(context)
        log_scale = soft_bound(packed.diagonal(dim1=-2, dim2=-1), LU_LOG_SCALE_BOUND)
        mixing = packed / packed.shape[-1] ** 0.5
        lower = mixing.tril(-1) + torch.eye(len(self.order), dtype=packed.dtype, device=packed.device)
        return lower, mixing.triu(1) + log_scale.exp().diag_embed(), log_scale


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

    @checked
    def __init__(
        self, dim: Size, context_dim: Count = 0, start: Tensor | None = None, *, trainable: bool = True
    ) -> None:
        super().__init__((dim,), context_dim)
        start = torch.eye(dim) if start is None else start
        if start.shape != (dim, dim) or not _is_orthogonal(start):
            raise ValueError(f"start must be an orthogonal matrix of shape ({dim}, {dim}); got {start}")
        self.register_buffer("start", start.detach().clone())
        self.params = None
        if trainable and dim > 1:  # in one dimension there is no plane to rotate in
            below = dim * (dim - 1) // 2
            self.register_buffer("skew_index", strictly_lower_index(dim, below).to(start.device))
            self.params = ContextParameters({"skew": torch.zeros(below).to(start)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate, and return zero."""
        y = multiply(self._matrix(context), x)
        return y, torch.zeros_like(y[..., 0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate back, and return zero."""
        x = multiply(self._matrix(context).mT, y)
        return x, torch.zeros_like(x[..., 0])

    def _matrix(self, context: Tensor | None) -> Tensor:
        # One step of Newton and Schulz towards the nearest orthogonal matrix squares the distance to it: a start that
        # was kept in single precision becomes orthogonal in double.
        start = 1.5 * self.start - 0.5 * self.start @ (self.start.mT @ self.start)
        if self.params is None:
            return start if context is None else start.expand(*context.shape[:-1], *start.shape)
        (skew,) = self.params(context)
        below = strictly_lower(skew, self.skew_index)
        rotation: Tensor = start @ torch.linalg.matrix_exp(below - below.mT)
        return rotation


@checked
def random_orthogonal(dim: Size, generator: torch.Generator | None = None) -> Tensor:
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


def _is_orthogonal(matrix: Tensor) -> bool:
    error = matrix.mT @ matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return bool((error.abs() < ORTHOGONALITY).all())
