"""Householder flow."""

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import multiply, solve_triangular
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters, freeze


class Householder(Flow):
    r"""Householder flow, `y = H_K ... H_1 x` with reflections `H = I - 2 v v' / ||v||^2`: rotates and mirrors.

    `log_det = 0`. Both directions cost O(K dim): the inverse applies the reflections in reverse order.

    The vectors start in equal pairs of random direction. Such a pair undoes itself, so an even number of reflections
    starts as the identity; an odd number starts as one reflection and never becomes the identity, for its determinant
    is -1.

    The paper chains the vectors by linear layers, `v_1 = A_1 h` and `v_{t+1} = A_{t+1} v_t`, `h` the context. So all
    are affine in the context, as here, where each has an affine map of its own.

    Args:
        dim: Number of coordinates. On a line (1) every reflection is a change of sign, and nothing is trained.
        num_reflections: K, at least 1; `dim` of them reach every orthogonal matrix of their determinant.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If there is no reflection.

    References:
        Tomczak, Welling (2016), "Improving variational auto-encoders using Householder flow", arXiv:1611.09630.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.householder import Householder
        >>> _ = torch.manual_seed(0)
        >>> x = torch.tensor([3.0, 0.0, 4.0])
        >>> torch.linalg.vector_norm(Householder(3, num_reflections=5)(x)).item()
        5.0
    """

    @checked
    def __init__(self, dim: Size, num_reflections: Size = 2, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        pairs = torch.randn((num_reflections + 1) // 2, dim).repeat_interleave(2, 0)
        self.params = ContextParameters({"directions": pairs[:num_reflections]}, context_dim)
        if dim == 1:
            freeze(self)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the reflected point and zero."""
        (directions,) = self.params(context)
        y = reflect(x, directions)
        return y, torch.zeros_like(y[..., 0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the point reflected back and zero."""
        (directions,) = self.params(context)
        x = reflect(y, directions.flip(-2))
        return x, torch.zeros_like(x[..., 0])


def reflect(x: Tensor, directions: Tensor) -> Tensor:
    """Return `H_K ... H_1 x`, the reflections along the rows of `directions`, first row first.

    The rows in reverse order undo it.

    Args:
        x: Points, `(*batch, dim)`.
        directions: Vectors of any length, `(*batch, K, dim)`; zero reflects nothing.
    """
    # Reflection k takes w_k v_k off what the earlier ones left, w_k = 2 / ||v_k||^2 (v_k'x - sum_{j<k} v_k'v_j w_j). So
    # w solves a triangular system, whose matrix holds the inner products of the vectors and, on its diagonal, half of
    # the squares. The small number keeps v = 0 and its gradient finite, and is lost in the rounding of other squares.
    products = directions @ directions.mT
    half_squares = 0.5 * products.diagonal(dim1=-2, dim2=-1) + torch.finfo(x.dtype).tiny
    system = products.tril(-1) + half_squares.diag_embed()
    w = solve_triangular(system, multiply(directions, x), upper=False)
    return x - multiply(directions.mT, w)
