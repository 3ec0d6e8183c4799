"""Sylvester flow."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_nf.flows.base import Flow
from pyro_nf.flows.householder import reflect
from pyro_nf.flows.numerics import implicit_gradient, multiply, positive, soft_bound, solve_triangular
from pyro_nf.flows.planar import mean_slope, solve_tanh
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters

# The diagonal of R2 lies between e^-3 and e^3: a tanh that is linear over a normal, or a step that is 0.05 wide.
LOG_SCALE_BOUND = 3.0

_Map = Callable[[Tensor], Tensor]


class Sylvester(Flow):
    r"""Sylvester flow, `y = x + Q R1 tanh(R2 Q'x + b)`: planar flows along M directions at once.

    The columns of Q, `(dim, M)`, are orthonormal; R1 and R2, `(M, M)`, are upper triangular. The diagonal of R2 is
    `s > 0`, that of R1 is `(m - 1) / s` with `m = positive(raw) > 0`: their product is above -1, which makes the map
    invertible. `log_det = sum_i log(tanh_i^2 + m_i (1 - tanh_i^2))`, which is `log(1 + r1_ii r2_ii tanh'_i)` written as
    a sum of positive terms. At first R1 = 0, the identity, and R2 = I; Q and b are random, and tell the units apart.

    There are three kinds of Q:

    - `"orthogonal"`: the Gram-Schmidt basis of a free `(dim, M)` matrix, by QR decomposition in O(dim M^2). The paper
      iterates towards the nearest orthonormal matrix instead, in a number of steps that depends on the matrix and grows
      without bound towards singular ones. QR takes the same operations for all, and is exact to rounding. The signs
      that it leaves open are set so that Q is a continuous function of the matrix, and hence of a context.
    - `"householder"`: the first M columns of a product of `num_reflections` reflections, applied in O(dim) each.
    - `"triangular"`: no parameters. Q is the identity, or reverses the coordinates. M = dim.

    Forward costs O(dim M + M^2) beside that. The inverse solves `z + R1 tanh(R2 z + b) = Q'y`, for `z = Q'x`, from the
    last coordinate to the first: M scalar roots, found numerically one after another, O(M^2) in all. Gradients are
    implicit.

    Args:
        dim: Number of coordinates. On a line (1), every basis is the triangular one.
        num_units: M, between 1 and `dim`; `None` for `dim`.
        basis: The kind of Q.
        context_dim: Width of the context; 0 for none.
        num_reflections: Reflections of the Householder basis, at least 1; `None` for M or 8, the smaller. M of them
            reach every Q, up to the sign of a column.
        reverse: Whether the triangular basis starts at the last coordinate. Alternate it between layers.

    Raises:
        ValueError: If `num_units` or `num_reflections` is out of range, `basis` is not known, or an option does not
            belong to the basis.

    References:
        Van den Berg, Hasenclever, Tomczak, Welling (2018), "Sylvester normalizing flows for variational inference",
        arXiv:1803.05649, section 3.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.sylvester import Sylvester
        >>> _ = torch.manual_seed(0)
        >>> y, log_det = Sylvester(5, num_units=2).forward_and_log_det(torch.randn(3, 5))
        >>> log_det.tolist()
        [0.0, 0.0, 0.0]
    """

    @checked
    def __init__(
        self,
        dim: Size,
        num_units: Size | None = None,
        basis: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
        context_dim: Count = 0,
        *,
        num_reflections: Size | None = None,
        reverse: bool = False,
    ) -> None:
        super().__init__((dim,), context_dim)
        units = dim if num_units is None else num_units
        if basis not in ("orthogonal", "householder", "triangular"):
            raise ValueError(f"basis must be 'orthogonal', 'householder' or 'triangular'; got {basis!r}")
        if not 1 <= units <= dim or (basis == "triangular" and units < dim):
            raise ValueError(
                f"num_units must lie between 1 and dim={dim}, and be dim for the triangular basis; got {units} for "
                f"the {basis} basis"
            )
        if num_reflections is not None and basis != "householder":
            raise ValueError(
                "num_reflections must be at least 1, and None but for the householder basis; got "
                f"{num_reflections} for the {basis} basis"
            )
        if reverse and basis != "triangular":
            raise ValueError(f"reverse must be False but for the triangular basis; got {reverse} for the {basis} basis")
        self.num_units = units
        self.basis = basis if dim > 1 else "triangular"
        self.reverse = reverse
        initial = {
            # The raw m on the diagonal, R1 above it, and R2, transposed, below.
            "matrices": torch.zeros(units, units),
            "log_scale": torch.zeros(units),
            "b": torch.randn(units),
        }
        if self.basis == "orthogonal":
            initial["frame"] = nn.init.orthogonal_(torch.empty(dim, units))
        if self.basis == "householder":
            initial["frame"] = torch.randn(min(units, 8) if num_reflections is None else num_reflections, dim)
        self.params = ContextParameters(initial, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `y` and its log-determinant."""
        r1, r2, b, slope, project, embed = self._unpack(context)
        h = torch.tanh(multiply(r2, project(x)) + b)
        return x + embed(multiply(r1, h)), mean_slope(h, slope).log().sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `x`, by one scalar root after another, and its log-determinant."""
        r1, r2, b, slope, project, embed = self._unpack(context)
        target = project(y)
        z = _solve(target, r1, r2, b, slope)
        h = torch.tanh(multiply(r2, z) + b)
        jacobian = _jacobian(r1, r2, h, slope)
        z = implicit_gradient(
            z,
            target - (z + multiply(r1, h)),
            lambda r: solve_triangular(jacobian, r, upper=True),
        )
        h = torch.tanh(multiply(r2, z) + b)
        return y + embed(z - target), -mean_slope(h, slope).log().sum(-1)

    def _unpack(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, _Map, _Map]:
        matrices, log_scale, b, *frame = self.params(context)
        slope = positive(matrices.diagonal(dim1=-2, dim2=-1))
        scale = soft_bound(log_scale, LOG_SCALE_BOUND).exp()
        # Off the diagonal in units of 1 / sqrt(M): a row sums over up to M units, and stays of order 1 for any M.
        mixing = matrices / self.num_units**0.5
        r1 = mixing.triu(1) + torch.diag_embed((slope - 1) / scale)  # scale is the exponential of a bounded number
        r2 = mixing.tril(-1).mT + torch.diag_embed(scale)
        return r1, r2, b, slope, *self._maps(*frame)

    def _maps(self, frame: Tensor | None = None) -> tuple[_Map, _Map]:
        """Return the maps `x -> Q'x` and `z -> Q z`."""
        if frame is None:
            turn: _Map = (lambda x: x.flip(-1)) if self.reverse else (lambda x: x)
            return turn, turn
        if self.basis == "householder":
            dim, units = self.event_shape[0], self.num_units
            return (
                lambda x: reflect(x, frame)[..., :units],
                lambda z: reflect(nn.functional.pad(z, (0, dim - units)), frame.flip(-2)),
            )
        q = _orthonormal(frame)
        return lambda x: multiply(q.mT, x), lambda z: multiply(q, z)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Return the Gram-Schmidt basis of the columns, right-handed if the matrix is square."""
    q, r = torch.linalg.qr(matrix)
    # QR leaves the signs of the columns open, and LAPACK's choice jumps: a positive diagonal of r is continuous.
    basis: Tensor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)[..., None, :]
    if basis.shape[-2] > basis.shape[-1]:
        return basis
    # The others leave the last column nothing but its sign, which would jump where the determinant changes its own. No
    # map is lost: R1, R2 and b can take up the sign of a column.
    last = basis[..., -1:] * torch.linalg.det(basis.detach()).sign()[..., None, None]
    return torch.cat([basis[..., :-1], last], -1)


@torch.no_grad()
def _solve(target: Tensor, r1: Tensor, r2: Tensor, b: Tensor, slope: Tensor) -> Tensor:
    """Solve `z + R1 tanh(R2 z + b) = target`.

    Row i holds the coordinates from i on. With those after i known, it is `z_i + r1_ii tanh(s z_i + shift) = rest`, or
    `v + (m - 1) tanh(v) = s rest + shift` for `v = s z_i + shift`: increasing in v, and planar's equation.
    """
    target, b, slope = torch.broadcast_tensors(target, b, slope)
    z = h = target[..., :0]
    for i in reversed(range(target.shape[-1])):
        rest = target[..., i : i + 1] - (r1[..., i, i + 1 :] * h).sum(-1, keepdim=True)
        shift = b[..., i : i + 1] + (r2[..., i, i + 1 :] * z).sum(-1, keepdim=True)
        m, diagonal, s = slope[..., i : i + 1], r1[..., i, i, None], r2[..., i, i, None]
        z_i = rest - diagonal * torch.tanh(solve_tanh(s * rest + shift, m))
        # tanh of the rounded z_i, as forward computes it, so that its error does not reach the rows above.
        z, h = torch.cat([z_i, z], -1), torch.cat([torch.tanh(s * z_i + shift), h], -1)
    return z


@torch.no_grad()
def _jacobian(r1: Tensor, r2: Tensor, h: Tensor, slope: Tensor) -> Tensor:
    """Return `I + R1 diag(tanh') R2`, upper triangular, its diagonal as a mean of positive terms."""
    return (r1 @ ((1 - h**2)[..., None] * r2)).triu(1) + torch.diag_embed(mean_slope(h, slope))
