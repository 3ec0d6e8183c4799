"""Masked autoencoder: a network whose k-th output sees only the inputs that come before the k-th."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.mlp import MLP
from pyro_nf.networks.parameters import freeze, start_at_zero


class MaskedLinear(nn.Linear):
    """Linear layer `y = (W * mask) x + b`, `mask: (out_features, in_features)` of 0 and 1."""

    mask: Tensor

    @checked
    def __init__(self, mask: Tensor) -> None:
        if mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"mask must be a matrix of zeros and ones; got {mask}")
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        if not bool(mask.any()):
            freeze(self, "weight")  # weights that are all masked are no parameters

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `x`."""
        return nn.functional.linear(x, self.masked_weight(), self.bias)

    def masked_weight(self) -> Tensor:
        """Return `W * mask`."""
        return self.weight * self.mask


class MADE(MLP):
    r"""Masked autoencoder for distribution estimation: output k depends on the inputs of smaller degree than k's.

    Input and output k bear the degree `order[k]`. Hidden units bear the degrees 1..dim-1, from 0 with a context, in
    equal shares and ascending. A hidden unit sees units of degree <= its own, an output sees hidden units of degree <
    its own. The context enters the first hidden layer and the output, unmasked: the units of degree 0 carry it to the
    output that sees no input. The network starts at zero.

    A call is one pass. `unroll` feeds the outputs back as inputs, coordinate by coordinate, for the cost of one pass.

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

    @checked
    def __init__(
        self,
        dim: Size,
        num_params: Size,
        hidden_dims: Sequence[Size],
        order: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: Count = 0,
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
        self._coordinates: list[int] = degrees.argsort().tolist()
        layers, self._counts, below = [], [], degrees
        for width in hidden_dims:
            above = torch.arange(width) * (dim - lowest) // width + lowest
            layers.append(MaskedLinear(above[:, None] >= below))
            self._counts.append(above.bincount(minlength=dim).tolist())  # units of degree 0 .. dim - 1
            below = above
        last = MaskedLinear((degrees[:, None] > below).repeat_interleave(num_params, 0))
        start_at_zero(last, self.context_to_output)
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply the network to the last dimension of `x`."""
        params: Tensor = super().forward(x, context).unflatten(-1, (len(self._coordinates), self.num_params))
        return params

    def unroll(self, step: Callable[[int, Tensor], Tensor], context: Tensor | None = None) -> Tensor:
        """Run the network on inputs that its own outputs determine, one coordinate after another.

        `step(k, params)` gets the parameters of coordinate k, `(*batch, 1, num_params)`, and returns its value,
        `(*batch, 1)`. A unit is run once all that it sees is known, and its activation is added to what waits for it:
        `dim` small steps, which together cost what one pass does.

        Returns:
            The values, `(*batch, dim)`.
        """
        layers: list[Any] = list(self.layers)
        first, *inner, last = layers
        # Columns of each layer's weight by the degree of the unit they belong to. All rows that still wait when a unit
        # is run may see it, which is why no mask is needed.
        blocks = [first.weight[:, self._coordinates].split(1, 1)]
        blocks += [layer.weight.split(counts, 1) for layer, counts in zip(inner, self._counts, strict=False)]
        blocks.append(self._by_degree(last.weight.mT).mT.split(self._counts[-1], 1))
        waiting = [first.bias, *(layer.bias for layer in inner), last.bias]
        if self.from_context is not None and self.context_to_output is not None:
            waiting[0] = waiting[0] + self.from_context(context)
            waiting[-1] = waiting[-1] + self.context_to_output(context)
        waiting[-1] = self._by_degree(waiting[-1])

        def add(layer: int, degree: int, activation: Tensor) -> None:
            block = blocks[layer][degree]
            rows = block[len(block) - waiting[layer].shape[-1] :]
            waiting[layer] = waiting[layer] + nn.functional.linear(activation, rows)

        values = []
        for degree, coordinate in enumerate(self._coordinates):
            for layer, counts in enumerate(self._counts):
                if counts[degree]:
                    ready, waiting[layer] = _take(waiting[layer], counts[degree])
                    add(layer + 1, degree, self.activation(ready))
            params, waiting[-1] = _take(waiting[-1], self.num_params)
            values.append(step(coordinate, params[..., None, :]))
            add(0, degree, values[-1])
        return torch.cat([values[position] for position in _inverse(self._coordinates)], -1)

    def _by_degree(self, outputs: Tensor) -> Tensor:
        """Put what is for the first coordinate first, in the last dimension."""
        blocks: Tensor = outputs.unflatten(-1, (len(self._coordinates), -1))
        return blocks[..., self._coordinates, :].flatten(-2)


def _take(tensor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` entries of the last dimension, and the rest."""
    taken, rest = tensor.split((count, tensor.shape[-1] - count), -1)
    return taken, rest


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)
