"""Gated networks: every hidden unit is multiplied by a gate of its own."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked


class GatedLinear(nn.Module):
    r"""Gated linear layer, `y = (W x + b) * sigmoid(V x + c)`.

    Both maps are one product. The gate takes the place of a nonlinearity between layers.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.

    Shapes:
        `x: (*batch, in_features)` -> `(*batch, out_features)`.

    References:
        Dauphin, Fan, Auli, Grangier (2017), "Language modeling with gated convolutional networks", arXiv:1612.08083,
        equation 1. Tomczak, Welling (2016), "Improving variational auto-encoders using Householder flow",
        arXiv:1611.09630, uses it in encoders and decoders.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import GatedLinear
        >>> GatedLinear(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, in_features: Count, out_features: Size) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `x`."""
        return nn.functional.glu(self.linear(x), -1)


class GatedMLP(nn.Sequential):
    r"""Multilayer perceptron of gated layers with a linear last layer.

    As a decoder as it is; an encoder, whose outputs only enter other linear maps, may end with the gated layers:
    `nn.Sequential(GatedLinear(784, 300), GatedLinear(300, 300))`.

    Args:
        in_features: Width of the input.
        hidden_dims: Widths of the gated layers; empty gives one linear map.
        out_features: Width of the output.

    Shapes:
        `x: (*batch, in_features)` -> `(*batch, out_features)`.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import GatedMLP
        >>> GatedMLP(3, (16, 16), 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, in_features: Count, hidden_dims: Sequence[Size], out_features: Size) -> None:
        widths = [in_features, *hidden_dims]
        super().__init__(*(GatedLinear(m, n) for m, n in pairwise(widths)), nn.Linear(widths[-1], out_features))
