"""Multilayer perceptron with an optional context input."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.parameters import start_at_zero


class MLP(nn.Module):
    r"""Multilayer perceptron with a linear last layer.

    `h_1 = activation(W_1 x + b_1 + V c)`, `h_{k+1} = activation(W_k h_k + b_k)`, `out = W h + b + U c`.
    The context `c` enters as sums, so that one context can serve many draws of `x` by broadcasting; it enters the
    output too, so that what depends on it alone need not be learned through the hidden layers.

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

    @checked
    def __init__(
        self,
        in_features: Count,
        hidden_dims: Sequence[Size],
        out_features: Size,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: Count = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden_dims, out_features]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        has_context = context_dim > 0
        self.from_context = nn.Linear(context_dim, widths[1], bias=False) if has_context and hidden_dims else None
        self.context_to_output = nn.Linear(context_dim, out_features, bias=False) if has_context else None
        self.activation = activation()
        if zero_init:
            start_at_zero(self.layers[-1], self.context_to_output)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply the network to the last dimension of `x`."""
        first, *rest = self.layers
        h: Tensor = first(x)
        if self.from_context is not None:
            h = h + self.from_context(context)
        for layer in rest:
            h = layer(self.activation(h))
        if self.context_to_output is not None:
            h = h + self.context_to_output(context)
        return h
