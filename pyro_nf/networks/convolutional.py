"""Convolutional network with an optional context input."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.parameters import start_at_zero


class ConvNet(nn.Module):
    r"""Convolutional network with a linear last layer, from images to images of the same height and width.

    `h_1 = activation(W_1 * x + b_1 + V c)`, `h_{k+1} = activation(W_k * h_k + b_k)`, `out = W * h + b + U c`, where `*`
    is a convolution over an image with a margin of zeros. The context `c` enters as sums, the same at every pixel, as
    in `MLP`.

    Args:
        in_channels: Channels of the input.
        hidden_channels: Channels of the hidden layers; empty gives one linear map.
        out_channels: Channels of the output.
        kernel_size: Height and width of the convolutions' kernels, odd.
        activation: Makes the nonlinearity between layers.
        context_dim: Width of the context; 0 for none.
        zero_init: Whether the last layer starts at zero, so that the network is the zero function at first.

    Shapes:
        `x: (*batch, in_channels, height, width)`, `context: (*batch, context_dim)` ->
        `(*batch, out_channels, height, width)`.

    Raises:
        ValueError: If `kernel_size` is not odd and positive.

    Example:
        >>> import torch
        >>> from pyro_nf.networks.convolutional import ConvNet
        >>> ConvNet(3, (16, 16), 2)(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
    """

    @checked
    def __init__(
        self,
        in_channels: Size,
        hidden_channels: Sequence[Size],
        out_channels: Size,
        kernel_size: Size = 3,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: Count = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
        widths = [in_channels, *hidden_channels, out_channels]
        self.layers = nn.ModuleList(nn.Conv2d(m, n, kernel_size, padding=kernel_size // 2) for m, n in pairwise(widths))
        has_context = context_dim > 0
        self.from_context = nn.Linear(context_dim, widths[1], bias=False) if has_context and hidden_channels else None
        self.context_to_output = nn.Linear(context_dim, out_channels, bias=False) if has_context else None
        self.activation = activation()
        if zero_init:
            start_at_zero(self.layers[-1], self.context_to_output)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply the network to the last three dimensions of `x`."""
        first, *rest = self.layers
        h = _convolve(first, x)
        if self.from_context is not None:
            h = h + self.from_context(context)[..., None, None]
        for layer in rest:
            h = _convolve(layer, self.activation(h))
        if self.context_to_output is not None:
            h = h + self.context_to_output(context)[..., None, None]
        return h


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution, which takes one batch dimension, to a batch of any shape."""
    out: Tensor = layer(x.reshape(-1, *x.shape[-3:]))
    return out.reshape(*x.shape[:-3], *out.shape[-3:])
