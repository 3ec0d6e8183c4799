"""Coupling flows: some coordinates stay, and set the map of the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.transformers import Affine, Transformer
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import MLP, ContextParameters


class Coupling(Flow):
    r"""Coupling flow: `y_a = x_a`, `y_b = transformer(x_b; network(x_a, context))`.

    `log_det = sum_b log dy_b/dx_b`. Both directions cost one pass of the network. A coupling leaves the coordinates of
    `a` as they are: alternate the masks of successive layers (`pyro_nf.flows.stacks` does). With dim 1 there is
    nothing to condition on, and the parameters are the flow's own or functions of the context.

    Args:
        dim: Number of coordinates.
        mask: `dim` booleans, true where a coordinate is transformed, at least one; `None` for the second half.
        transformer: The map of a transformed coordinate: `Additive()` gives NICE, `Affine()` (default) RealNVP.
        hidden_dims: Widths of the network's hidden layers.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If `mask` is of the wrong length or transforms nothing.

    References:
        Dinh, Krueger, Bengio (2014), "NICE", arXiv:1410.8516, section 3; Dinh, Sohl-Dickstein, Bengio (2016),
        "Density estimation using Real NVP", arXiv:1605.08803, equations 4-8.
    """

    transformed: Tensor
    order: Tensor
    restore: Tensor

    @checked
    def __init__(
        self,
        dim: Size,
        mask: Sequence[bool] | None = None,
        transformer: Transformer | None = None,
        hidden_dims: Sequence[Size] = (32, 32),
        context_dim: Count = 0,
    ) -> None:
        super().__init__((dim,), context_dim)
        mask = [i >= dim // 2 for i in range(dim)] if mask is None else list(mask)
        if len(mask) != dim or not any(mask):
            raise ValueError(f"mask must hold dim={dim} booleans, one of them true; got {mask}")
        chosen = torch.tensor(mask)
        self.register_buffer("transformed", chosen.nonzero()[:, 0], persistent=False)
        # Kept coordinates first, and back.
        self.register_buffer("order", torch.cat([(~chosen).nonzero()[:, 0], self.transformed]), persistent=False)
        self.register_buffer("restore", self.order.argsort(), persistent=False)
        self._num_kept = dim - len(self.transformed)
        self._in_order = sorted(mask) == mask
        self.transformer = transformer or Affine()
        self._outputs = (len(self.transformed), self.transformer.num_params)
        size = self._outputs[0] * self._outputs[1]
        self.network = (
            MLP(self._num_kept, hidden_dims, size, context_dim=context_dim, zero_init=True)
            if self._num_kept
            else ContextParameters({"params": torch.zeros(size)}, context_dim)
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the chosen coordinates."""
        kept, moving = self._cut(x)
        moved, log_det = self.transformer.forward(moving, self._params(kept, context))
        return self._join(kept, moved), log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the chosen coordinates back."""
        kept, moving = self._cut(y)
        moved, log_det = self.transformer.inverse(moving, self._params(kept, context))
        return self._join(kept, moved), log_det.sum(-1)

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Transform the chosen coordinates, and push the score along: the network runs once.

        `log q(y) = log q(x_a, x_b = inverse(y_b; params)) + log_det`, by y_b, and by y_a through the params as well.
        """
        kept, moving = self._cut(x)
        vjp: Any = torch.func.vjp
        params, pull_network = vjp(lambda kept: self._params(kept, context), kept)
        moved, log_det = self.transformer.forward(moving, params)
        score_kept, score_moving = self._cut(score)
        with torch.no_grad():
            _, pull = vjp(self.transformer.inverse, moved.detach(), params.detach())
            score_moved, by_params = pull((score_moving, torch.ones_like(log_det)))
            (by_kept,) = pull_network(by_params)
            pushed = self._join(score_kept + by_kept, score_moved)
        return self._join(kept, moved), log_det.sum(-1), pushed

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor:
        if isinstance(self.network, ContextParameters):
            (params,) = self.network(context)
        else:
            params = self.network(kept, context)
        shaped: Tensor = params.unflatten(-1, self._outputs)
        return shaped

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self._in_order else x.index_select(-1, self.order)
        return x[..., : self._num_kept], x[..., self._num_kept :]

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        joined = torch.cat([kept.expand(*moved.shape[:-1], self._num_kept), moved], -1)
        return joined if self._in_order else joined.index_select(-1, self.restore)
