"""Multilayer perceptron with an optional context input."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    r"""Multilayer perceptron with a linear last layer.

    `h_1 = activation(W_1 x + b_1 + V c)`, `h_{k+1} = activation(W_k h_k + b_k)`, `out = W h + b`.
    The context `c` enters the first layer as a sum, so that one context can serve many draws of `x` by broadcasting.

    Args:
        in_features: Width of the input.
        hidden_dims: Widths of the hidden layers; empty gives one linear map.
        out_features: Width of the output.
        activation: Makes the nonlinearity between layers.
        context_dim: Width of the context; 0 for none.
        zero_init: Whether the last layer starts at zero, so that the network is the zero function at first.

    Shapes:
        `x: (*batch, in_features)`, `context: (*batch, context_dim)` -> `(*batch, out_features)`.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import MLP
        >>> MLP(3, (16, 16), 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        hidden_dims: Sequence[int],
        out_features: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: int = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden_dims, out_features]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        self.from_context = nn.Linear(context_dim, widths[1], bias=False) if context_dim > 0 else None
        self.activation = activation()
        if zero_init:
            for tensor in self.layers[-1].parameters():
                nn.init.zeros_(tensor)
            if self.from_context is not None and not hidden_dims:
                nn.init.zeros_(self.from_context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply the network to the last dimension of `x`."""
        first, *rest = self.layers
        h: Tensor = first(x)
        if self.from_context is not None:
            h = h + self.from_context(context)
        for layer in rest:
            h = layer(self.activation(h))
        return h
