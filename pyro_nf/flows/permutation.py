"""Permutation of coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.interface.arguments import checked


class Permutation(Flow):
    r"""Reorder coordinates, `y_i = x_{order[i]}`; `log_det = 0`.

    Args:
        order: A permutation of `0 .. dim - 1`.

    Raises:
        ValueError: If `order` is not a permutation.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import Permutation
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    order: Tensor
    inverse_order: Tensor

    @checked
    def __init__(self, order: Sequence[int]) -> None:
        if not len(order) or sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each of the numbers 0, 1, 2, ... once; got {list(order)}")
        super().__init__((len(order),))
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("inverse_order", self.order.argsort())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the reordered point and zero."""
        return x.index_select(-1, self.order), torch.zeros_like(x[..., 0])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the point in its old order and zero."""
        return y.index_select(-1, self.inverse_order), torch.zeros_like(y[..., 0])
