"""Planar flow."""

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import implicit_gradient, positive, solve_increasing
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters


class Planar(Flow):
    r"""Planar flow, `y = x + u_hat tanh(w'x + b)`: stretches and compresses along one direction.

    `u_hat = u + (m - 1 - w'u) w / ||w||^2` with `m = positive(w'u) > 0`, so that `w'u_hat = m - 1 > -1` and the map is
    invertible. `positive(0) = 1`: u = 0 is the identity, where the flow starts.
    `log_det = log(tanh^2 + m (1 - tanh^2))`, which is `log(1 + w'u_hat tanh')` written as a sum of positive terms.

    Both directions cost O(dim). The inverse has no formula: `v = w'x + b` solves `v + (m - 1) tanh(v) = w'y + b`, a
    scalar root that is found numerically, with implicit gradients.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Rezende, Mohamed (2015), "Variational inference with normalizing flows", arXiv:1505.05770, equations 10-12 and
        appendix A.1.
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        # Directions of length about 1, so that w'x has unit variance over a standard normal.
        initial = {"u": torch.zeros(dim), "w": torch.randn(dim) / dim**0.5, "b": torch.zeros(1)}
        self.params = ContextParameters(initial, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `y` and its log-determinant."""
        w, b, u_hat, slope = self._unpack(context)
        h = torch.tanh((w * x).sum(-1, keepdim=True) + b)
        return x + u_hat * h, _log_det(h, slope)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `x`, by a scalar root, and its log-determinant."""
        w, b, u_hat, slope = self._unpack(context)
        target = (w * y).sum(-1, keepdim=True) + b
        v = solve_tanh(target, slope)
        h = torch.tanh(v)
        v = implicit_gradient(v, target - (v + (slope - 1) * h), lambda r: r / mean_slope(h, slope).detach())
        h = torch.tanh(v)
        return y - u_hat * h, -_log_det(h, slope)

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, w, b = self.params(context)
        # The small number keeps w = 0 and its gradient finite, and is lost in the rounding of any other w.
        w_squared = (w**2).sum(-1, keepdim=True) + torch.finfo(w.dtype).eps ** 2
        w_u = (w * u).sum(-1, keepdim=True)
        slope = positive(w_u)
        return w, b, u + (slope - 1 - w_u) * w / w_squared, slope


def _log_det(h: Tensor, slope: Tensor) -> Tensor:
    # The argument is positive, because slope is.
    return mean_slope(h, slope).log().squeeze(-1)


def mean_slope(h: Tensor, slope: Tensor) -> Tensor:
    """Return `1 + (slope - 1) tanh'` at `h = tanh`, as the weighted mean of 1 and slope that it is."""
    return h**2 + slope * (1 - h**2)


def solve_tanh(target: Tensor, slope: Tensor) -> Tensor:
    """Solve `v + (slope - 1) tanh(v) = target` for slope > 0, without gradients."""

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(v)
        return v + (slope - 1) * h, mean_slope(h, slope)

    reach = (slope - 1).abs()  # tanh is within +-1
    return solve_increasing(along, target, target - reach, target + reach)
