"""Triangular transport map of second order."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import multiply, solve_triangular, strictly_lower, strictly_lower_index
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.interface.renamed import renamed_keyword
from pyro_nf.networks import ContextParameters

# E sqrt(1 + z^2) over a standard normal: the mean by which the skewing function would shift.
_MEAN_ROOT = 1.3545308
# Where coordinates and log scales stop growing: far outside of what matters for a posterior, so that squares of squares
# of a far point, or a scale e^100, do not overflow.
_FAR = 10.0


_Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


class _Moved(NamedTuple):
    """What the map makes of points, in its own order: values, logs of the slopes, and what else a Jacobian is of."""

    y: Tensor
    log_slopes: Tensor
    bent: Tensor
    scaled: Tensor
    raw_scale: Tensor
    quadratic_x: Tensor | None


class QuadraticTriangularMap(Flow):
    r"""Triangular transport map of second order: skewness, scales that follow other coordinates, and products of two.

    In the order of `order`, each coordinate is moved, scaled and skewed by those before it:

    `y_k = b_k + sum_j C_kj x_j + sum_{l<=j} B_kjl (x_j x_l - delta_jl) + e^{s_k + sum_j A_kj x_j} S(x_k; c_k)`, j < k,

    `S(x; c) = sinh(asinh x + c) - sinh(c) E sqrt(1 + z^2)`, z standard normal, which for small c is
    `x + c (sqrt(1 + x^2) - E sqrt(1 + z^2))` and grows as e^{+-c} x far out. In B and A a far coordinate stops growing,
    and so does a log scale, at 10: `x (1 + (x / 10)^4)^{-1/4}`. The log-determinant is the sum of log scales and of
    `log cosh(asinh x + c) - log(1 + x^2) / 2`.

    Every density near a normal is, to first order in its third derivatives, such a map of one, in any order of the
    coordinates. Where that is not all, the order tells a funnel, whose scales follow a coordinate, from a banana.

    Forward costs O(dim^3) with products and O(dim^2) without; the inverse as much, one coordinate after another. At
    first it is the identity.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.
        quadratic: Whether to have B, the products of two coordinates, of some dim^3 / 6 entries.

    Attributes:
        order: Which coordinate comes first, which second, and so on, `(dim,)`; see `set_order`.

    References:
        Marzouk, Moselhy, Parno, Spantini (2016), "An introduction to sampling via measure transport",
        arXiv:1602.05023, section 3; Jones, Pewsey (2009), "Sinh-arcsinh distributions", Biometrika 96.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import QuadraticTriangularMap
        >>> QuadraticTriangularMap(2)(torch.ones(2))
        tensor([1., 1.], grad_fn=<IndexSelectBackward0>)
    """

    order: Tensor
    ranks: Tensor
    pairs: Tensor
    entries: Tensor
    triples: Tensor

    @renamed_keyword("bends", "quadratic")
    @checked
    def __init__(self, dim: Size, context_dim: Count = 0, *, quadratic: bool = True) -> None:
        super().__init__((dim,), context_dim)
        zeros, pairs = torch.zeros(dim), torch.zeros(dim * (dim - 1) // 2)
        initial = {"loc": zeros, "log_scale": zeros, "skew": zeros, "shear": pairs, "log_scale_slope": pairs}
        self.register_buffer("pairs", strictly_lower_index(dim, len(pairs)), persistent=False)
        if quadratic:
            # Each product of two coordinates once: third <= second < first.
            first, second, third = torch.meshgrid(*3 * [torch.arange(dim)], indexing="ij")
            is_entry = (third <= second) & (second < first)
            entries = torch.stack([first, second, third])[:, is_entry]
            index = torch.full((dim, dim, dim), entries.shape[1])
            index[tuple(entries)] = torch.arange(entries.shape[1])
            self.register_buffer("entries", entries, persistent=False)
            self.register_buffer("triples", index, persistent=False)
            initial["quadratic"] = torch.zeros(entries.shape[1])
        self.quadratic = quadratic
        self.params = ContextParameters(initial, context_dim)
        self.register_buffer("order", torch.arange(dim))
        self.register_buffer("ranks", torch.arange(dim))

    def set_order(self, order: Tensor) -> None:
        """Let coordinate `order[0]` come first, which moves all others, then `order[1]`, and so on."""
        self.order.copy_(order)
        self.ranks.copy_(order.argsort())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `y` and its log-determinant."""
        moved = self._move(x.index_select(-1, self.order), self._unpack(context))
        return moved.y.index_select(-1, self.ranks), moved.log_slopes.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `x`, found coordinate after coordinate, and its log-determinant."""
        loc, log_scale, skew, shear, log_scale_slope, quadratic = self._unpack(context)
        y = y.index_select(-1, self.order)
        x, log_det = y[..., :0], torch.zeros((), dtype=y.dtype, device=y.device)
        for k in range(y.shape[-1]):
            near = _near(x)
            move = loc[..., k] + (shear[..., k, :k] * x).sum(-1)
            if quadratic is not None:
                part = quadratic[..., k, :k, :k]
                move = move + (_apply(part, near) * near).sum(-1) - _trace(part)
            log_scale_k = _near(log_scale[..., k] + (log_scale_slope[..., k, :k] * near).sum(-1))
            skewed = (y[..., k] - move) * (-log_scale_k).exp()
            bent = torch.asinh(skewed + _MEAN_ROOT * torch.sinh(skew[..., k]))
            found = torch.sinh(bent - skew[..., k])
            log_det = log_det - log_scale_k - _log_cosh(bent) + _log_cosh(bent - skew[..., k])
            x = torch.cat([x, found[..., None]], -1)
        return x.index_select(-1, self.ranks), log_det

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `y`, its log-determinant, and the score of `y`, by the triangular Jacobian."""
        x, params = x.index_select(-1, self.order), self._unpack(context)
        moved = self._move(x, params)
        with torch.no_grad():
            _, _, _, shear, log_scale_slope, quadratic = params
            near_slope = _near_slope(x)[..., None, :]
            log_scale_slopes = _near_slope(moved.raw_scale)[..., None] * log_scale_slope * near_slope
            jacobian = shear + moved.scaled[..., None] * log_scale_slopes + torch.diag_embed(moved.log_slopes.exp())
            if quadratic is not None and moved.quadratic_x is not None:
                other = torch.einsum("...kjl,...j->...kl", quadratic, _near(x))
                jacobian = jacobian + (moved.quadratic_x + other) * near_slope
            squared = 1 + x**2
            log_det_slope = log_scale_slopes.sum(-2) + torch.tanh(moved.bent) / squared.sqrt() - x / squared
            residual = score.index_select(-1, self.order) - log_det_slope
            pushed = solve_triangular(jacobian.mT, residual, upper=True)
        y, pushed = (part.index_select(-1, self.ranks) for part in (moved.y, pushed))
        return y, moved.log_slopes.sum(-1), pushed

    def _unpack(self, context: Tensor | None) -> _Parameters:
        loc, log_scale, skew, shear, log_scale_slope, *rest = self.params(context)
        shear, log_scale_slope = (strictly_lower(part, self.pairs) for part in (shear, log_scale_slope))
        return loc, log_scale, skew, shear, log_scale_slope, strictly_lower(rest[0], self.triples) if rest else None

    def _move(self, x: Tensor, params: _Parameters) -> _Moved:
        loc, log_scale, skew, shear, log_scale_slope, quadratic = params
        near = _near(x)
        move, quadratic_x = loc + multiply(shear, x), None
        if quadratic is not None:
            quadratic_x = torch.einsum("...kjl,...l->...kj", quadratic, near)
            move = move + _apply(quadratic_x, near) - _trace(quadratic)
        raw_scale = log_scale + multiply(log_scale_slope, near)
        log_scale = _near(raw_scale)
        bent = torch.asinh(x) + skew
        scaled = log_scale.exp() * (torch.sinh(bent) - _MEAN_ROOT * torch.sinh(skew))
        log_slopes = log_scale + _log_cosh(bent) - torch.log1p(x**2) / 2
        return _Moved(move + scaled, log_slopes, bent, scaled, raw_scale, quadratic_x)


def _near(x: Tensor) -> Tensor:
    """Return `x (1 + (x / far)^4)^(-1/4)`: x itself as long as it is not far."""
    # Clamped where the result is `far` to rounding, before the fourth power overflows.
    x = x.clamp(-1e4 * _FAR, 1e4 * _FAR)
    return x * (1 + (x / _FAR) ** 4) ** -0.25


def _near_slope(x: Tensor) -> Tensor:
    return (1 + (x.clamp(-1e4 * _FAR, 1e4 * _FAR) / _FAR) ** 4) ** -1.25


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix * x[..., None, :]).sum(-1)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.log1p((-2 * x.abs()).exp()) - math.log(2)
