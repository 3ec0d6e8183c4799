"""Flows of images `(channels, height, width)`: wrappers that take flows to pixels, scales and channels, and a coupling.

Every flow has one event shape at both ends, so that base and data are images of the same size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow, Sequential
from pyro_nf.flows.transformers import Affine, Transformer
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks.convolutional import ConvNet


class Channelwise(Flow):
    r"""One flow of vectors at every pixel of an image, `y[:, i, j] = flow(x[:, i, j]; context)`.

    `log_det` is the sum of the pixels' log-determinants. Both directions cost `height * width` times the flow's. It
    starts as the identity if the flow does. Of a linear flow it makes Glow's invertible 1x1 convolution.

    Args:
        flow: A flow of vectors with one coordinate per channel; its context, if it has one, is the whole image's.
        height: Height of the image.
        width: Width of the image.

    Raises:
        ValueError: If the flow is not one of vectors.

    References:
        Kingma, Dhariwal (2018), "Glow", arXiv:1807.03039, section 3.2.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import LowerTriangularAffine
        >>> from pyro_nf.flows.images import Channelwise
        >>> flow = Channelwise(LowerTriangularAffine(3), 8, 8)
        >>> flow.forward_and_log_det(torch.zeros(5, 3, 8, 8))[1].shape
        torch.Size([5])
    """

    @checked
    def __init__(self, flow: Flow, height: Size, width: Size) -> None:
        if len(flow.event_shape) != 1:
            raise ValueError(f"flow must be a flow of vectors (channels,); got event_shape {tuple(flow.event_shape)}")
        super().__init__((*flow.event_shape, height, width), flow.context_dim)
        self.flow = flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the flow at every pixel."""
        y, log_det = self.flow.forward_and_log_det(x.movedim(-3, -1), _of_pixels(context))
        return y.movedim(-1, -3), log_det.sum((-2, -1))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo the flow at every pixel."""
        x, log_det = self.flow.inverse_and_log_det(y.movedim(-3, -1), _of_pixels(context))
        return x.movedim(-1, -3), log_det.sum((-2, -1))


class Squeezed(Flow):
    r"""A flow of the squeezed image, `y = unsqueeze(flow(squeeze(x)))`: blocks of 2x2 pixels become channels.

    `squeeze` takes `(c, h, w)` to `(4c, h/2, w/2)`, with the four pixels of a block one after another, row by row, all
    channels of each. A split of the squeezed channels into halves thus tells the upper from the lower pixels of every
    block, where a checkerboard tells its diagonals. Squeezing reorders coordinates: `log_det` is the flow's, and so is
    the cost. It starts as the identity if the flow does.

    Args:
        flow: A flow of images `(4c, h/2, w/2)`; this one is over `(c, h, w)`.

    Raises:
        ValueError: If the flow is not one of images whose channels are a multiple of 4.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, section 3.6.

    Example:
        >>> from pyro_nf.flows.images import ImageCoupling, Squeezed
        >>> Squeezed(ImageCoupling((4, 3, 3), "channel")).event_shape
        torch.Size([1, 6, 6])
    """

    @checked
    def __init__(self, flow: Flow) -> None:
        if len(flow.event_shape) != 3 or flow.event_shape[0] % 4:
            raise ValueError(
                "flow must be a flow of images (channels, height, width), channels a multiple of 4; "
                f"got event_shape {tuple(flow.event_shape)}"
            )
        channels, height, width = flow.event_shape
        super().__init__((channels // 4, 2 * height, 2 * width), flow.context_dim)
        self.flow = flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the flow to the squeezed image."""
        y, log_det = self.flow.forward_and_log_det(_squeeze(x), context)
        return _unsqueeze(y), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo the flow on the squeezed image."""
        x, log_det = self.flow.inverse_and_log_det(_squeeze(y), context)
        return _unsqueeze(x), log_det


class Split(Flow):
    r"""A flow of the first channels of an image; the others are left as they are: `y = (flow(x_a), x_b)`.

    `log_det` and cost are the flow's. It starts as the identity if the flow does. Seen from the data, the others are
    factored out of a multi-scale architecture: they stand in base coordinates already. From the base, a split is
    therefore the first step of its scale: `Sequential(Split(coarser_scale, channels), *steps)`.

    Args:
        flow: A flow of images `(k, height, width)`.
        channels: Channels of the image, more than k.

    Raises:
        ValueError: If the flow is not one of images, or leaves no channel over.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, section 3.6,
        equations 14-16.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.images import ImageCoupling, Split
        >>> Split(ImageCoupling((2, 4, 4)), 4)(torch.zeros(5, 4, 4, 4)).shape
        torch.Size([5, 4, 4, 4])
    """

    @checked
    def __init__(self, flow: Flow, channels: Size) -> None:
        if len(flow.event_shape) != 3:
            raise ValueError(
                f"flow must be a flow of images (channels, height, width); got event_shape {tuple(flow.event_shape)}"
            )
        if channels <= flow.event_shape[0]:
            raise ValueError(f"channels must be more than the flow's {flow.event_shape[0]}; got {channels}")
        super().__init__((channels, *flow.event_shape[1:]), flow.context_dim)
        self.flow = flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the flow to the first channels."""
        first, rest = self._cut(x)
        moved, log_det = self.flow.forward_and_log_det(first, context)
        return _join(moved, rest), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo the flow on the first channels."""
        first, rest = self._cut(y)
        moved, log_det = self.flow.inverse_and_log_det(first, context)
        return _join(moved, rest), log_det

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.flow.event_shape[0]
        return x[..., :k, :, :], x[..., k:, :, :]


class ImageCoupling(Flow):
    r"""Coupling of pixels or channels: `y_a = x_a`, `y_b = transformer(x_b; network(x_a, context))`.

    `log_det = sum_b log dy_b/dx_b`. Both directions cost one pass of the network, which is convolutional, with kernels
    of 3x3, and ends in a layer that starts at zero: the coupling starts as the identity.

    Args:
        event_shape: `(channels, height, width)`.
        mask: Which coordinates are transformed: `"checkerboard"`, every other pixel in all channels, that of row 0 and
            column 0 among them; `"channel"`, the second half of the channels in all pixels.
        invert: Whether the other coordinates are transformed instead.
        transformer: The map of a transformed coordinate; `Affine()` by default.
        hidden_channels: Channels of the network's hidden layers.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If `event_shape` is not that of an image, or the mask unknown, or all or none would be transformed.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, section 3.4 and
        equation 9.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.images import ImageCoupling
        >>> y, log_det = ImageCoupling((1, 4, 4)).forward_and_log_det(torch.ones(5, 1, 4, 4))
        >>> log_det.shape
        torch.Size([5])
    """

    transformed: Tensor

    @checked
    def __init__(
        self,
        event_shape: Sequence[Size],
        mask: Literal["checkerboard", "channel"] = "checkerboard",
        invert: bool = False,
        transformer: Transformer | None = None,
        hidden_channels: Sequence[Size] = (32, 32),
        context_dim: Count = 0,
    ) -> None:
        super().__init__(event_shape, context_dim)
        if len(self.event_shape) != 3:
            raise ValueError(f"event_shape must be (channels, height, width); got {tuple(event_shape)}")
        channels, height, width = self.event_shape
        row, column = torch.arange(height)[:, None], torch.arange(width)
        channel = torch.arange(channels)[:, None, None]
        masks = {"checkerboard": (row + column) % 2 == 0, "channel": channel >= channels // 2}
        if mask not in masks:
            raise ValueError(f"mask must be one of {', '.join(masks)}; got {mask!r}")
        transformed = (masks[mask] ^ invert).expand(self.event_shape)
        if transformed.all() or not transformed.any():
            raise ValueError(
                f"mask must leave some coordinates and transform others; got {mask!r} for event_shape "
                f"{tuple(event_shape)}"
            )
        self.register_buffer("transformed", transformed.clone())
        self.transformer = transformer or Affine()
        outputs = channels * self.transformer.num_params
        self.network = ConvNet(channels, hidden_channels, outputs, context_dim=context_dim, zero_init=True)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the chosen coordinates."""
        return self._choose(x, *self.transformer.forward(x, self._params(x, context)))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the chosen coordinates back."""
        return self._choose(y, *self.transformer.inverse(y, self._params(y, context)))

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        out = self.network(torch.where(self.transformed, 0.0, x), context)
        params: Tensor = out.unflatten(-3, (-1, self.transformer.num_params)).movedim(-3, -1)
        return params

    def _choose(self, x: Tensor, moved: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(self.transformed, moved, x), torch.where(self.transformed, log_det, 0.0).sum((-3, -2, -1))


@checked
def multiscale(
    event_shape: Sequence[Size], num_scales: Size, steps: Callable[[tuple[int, int, int], bool], Sequence[Flow]]
) -> Sequential:
    r"""Build a multi-scale architecture, the nesting of `Squeezed` and `Split` of Real NVP and Glow.

    Seen from the data, every scale applies steps to the image `(c, h, w)`, squeezes it, applies steps to the squeezed
    image `(4c, h/2, w/2)` and factors out half of its channels; the other half, `(2c, h/2, w/2)`, is the image of the
    next scale. The last scale factors nothing out. Real NVP has three checkerboard couplings before and three channel
    couplings after each squeeze (in the paper, the last scale has four checkerboard couplings and no squeeze); Glow has
    nothing before, and after it K steps of `ActNorm`, a linear map of the channels and a channel coupling.

    Args:
        event_shape: `(channels, height, width)`, height and width multiples of `2 ** num_scales`.
        num_scales: Number of scales, at least 1.
        steps: Called with the shape of an image and whether it is a squeezed one, returns the flows to apply to it, in
            the order from base to data; at least one for a squeezed image, maybe none before the squeeze.

    Returns:
        A flow over `event_shape`, the identity at first if all steps are.

    Raises:
        ValueError: If the image cannot be halved `num_scales` times.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, section 3.6; Kingma,
        Dhariwal (2018), "Glow", arXiv:1807.03039, figure 2.

    Example:
        Real NVP:

        >>> import torch
        >>> from pyro_nf.flows.images import ImageCoupling, multiscale
        >>> def steps(event_shape, squeezed):
        ...     mask = "channel" if squeezed else "checkerboard"
        ...     return [ImageCoupling(event_shape, mask, invert=i % 2 == 1) for i in range(3)]
        >>> flow = multiscale((1, 8, 8), 2, steps)
        >>> flow(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])

        Glow:

        >>> from pyro_nf.flows import Sequential
        >>> from pyro_nf.flows.images import Channelwise
        >>> from pyro_nf.flows.linear import LULinear
        >>> from pyro_nf.flows.normalization import ActNorm
        >>> def step(c, h, w):
        ...     mix = Sequential(LULinear(c, order=range(c)[::-1]), ActNorm(c))
        ...     return Sequential(ImageCoupling((c, h, w), "channel"), Channelwise(mix, h, w))
        >>> flow = multiscale((1, 8, 8), 2, lambda s, squeezed: [step(*s) for _ in range(3)] if squeezed else [])
    """
    if len(event_shape) != 3 or any(size % 2**num_scales for size in event_shape[1:]):
        raise ValueError(
            "event_shape must be (channels, height, width), height and width multiples of 2 ** num_scales, num_scales "
            f">= 1; got {tuple(event_shape)} and num_scales={num_scales}"
        )
    channels, height, width = event_shape
    squeezed = (4 * channels, height // 2, width // 2)
    inner = _flows(steps, squeezed, True)
    if num_scales > 1:
        coarser = multiscale((2 * channels, height // 2, width // 2), num_scales - 1, steps)
        inner.insert(0, Split(coarser, 4 * channels))
    return Sequential(Squeezed(Sequential(*inner)), *_flows(steps, (channels, height, width), False))


def _flows(steps: Callable[..., Any], event_shape: tuple[int, int, int], squeezed: bool) -> list[Flow]:
    """The flows that `steps` makes."""
    try:
        made = steps(event_shape, squeezed)
    except TypeError as error:
        raise ValueError(f"steps must be a function (event_shape, squeezed) -> list of flows; {error}") from error
    if not isinstance(made, Sequence) or not all(isinstance(flow, Flow) for flow in made):
        raise ValueError(f"steps must return a list of flows; it returned {made!r}")
    return list(made)


def _of_pixels(context: Tensor | None) -> Tensor | None:
    return None if context is None else context[..., None, None, :]


def _squeeze(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], -3)


def _unsqueeze(y: Tensor) -> Tensor:
    pixels = y.chunk(4, -3)
    upper, lower = (torch.stack(pair, -1).flatten(-2) for pair in (pixels[:2], pixels[2:]))
    return torch.stack([upper, lower], -2).flatten(-3, -2)


def _join(first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest.expand(*first.shape[:-3], *rest.shape[-3:])], -3)
