"""Block neural autoregressive flow."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import implicit_gradient, soft_bound, solve_increasing
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import MaskedLinear, freeze, start_at_zero

# Of the log of an activation's slope at its centre, and of the log of its steepness: e^5 = 148 and e^3 = 20.
LOG_GAIN_BOUND = 5.0
LOG_STEEPNESS_BOUND = 3.0


class BlockAutoregressive(Flow):
    r"""Block neural autoregressive flow: one network, increasing in each coordinate, any function of those before it.

    Every coordinate has `units` hidden units in each of `depth` layers. A layer is `h = act(P h_own + B h_before + b)`:
    P averages the coordinate's own units with positive weights that sum to 1, B sees the units of the coordinates
    before, without restriction. The activation `act(u) = u + (g - 1) tanh(a u + c) / a`, `a, g > 0`, has slopes between
    1 and g and is linear in both tails, so that the flow's image is R^dim; tanh itself, as in the paper, has a bounded
    image, and the density of such a flow does not integrate to 1. A last layer without activation averages the units.
    With g = 1 and B = 0 this is the identity, where the flow starts. The context enters the first layer as a sum.

    `log_det = sum_i log dy_i/dx_i`, the slopes from the chain rule within the blocks. Forward costs one pass. The
    inverse finds one coordinate after another numerically, with implicit gradients: `dim` steps of some 35
    evaluations of the coordinate's own units.

    Args:
        dim: Number of coordinates.
        units: Hidden units of a coordinate in each layer.
        depth: Number of hidden layers.
        reverse: Whether the last coordinate comes first. Alternate it between layers.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If `units` or `depth` is less than 1.

    References:
        De Cao, Titov, Aziz (2019), "Block neural autoregressive flow", arXiv:1904.04676, section 3.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import BlockAutoregressive
        >>> flow = BlockAutoregressive(3)
        >>> bool(torch.allclose(flow(torch.ones(3)), torch.ones(3)))
        True
    """

    @checked
    def __init__(
        self, dim: Size, units: Size = 8, depth: Size = 2, reverse: bool = False, context_dim: Count = 0
    ) -> None:
        super().__init__((dim,), context_dim)
        self.reverse = reverse
        widths = [1, *[units] * depth, 1]
        self.layers = nn.ModuleList(_BlockLinear(dim, *pair) for pair in pairwise(widths))
        self.activations = nn.ModuleList(_Activation(dim, units) for _ in range(depth))
        self.from_context = None
        if context_dim > 0:
            self.from_context = nn.Linear(context_dim, dim * units, bias=False)
            start_at_zero(self.from_context)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the network."""
        before, averages, activations = self._parts(context)

        def offset(k: int, h: Tensor) -> Tensor:
            weight, bias = before[k]
            total = nn.functional.linear(h.flatten(-2), weight) + bias
            blocks: Tensor = total.unflatten(-1, (h.shape[-2], -1))
            return blocks

        y, slope, _ = _run(x.flip(-1) if self.reverse else x, averages, activations, offset)
        # A slope is a sum of products of positive numbers.
        return y.flip(-1) if self.reverse else y, slope.log().sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for one coordinate after another."""
        before, averages, activations = self._parts(context)
        # What the coordinates already found add to the units of those that wait, and the weights that carry it there.
        blocks = [weight.split(average.shape[-1], 1) for (weight, _), average in zip(before, averages, strict=True)]
        waiting = [bias for _, bias in before]
        values, log_slopes = [], []
        for i, target in enumerate((y.flip(-1) if self.reverse else y).split(1, -1)):
            own = [average[i : i + 1] for average in averages], [[p[i : i + 1] for p in act] for act in activations]
            offsets = []
            for k, rest in enumerate(waiting):
                units = averages[k].shape[1]
                offsets.append(rest[..., None, :units])
                waiting[k] = rest[..., units:]
            x = _solve(target, *own, offsets)
            _, slope, inputs = _run(x, *own, _fixed(offsets))
            for k, h in enumerate(inputs):
                rows = blocks[k][i][len(blocks[k][i]) - waiting[k].shape[-1] :]
                waiting[k] = waiting[k] + nn.functional.linear(h.flatten(-2), rows)
            values.append(x)
            log_slopes.append(slope.log())
        x = torch.cat(values[::-1] if self.reverse else values, -1)
        return x, -torch.cat(log_slopes, -1).sum(-1)

    def _parts(self, context: Tensor | None) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], list["Activation"]]:
        """Of each layer, weight and bias of what comes before, the averages, and the activation's parameters."""
        layers: list[Any] = list(self.layers)
        before = [(layer.before.masked_weight(), layer.before.bias) for layer in layers]
        if self.from_context is not None:
            before[0] = before[0][0], before[0][1] + self.from_context(context)
        return before, [layer.own.softmax(-1) for layer in layers], [activation() for activation in self.activations]


class _BlockLinear(nn.Module):
    """What a layer takes from a coordinate's own units, and from those of the coordinates before."""

    def __init__(self, dim: int, units_in: int, units_out: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(dim, units_out, units_in))
        if units_in == 1:
            freeze(self, "own")  # the weight of a single unit is 1
        before, after = (torch.arange(dim).repeat_interleave(units) for units in (units_in, units_out))
        self.before = MaskedLinear(after[:, None] > before)
        start_at_zero(self.before)


class _Activation(nn.Module):
    """Parameters of `u + (g - 1) tanh(a u + c) / a`: g - 1, a and c. Units differ at first in a and c."""

    def __init__(self, dim: int, units: int) -> None:
        super().__init__()
        self.raw_gain = nn.Parameter(torch.zeros(dim, units))
        self.raw_steepness = nn.Parameter(0.5 * torch.randn(dim, units))
        self.centre = nn.Parameter(torch.randn(dim, units))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        gain = soft_bound(self.raw_gain, LOG_GAIN_BOUND).exp()
        return gain, soft_bound(self.raw_steepness, LOG_STEEPNESS_BOUND).exp(), self.centre


Activation = Sequence[Tensor]


Offset = Callable[[int, Tensor], Tensor]


def _fixed(offsets: Sequence[Tensor]) -> Offset:
    return lambda k, h: offsets[k]


def _run(
    x: Tensor, averages: Sequence[Tensor], activations: Sequence[Activation], offset: Offset
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the units of some coordinates.

    Args:
        x: The coordinates, `(*batch, n)`.
        averages: Weights of each layer, `(n, after, before)`.
        activations: Parameters of each layer's activation but the last's, `(n, units)`.
        offset: Gives what other coordinates add to a layer, `(*batch, n, after)`, from the layer's input.

    Returns:
        `y` and `dy/dx`, `(*batch, n)`, and the inputs of all layers.
    """
    h, inputs = x[..., None], []
    slope = torch.ones_like(h)
    for k, average in enumerate(averages):
        inputs.append(h)
        h, slope = _average(average, h) + offset(k, h), _average(average, slope)
        if k < len(activations):
            gain, steepness, centre = activations[k]
            t = torch.tanh(steepness * h + centre)
            h = h + (gain - 1) / steepness * t
            slope = slope * (t**2 + gain * (1 - t**2))  # a weighted mean of 1 and g
    return h[..., 0], slope[..., 0], inputs


def _average(weights: Tensor, h: Tensor) -> Tensor:
    """Average the units of each coordinate, `(*batch, n, before)` to `(*batch, n, after)`."""
    if len(weights) == 1:  # of one coordinate: a plain product
        return nn.functional.linear(h, weights[0])
    return torch.einsum("noi,...ni->...no", weights, h)


def _solve(
    y: Tensor, averages: Sequence[Tensor], activations: Sequence[Activation], offsets: Sequence[Tensor]
) -> Tensor:
    """Find the coordinate, `(*batch, 1)`, at which its units give y."""
    # All units lie between x + low and x + high: averages keep such bounds, and an activation moves a unit by less than
    # |g - 1| / a.
    with torch.no_grad():
        low = high = torch.zeros_like(y)[..., None]
        for k, (average, offset) in enumerate(zip(averages, offsets, strict=True)):
            low, high = (_average(average, bound) + offset for bound in (low, high))
            if k < len(activations):
                gain, steepness, _ = activations[k]
                reach = (gain - 1).abs() / steepness
                low, high = low - reach, high + reach
        x = solve_increasing(
            lambda x: _run(x, averages, activations, _fixed(offsets))[:2], y, y - high[..., 0], y - low[..., 0]
        )
    if torch.is_grad_enabled():
        value, slope, _ = _run(x, averages, activations, _fixed(offsets))
        x = implicit_gradient(x, y - value, lambda r: r / slope.detach())
    return x
