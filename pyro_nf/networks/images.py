"""Gated convolutional encoder and decoder of images, which are vectors outside."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.gated import GatedLinear


class ImageEncoder(nn.Module):
    r"""Gated convolutional network from images to vectors.

    On each level a gated convolution, then one of stride 2, which halves height and width (rounding up). What is left
    goes through a gated linear layer. A gated convolution is `(W * x + b) sigmoid(V * x + c)`, with a margin of zeros.

    Args:
        image_shape: `(channels, height, width)`.
        out_features: Width of the output: of the context, where this is a guide's encoder.
        channels: Channels of the levels.
        kernel_size: Height and width of the kernels, odd.

    Shapes:
        `x: (*batch, channels * height * width)` -> `(*batch, out_features)`.

    Raises:
        ValueError: If the shape is none of an image, there is no level, or `kernel_size` is not odd and positive.

    References:
        Van den Berg, Hasenclever, Tomczak, Welling (2018), "Sylvester normalizing flows for variational inference",
        arXiv:1803.05649, appendix: the architecture that this one follows.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import ImageEncoder
        >>> ImageEncoder((1, 8, 8), 16, channels=(4, 8))(torch.zeros(5, 64)).shape
        torch.Size([5, 16])
    """

    @checked
    def __init__(
        self,
        image_shape: Sequence[Size],
        out_features: Size,
        channels: Sequence[Size] = (32, 64),
        kernel_size: Size = 5,
    ) -> None:
        super().__init__()
        shapes = _level_shapes(image_shape, channels, kernel_size)
        self.image_shape = shapes[0]
        padding = kernel_size // 2
        layers: list[nn.Module] = []
        for (below, *_), (above, *_) in pairwise(shapes):
            layers += [
                nn.Conv2d(below, 2 * above, kernel_size, padding=padding),
                nn.GLU(-3),
                nn.Conv2d(above, 2 * above, kernel_size, stride=2, padding=padding),
                nn.GLU(-3),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.head = GatedLinear(math.prod(shapes[-1]), out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Encode the last dimension of `x`."""
        h = self.convolutions(x.reshape(-1, *self.image_shape))
        out: Tensor = self.head(h.flatten(1))
        return out.reshape(*x.shape[:-1], -1)


class ImageDecoder(nn.Module):
    r"""Gated convolutional network from vectors to images, `ImageEncoder` upside down, with a linear last convolution.

    Args:
        in_features: Width of the input: of the latents, where this is a model's decoder.
        image_shape: `(channels, height, width)`.
        num_params: Outputs for each pixel and channel: `num_params` of the likelihood.
        channels: Channels of the levels, the one next to the image first.
        kernel_size: Height and width of the kernels, odd.

    Shapes:
        `z: (*batch, in_features)` -> `(*batch, num_params * channels * height * width)`: the first parameter of every
        pixel, then the second, as the likelihoods of `pyro_nf.models` read them.

    Raises:
        ValueError: As `ImageEncoder`.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import ImageDecoder
        >>> ImageDecoder(3, (1, 7, 5), channels=(4, 8))(torch.zeros(6, 3)).shape
        torch.Size([6, 35])
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        image_shape: Sequence[Size],
        num_params: Size = 1,
        channels: Sequence[Size] = (32, 64),
        kernel_size: Size = 5,
    ) -> None:
        super().__init__()
        shapes = _level_shapes(image_shape, channels, kernel_size)
        self.top_shape = shapes[-1]
        padding = kernel_size // 2
        self.foot = GatedLinear(in_features, math.prod(self.top_shape))
        layers: list[nn.Module] = []
        for level in reversed(range(len(channels))):
            above, below = channels[level], channels[max(level - 1, 0)]
            _, height, width = shapes[level]
            # A transposed convolution of stride 2 gives 2 h - 1 rows, or one more: what it takes to undo rounding up.
            extra = (1 - height % 2, 1 - width % 2)
            layers += [
                nn.Conv2d(above, 2 * above, kernel_size, padding=padding),
                nn.GLU(-3),
                nn.ConvTranspose2d(above, 2 * below, kernel_size, stride=2, padding=padding, output_padding=extra),
                nn.GLU(-3),
            ]
        layers.append(nn.Conv2d(channels[0], num_params * shapes[0][0], kernel_size, padding=padding))
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode the last dimension of `z`."""
        h = self.foot(z.reshape(-1, z.shape[-1])).unflatten(-1, self.top_shape)
        out: Tensor = self.convolutions(h)
        return out.reshape(*z.shape[:-1], -1)


def _level_shapes(image_shape: Sequence[int], channels: Sequence[int], kernel_size: int) -> list[tuple[int, int, int]]:
    """Shapes of the image and of each level's result."""
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), all positive; got {tuple(image_shape)}")
    if not channels:
        raise ValueError(f"channels must hold the positive number of each level; got {tuple(channels)}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    first, height, width = image_shape
    shapes = [(first, height, width)]
    for count in channels:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((count, height, width))
    return shapes
