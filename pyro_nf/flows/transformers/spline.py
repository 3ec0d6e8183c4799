"""Transformer by a monotone rational-quadratic spline."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_nf.flows.numerics import positive, soft_bound
from pyro_nf.interface.arguments import Positive, Size, checked

# Of a bin's share of the box, times the number of bins, and of the slope at a knot: 8 bins have slopes between 1/72 and
# 72 on average, so that each layer of a deep flow loses no more than two of float32's seven digits.
MIN_BIN = 0.1
MIN_SLOPE = 0.01
# Of the log of the box's half width around its start: the box can shrink and grow 7-fold.
LOG_BOUND_BOUND = 2.0


class RationalQuadraticSpline:
    r"""Monotone rational-quadratic spline on `[-B, B]`, the identity outside.

    Knots `(x_k, y_k)` with slopes `d_k` (1 at both ends) split the box into bins; in a bin, with
    `t = (x - x_k) / w`, `w = x_{k+1} - x_k`, `h = y_{k+1} - y_k` and `s = h / w`,

        y = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_{k+1} + d_k - 2 s) t (1 - t)).

    The box is part of the parameters: B depends, as everything else, on what the network sees. With all parameters 0
    the bins are equal, all slopes 1 and the map is the identity. Both directions are formulas; the inverse's root is
    written without cancellation. Points outside the box never enter the formula, so that their gradients are finite.

    Args:
        num_bins: Number of bins.
        bound: B at first; it can shrink and grow by a factor of `e^2`.

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), "Neural spline flows", arXiv:1906.04032, equations 4-8.
    """

    @checked
    def __init__(self, num_bins: Size = 8, bound: Positive = 5.0) -> None:
        self.num_bins = num_bins
        self.bound = bound
        self.num_params = 3 * num_bins

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y` and `log dy/dx`."""
        bound, left, low, slopes = self._knots(params)
        inside = x.abs() < bound
        x_k, w, y_k, h, d_0, d_1 = _bin(torch.where(inside, x, 0.0), left, low, left, slopes)
        t = (torch.where(inside, x, 0.0) - x_k) / w
        s = h / w
        y = y_k + h * (s * t**2 + d_0 * t * (1 - t)) / _denominator(t, s, d_0, d_1)
        return torch.where(inside, y, x), torch.where(inside, _log_slope(t, s, d_0, d_1), 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` and `log dx/dy`."""
        bound, left, low, slopes = self._knots(params)
        inside = y.abs() < bound
        x_k, w, y_k, h, d_0, d_1 = _bin(torch.where(inside, y, 0.0), left, low, low, slopes)
        t = _solve((torch.where(inside, y, 0.0) - y_k) / h, h / w, d_0, d_1)
        x = x_k + w * t
        return torch.where(inside, x, y), torch.where(inside, -_log_slope(t, h / w, d_0, d_1), 0.0)

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The half width of the box, and the knots' places and slopes, `(*batch, dim, num_bins + 1)`."""
        n = self.num_bins
        widths, heights, raw_slopes, raw_bound = params.split((n, n, n - 1, 1), -1)
        bound = (math.log(self.bound) + soft_bound(raw_bound, LOG_BOUND_BOUND)).exp()
        left, low = (self._places(raw, bound) for raw in (widths, heights))
        slopes = pad(MIN_SLOPE + (1 - MIN_SLOPE) * positive(raw_slopes), (1, 1), value=1.0)
        return bound[..., 0], left, low, slopes

    def _places(self, raw: Tensor, bound: Tensor) -> Tensor:
        shares = MIN_BIN / self.num_bins + (1 - MIN_BIN) * raw.softmax(-1)
        return bound * (2 * pad(shares.cumsum(-1), (1, 0)) - 1)


def _bin(value: Tensor, left: Tensor, low: Tensor, knots: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """`x_k, w, y_k, h, d_k, d_{k+1}` of the bin in which the value lies among these knots."""
    k = (value[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)
    (x_0, x_1), (y_0, y_1), (d_0, d_1) = (
        [tensor.expand(*k.shape[:-1], -1).gather(-1, index)[..., 0] for index in (k, k + 1)]
        for tensor in (left, low, slopes)
    )
    return x_0, x_1 - x_0, y_0, y_1 - y_0, d_0, d_1


def _denominator(t: Tensor, s: Tensor, d_0: Tensor, d_1: Tensor) -> Tensor:
    # s + (d_0 + d_1 - 2 s) t (1 - t), as a sum of positive terms: 2 t (1 - t) <= 1/2.
    between = t * (1 - t)
    return s * (1 - 2 * between) + (d_0 + d_1) * between


def _log_slope(t: Tensor, s: Tensor, d_0: Tensor, d_1: Tensor) -> Tensor:
    # All terms are positive.
    slope = d_1 * t**2 + 2 * s * t * (1 - t) + d_0 * (1 - t) ** 2
    return 2 * (s.log() - _denominator(t, s, d_0, d_1).log()) + slope.log()


def _solve(r: Tensor, s: Tensor, d_0: Tensor, d_1: Tensor) -> Tensor:
    """The t in [0, 1] at which the spline has risen by the share r of its bin's height.

    It solves a quadratic, `a t^2 + b t - s r = 0`, whose discriminant works out as `e^2 + 4 s^2 r (1 - r)` with
    `e = d_0 (1 - r) - d_1 r`: positive, because e is not 0 where r is 0 or 1. The root is `2 s r / (2 s r + p)`,
    `p = e + sqrt(...)`, and p is written as a ratio of positive terms where e < 0.
    """
    e = d_0 * (1 - r) - d_1 * r
    product = 4 * s**2 * r * (1 - r)
    root = (e**2 + product).sqrt()
    p = torch.where(e > 0, e + root, product / (root + e.abs()))
    return 2 * s * r / (2 * s * r + p)
