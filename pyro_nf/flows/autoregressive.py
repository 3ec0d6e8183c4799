"""Autoregressive flow: each coordinate's map is set by the coordinates before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.transformers import Affine, Transformer
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import MADE


class Autoregressive(Flow):
    r"""Autoregressive flow, `y_i = transformer(x_i; params_i(x_1, ..., x_{i-1}, context))`, parameters from a MADE.

    `log_det = sum_i log dy_i/dx_i`. Forward costs one pass of the network: as a guide this is inverse autoregressive
    flow (IAF), and its `Inverse` is masked autoregressive flow (MAF). The inverse takes `dim` steps, one coordinate
    each, which run only the hidden units that the last coordinate has completed: together the arithmetic of one pass,
    and `dim` times the overhead of a few small operations.

    Args:
        dim: Number of coordinates.
        transformer: The map of a coordinate: `Affine()` (default) or `Gated()`, the update of the IAF paper.
        hidden_dims: Widths of the hidden layers, each at least `dim`; `None` for two of `max(32, 2 dim)`.
        reverse: Whether the last coordinate comes first. Alternate it between layers, which needs no permutation.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If a hidden layer is too narrow.

    References:
        Kingma et al. (2016), "Improving variational inference with inverse autoregressive flow", arXiv:1606.04934;
        Papamakarios, Pavlakou, Murray (2017), "Masked autoregressive flow", arXiv:1705.07057, equations 2-5.
    """

    @checked
    def __init__(
        self,
        dim: Size,
        transformer: Transformer | None = None,
        hidden_dims: Sequence[Size] | None = None,
        reverse: bool = False,
        context_dim: Count = 0,
    ) -> None:
        super().__init__((dim,), context_dim)
        self.transformer = transformer or Affine()
        self.reverse = reverse
        hidden_dims = (max(32, 2 * dim),) * 2 if hidden_dims is None else hidden_dims
        order = range(dim, 0, -1) if reverse else range(1, dim + 1)
        self.network = MADE(dim, self.transformer.num_params, hidden_dims, list(order), context_dim=context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform every coordinate in one pass."""
        y, log_det = self.transformer.forward(x, self.network(x, context))
        return y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for one coordinate after another."""
        coordinates, log_dets = y.split(1, -1), []

        def step(coordinate: int, params: Tensor) -> Tensor:
            x, log_det = self.transformer.inverse(coordinates[coordinate], params)
            log_dets.append(log_det)
            return x

        x = self.network.unroll(step, context)
        return x, torch.cat(log_dets, -1).sum(-1)
