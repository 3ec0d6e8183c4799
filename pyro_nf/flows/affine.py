"""Affine flows: elementwise, and by a lower triangular matrix."""

import math

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
    unbound,
)
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters


class ElementwiseAffine(Flow):
    r"""Location and scale of each coordinate, `y = loc + scale * x`.

    `log_det = sum_i log scale_i`, with log scales softly bounded by +-30. Both directions cost O(dim). Over a standard
    normal this is the mean-field normal.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.
        loc: Initial location, `(dim,)` or a number.
        scale: Initial scale, positive, `(dim,)` or a number.

    Raises:
        ValueError: If `scale` is not positive.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import ElementwiseAffine
        >>> ElementwiseAffine(2, scale=3.0)(torch.ones(2))
        tensor([3., 3.], grad_fn=<AddBackward0>)
    """

    @checked
    def __init__(
        self, dim: Size, context_dim: Count = 0, *, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0
    ) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters(_initial(dim, loc, scale), context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `loc + scale * x` and the sum of log scales."""
        loc, raw = self.params(context)
        log_scale = soft_bound(raw, LOG_SCALE_BOUND)
        y = loc + log_scale.exp() * x
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `(y - loc) / scale` and minus the sum of log scales."""
        loc, raw = self.params(context)
        log_scale = soft_bound(raw, LOG_SCALE_BOUND)
        x = (y - loc) * (-log_scale).exp()
        return x, -log_scale.sum(-1).expand(x.shape[:-1])


class LowerTriangularAffine(Flow):
    r"""Location, scale and correlation, `y = loc + scale * (x + A x)`, A strictly lower triangular.

    `log_det = sum_i log scale_i`. Both directions cost O(dim^2), the inverse by forward substitution. A starts at zero:
    at first this is `ElementwiseAffine`. Over a standard normal it is the full-rank normal, with Cholesky factor
    `diag(scale) (I + A)`; the scales stand outside so that A has no units.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.
        loc: Initial location, `(dim,)` or a number.
        scale: Initial scale, positive, `(dim,)` or a number.

    Raises:
        ValueError: If `scale` is not positive.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import LowerTriangularAffine
        >>> LowerTriangularAffine(2, loc=torch.tensor([1.0, 2.0]))(torch.zeros(2))
        tensor([1., 2.], grad_fn=<AddBackward0>)
    """

    tril_index: Tensor

    @checked
    def __init__(
        self, dim: Size, context_dim: Count = 0, *, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0
    ) -> None:
        super().__init__((dim,), context_dim)
        initial = _initial(dim, loc, scale)
        below = dim * (dim - 1) // 2
        initial["tril"] = torch.zeros(below, dtype=initial["loc"].dtype, device=initial["loc"].device)
        self.params = ContextParameters(initial, context_dim)
        self.register_buffer("tril_index", strictly_lower_index(dim, below).to(initial["loc"].device))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `loc + scale * (x + A x)` and the sum of log scales."""
        loc, log_scale, matrix = self._unpack(context)
        y = loc + multiply(log_scale.exp()[..., None] * matrix, x)
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for `x` and return minus the sum of log scales."""
        loc, log_scale, matrix = self._unpack(context)
        mixed = (y - loc) * (-log_scale).exp()
        x = solve_triangular(matrix, mixed, upper=False, unitriangular=True)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    @torch.no_grad()
    def assign(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become `y = loc + scale_tril x` (shifted by a context's contribution, if there is one).

        Args:
            loc: `(dim,)`.
            scale_tril: Lower triangular with a positive diagonal, `(dim, dim)`.
        """
        scale = scale_tril.diagonal()
        rows, columns = torch.tril_indices(len(loc), len(loc), -1, device=loc.device)
        values = {**_initial(len(loc), loc, scale), "tril": (scale_tril / scale[:, None])[rows, columns]}
        for name, value in values.items():
            getattr(self.params, name).copy_(value)

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loc, raw, tril = self.params(context)
        eye = torch.eye(len(self.tril_index), dtype=tril.dtype, device=tril.device)
        return loc, soft_bound(raw, LOG_SCALE_BOUND), eye + strictly_lower(tril, self.tril_index)


def _initial(dim: int, loc: Tensor | float, scale: Tensor | float) -> dict[str, Tensor]:
    """Starting parameters for a location and a positive scale, in the dtype and device of `loc`."""
    loc = torch.as_tensor(loc)
    loc = loc if loc.is_floating_point() else loc.to(torch.get_default_dtype())
    scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device)
    if not bool(((scale > math.exp(-LOG_SCALE_BOUND)) & (scale < math.exp(LOG_SCALE_BOUND))).all()):
        raise ValueError(f"scale must be positive, between 1e-13 and 1e13; got {scale}")
    # The argument of log is positive by the check above.
    return {"loc": loc.expand(dim), "log_scale": unbound(scale.log(), LOG_SCALE_BOUND).expand(dim)}
