"""One masked autoencoder for many orders of its inputs."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.mlp import MLP


class OrderAgnosticMADE(MLP):
    r"""MADE with several orders and connectivities over one set of weights, whose probabilities are averaged.

    Each of `num_masks` draws, once and for all, an order of the inputs and the degrees of the hidden units, with every
    degree in every layer. Under each, output k sees the inputs before the k-th in that order, so that
    `p_m(x) = prod_k p(x_k | params_k)` is a density; under different orders an output sees different inputs, so it is
    the probabilities that can be averaged, `p(x) = 1/M sum_m p_m(x)`, not the outputs.

    Args:
        dim: Number of inputs.
        num_params: Outputs for each input.
        hidden_dims: Widths of the hidden layers, at least one, each at least `dim - 1`, or `dim` with a context.
        num_masks: Number of orders.
        activation: Makes the nonlinearity between layers.
        context_dim: Width of the context, seen by every output; 0 for none.
        seed: Seed of the masks, which are part of the state.

    Shapes:
        `x: (*batch, dim)`, `context: (*batch, context_dim)` -> `(*batch, dim, num_params)`.

    Raises:
        ValueError: If `hidden_dims` is empty or too narrow, or `num_masks` less than 1.

    References:
        Germain, Gregor, Murray, Larochelle (2015), "MADE", arXiv:1502.03509, sections 4.2 and 4.3.

    Example:
        >>> import torch
        >>> from pyro.distributions import Bernoulli
        >>> from pyro_nf.networks import OrderAgnosticMADE
        >>> network = OrderAgnosticMADE(5, 1, (32,)).eval()
        >>> network.log_prob(torch.ones(7, 5), lambda params: Bernoulli(logits=params[..., 0])).shape
        torch.Size([7])
    """

    @checked
    def __init__(
        self,
        dim: Size,
        num_params: Size,
        hidden_dims: Sequence[Size],
        num_masks: Size = 16,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: Count = 0,
        seed: int = 0,
    ) -> None:
        lowest = 0 if context_dim > 0 or dim == 1 else 1
        if not hidden_dims or min(hidden_dims) < dim - lowest:
            raise ValueError(
                f"hidden_dims must hold at least one width, each >= {dim - lowest} for dim={dim} and "
                f"context_dim={context_dim}; got {tuple(hidden_dims)}"
            )
        super().__init__(dim, hidden_dims, dim * num_params, activation, context_dim)
        self.num_masks = num_masks
        self.num_params = num_params
        generator = torch.Generator().manual_seed(seed)

        def shuffled(degrees: Tensor) -> Tensor:
            return torch.stack([degrees[torch.randperm(len(degrees), generator=generator)] for _ in range(num_masks)])

        self.register_buffer("degrees_0", shuffled(torch.arange(1, dim + 1)))
        for layer, width in enumerate(hidden_dims, start=1):
            self.register_buffer(f"degrees_{layer}", shuffled(torch.arange(width) % (dim - lowest) + lowest))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: int = 0) -> Tensor:
        """Apply the network under one of its orders."""
        degrees = [getattr(self, f"degrees_{k}")[mask] for k in range(len(self.layers))]
        masks = [above[:, None] >= below for below, above in pairwise(degrees)]
        masks.append((degrees[0][:, None] > degrees[-1]).repeat_interleave(self.num_params, 0))
        layers: list[Any] = list(self.layers)
        h = x
        for k, (layer, visible) in enumerate(zip(layers, masks, strict=True)):
            h = nn.functional.linear(self.activation(h) if k else h, layer.weight * visible, layer.bias)
            if k == 0 and self.from_context is not None:
                h = h + self.from_context(context)
        if self.context_to_output is not None:
            h = h + self.context_to_output(context)
        params: Tensor = h.unflatten(-1, (-1, self.num_params))
        return params

    def log_prob(
        self, x: Tensor, conditional: Callable[[Tensor], TorchDistribution], context: Tensor | None = None
    ) -> Tensor:
        """Return the log density of x, `(*batch,)`: under a random order in training, the average's in evaluation.

        Args:
            x: Points, `(*batch, dim)`.
            conditional: Makes the distribution of each coordinate from its parameters, `(*batch, dim, num_params)`.
            context: `(*batch, context_dim)`.
        """
        masks = [int(torch.randint(self.num_masks, ()))] if self.training else range(self.num_masks)
        scores = [conditional(self.forward(x, context, mask)).log_prob(x).sum(-1) for mask in masks]
        return torch.stack(scores).logsumexp(0) - math.log(len(scores))
