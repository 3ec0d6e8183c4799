"""Masked autoencoder: a network whose k-th output sees only the inputs that come before the k-th."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nf.networks.mlp import MLP


class MaskedLinear(nn.Linear):
    """Linear layer `y = (W * mask) x + b`, `mask: (out_features, in_features)` of 0 and 1."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.weight.requires_grad_(bool(mask.any()))  # weights that are all masked are no parameters
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `x`."""
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class MADE(MLP):
    r"""Masked autoencoder for distribution estimation: output k depends on the inputs of smaller degree than k's.

    Input and output k bear the degree `order[k]`, hidden units the degrees 1..dim-1 in turn, from 0 with a context. A
    hidden unit sees units of degree <= its own, an output sees hidden units of degree < its own. The context enters the
    first hidden layer unmasked: the units of degree 0 carry it to the output that sees no input. The last layer starts
    at zero.

    Args:
        dim: Number of inputs.
        num_params: Outputs for each input.
        hidden_dims: Widths of the hidden layers, at least one, each at least `dim - 1` wide, or `dim` with a context
            (every degree must be present in every layer, or some outputs would lose inputs that they may see).
        order: Degree of each input, a permutation of 1..dim; `None` for 1, 2, ..., dim.
        activation: Makes the nonlinearity between layers.
        context_dim: Width of the context; 0 for none.

    Shapes:
        `x: (*batch, dim)`, `context: (*batch, context_dim)` -> `(*batch, dim, num_params)`.

    Raises:
        ValueError: If `hidden_dims` is empty or too narrow, or `order` no permutation.

    References:
        Germain, Gregor, Murray, Larochelle (2015), "MADE", arXiv:1502.03509, equations 12 and 13.
    """

    degrees: Tensor

    def __init__(
        self,
        dim: int,
        num_params: int,
        hidden_dims: Sequence[int],
        order: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: int = 0,
    ) -> None:
        # With dim = 1 the only output sees no input, as the first of any dim.
        lowest = 0 if context_dim > 0 or dim == 1 else 1
        if not hidden_dims or min(hidden_dims) < dim - lowest:
            raise ValueError(
                f"hidden_dims must hold at least one width, each >= {dim - lowest} for dim={dim} and "
                f"context_dim={context_dim}; got {tuple(hidden_dims)}"
            )
        if order is not None and sorted(order) != list(range(1, dim + 1)):
            raise ValueError(f"order must be a permutation of 1 .. {dim}; got {list(order)}")
        super().__init__(dim, hidden_dims, dim * num_params, activation, context_dim)
        self.num_params = num_params
        degrees = torch.arange(1, dim + 1) if order is None else torch.tensor(order)
        self.register_buffer("degrees", degrees)
        layers, below = [], degrees
        for width in hidden_dims:
            above = torch.arange(width) % (dim - lowest) + lowest
            layers.append(MaskedLinear(above[:, None] >= below))
            below = above
        last = MaskedLinear((degrees[:, None] > below).repeat_interleave(num_params, 0))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply the network to the last dimension of `x`."""
        params: Tensor = super().forward(x, context).unflatten(-1, (len(self.degrees), self.num_params))
        return params
