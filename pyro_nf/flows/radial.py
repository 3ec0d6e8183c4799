"""Radial flow."""

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import positive
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters


class Radial(Flow):
    r"""Radial flow, `y = x + beta (x - x0) / (alpha + r)`, `r = ||x - x0||`: expands or contracts around a point.

    `alpha > 0` and `beta = alpha (g - 1)` with `g > 0`, which makes `beta > -alpha` and the map invertible; g starts
    at 1, the identity. With `q = alpha / (alpha + r)`, in (0, 1], distances stretch by `1 + q (g - 1)` across the
    radius and by `1 + q^2 (g - 1)` along it: `log_det = (dim - 1) log(1 + q (g - 1)) + log(1 + q^2 (g - 1))`.

    Both directions cost O(dim). Inverse: with `t = ||y - x0||`, r is the positive root of
    `r^2 + (alpha g - t) r - alpha t = 0`.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Rezende, Mohamed (2015), "Variational inference with normalizing flows", arXiv:1505.05770, equation 14 and
        appendix A.2.
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        initial = {"x0": torch.randn(dim), "raw_alpha": torch.zeros(1), "raw_g": torch.zeros(1)}
        self.params = ContextParameters(initial, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `y` and its log-determinant."""
        x0, alpha, g = self._unpack(context)
        offset = x - x0
        across, along = _stretch(torch.linalg.vector_norm(offset, dim=-1, keepdim=True), alpha, g)
        return x0 + offset * across, self._log_det(across, along)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `x`, by the root of a quadratic, and its log-determinant."""
        x0, alpha, g = self._unpack(context)
        offset = y - x0
        t = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        b = alpha * g - t
        # b = t = 0 cannot be: alpha g > 0. So the root is of a positive number, and has finite gradients.
        root = (b**2 + 4 * alpha * t).sqrt()
        # The two forms of the positive root; each sum is of two terms of one sign, so nothing cancels.
        r = torch.where(b > 0, 2 * alpha * t / (b.abs() + root), 0.5 * (b.abs() + root))
        across, along = _stretch(r, alpha, g)
        return x0 + offset / across, -self._log_det(across, along)

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x0, raw_alpha, raw_g = self.params(context)
        return x0, positive(raw_alpha), positive(raw_g)

    def _log_det(self, across: Tensor, along: Tensor) -> Tensor:
        return ((self.event_shape[0] - 1) * across.log() + along.log()).squeeze(-1)


def _stretch(r: Tensor, alpha: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`1 + q (g - 1)` and `1 + q^2 (g - 1)`, as the weighted means of 1 and g that they are: hence positive."""
    q, rest = alpha / (alpha + r), r / (alpha + r)
    return rest + q * g, rest * (1 + q) + q**2 * g
