"""Normalisation as flows, and the passes of data through a flow that set it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nf.flows.affine import ElementwiseAffine
from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import LOG_SCALE_BOUND, unbound
from pyro_nf.interface.arguments import Count, Positive, Size, check_real_tensor, checked


class ActNorm(ElementwiseAffine):
    r"""Activation normalisation, `y = loc + scale * x`, with a location and scale that data can set.

    `log_det = sum_i log scale_i`; both directions cost O(dim). It starts as the identity. `initialize` passes data
    through a flow and sets each `ActNorm` in it so that these data leave it with mean 0 and variance 1 in each
    coordinate; from then on location and scale train as any parameters. The buffer `initialized` says whether that has
    happened, and is saved and loaded along with the parameters. In images, `Channelwise(ActNorm(channels), height,
    width)` takes its statistics over the pixels, too.

    With a context, `initialize` sets the part of the parameters that is the flow's own; data leave normalised if the
    maps from the context are zero, as they are at first.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Kingma, Dhariwal (2018), "Glow", arXiv:1807.03039, section 3.1.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.normalization import ActNorm, initialize_actnorm
        >>> flow = ActNorm(1)
        >>> initialize_actnorm(flow, torch.tensor([[1.0], [3.0]]))
        >>> flow.inv(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [-1.0, 0.0, 1.0]
    """

    initialized: Tensor

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__(dim, context_dim)
        self.register_buffer("initialized", torch.tensor(0.0))
        self._measuring = False

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `loc + scale * x` and the sum of log scales."""
        if self._measuring:
            mean, log_scale = _standard(x)
            self._set(-mean * (-log_scale).exp(), -log_scale)
        return super().forward_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `(y - loc) / scale` and minus the sum of log scales."""
        if self._measuring:
            self._set(*_standard(y))
        return super().inverse_and_log_det(y, context)

    def _set(self, loc: Tensor, log_scale: Tensor) -> None:
        self.params.get_parameter("loc").copy_(loc)
        self.params.get_parameter("log_scale").copy_(unbound(log_scale, LOG_SCALE_BOUND))
        self.initialized.fill_(1.0)
        self._measuring = False


class BatchNorm(Flow):
    r"""Batch normalisation, from data to base `x = exp(gamma) * (y - m) / sqrt(v + eps) + beta`.

    `log |det dx/dy| = sum_i (gamma_i - log(v_i + eps) / 2)`, gamma softly bounded by +-30. Both directions cost O(dim).
    It starts as the identity in evaluation mode.

    In evaluation mode m and v are running statistics, and the two directions are inverses of each other. From base to
    data this is so in training mode, too. From data to base, in training mode, m and v are mean and variance of the
    batch `y` over all batch dimensions (gradients flow through them), and the running statistics follow them. Then the
    points of a batch depend on each other; the log-determinant is that of the map of one point with the statistics held
    fixed; and the directions are no inverses. Call `eval()` before any density is reported, and
    `set_batchnorm_statistics` first, to replace the running statistics by those of all training data.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context that beta and gamma are functions of; 0 for none.
        momentum: Weight of the batch in the running statistics, in (0, 1].
        eps: Added to the variance, positive: coordinates are best of a larger variance than this.

    Raises:
        ValueError: If `momentum` or `eps` is out of range, or a batch in training mode has fewer than two points.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, section 3.7 and
        appendix E; Papamakarios, Pavlakou, Murray (2017), "Masked autoregressive flow for density estimation",
        arXiv:1705.07057, which adds beta and gamma, and the statistics of all training data.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.normalization import BatchNorm
        >>> flow = BatchNorm(1)
        >>> flow.inverse_and_log_det(torch.tensor([[10.0], [30.0]]))[0].flatten().tolist()
        [-1.0, 1.0]
    """

    mean: Tensor
    variance: Tensor

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0, *, momentum: float = 0.1, eps: Positive = 1e-5) -> None:
        super().__init__((dim,), context_dim)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum}")
        self.momentum = momentum
        self.eps = eps
        self.affine = ElementwiseAffine(dim, context_dim)  # from data to base: beta and gamma
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))  # v + eps, so that it starts at exactly 1
        self._measuring = False

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo the normalisation by the running statistics."""
        normal, log_det = self.affine.inverse_and_log_det(x, context)
        # The variance includes eps: positive.
        return self.mean + self.variance.sqrt() * normal, log_det + 0.5 * self.variance.log().sum()

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise, in training mode by the statistics of the batch."""
        mean, variance = self._observe(y) if self.training or self._measuring else (self.mean, self.variance)
        # The variance includes eps: positive.
        x, log_det = self.affine.forward_and_log_det((y - mean) * variance.rsqrt(), context)
        return x, log_det - 0.5 * variance.log().sum()

    def _observe(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.shape[:-1].numel() < 2:
            raise ValueError(
                f"BatchNorm in training mode must get at least two points; got y of shape {tuple(y.shape)} (call "
                "eval() to normalise by the running statistics)"
            )
        variance, mean = torch.var_mean(y.flatten(0, -2), 0, correction=0)
        variance = variance + self.eps
        weight = 1.0 if self._measuring else self.momentum
        with torch.no_grad():
            self.mean.lerp_(mean, weight)
            self.variance.lerp_(variance, weight)
        self._measuring = False
        return mean, variance


@checked
def initialize_actnorm(flow: Flow, data: Tensor, context: Tensor | None = None, inverse: bool = True) -> None:
    r"""Set every `ActNorm` in a flow that is not yet initialised from one pass of data through the flow.

    Args:
        flow: An `ActNorm`, or a flow with any number of them inside.
        data: Points `(*batch, *event_shape)`, as many as are at hand.
        context: Their context, if the flow has one.
        inverse: Whether the data enter where `y` does, as in density estimation and in Glow, or, if false, at `x`.

    Raises:
        ValueError: If `data` hold no point or one that is not finite, are not of the flow's shape, or do not reach each
            `ActNorm`.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import Planar, Sequential
        >>> from pyro_nf.flows.normalization import ActNorm, initialize_actnorm
        >>> flow = Sequential(ActNorm(2), Planar(2), ActNorm(2))
        >>> initialize_actnorm(flow, 5 + 3 * torch.randn(100, 2))
        >>> [bool(part.initialized) for part in flow.modules() if isinstance(part, ActNorm)]
        [True, True]
    """
    layers = [layer for layer in flow.modules() if isinstance(layer, ActNorm) and not bool(layer.initialized)]
    _measure(flow, layers, data, context, inverse)


@checked
def set_batchnorm_statistics(flow: Flow, data: Tensor, context: Tensor | None = None, inverse: bool = True) -> None:
    r"""Set the running statistics of every `BatchNorm` in a flow to those of all data, in one pass.

    Args:
        flow: A `BatchNorm`, or a flow with any number of them inside.
        data: The training set, `(*batch, *event_shape)`.
        context: Its context, if the flow has one.
        inverse: Whether the data enter where `y` does; false where every `BatchNorm` stands in an `Inverse`.

    Raises:
        ValueError: If `data` hold fewer than two points or one that is not finite, are not of the flow's shape, or do
            not pass each `BatchNorm` from data to base.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.normalization import BatchNorm, set_batchnorm_statistics
        >>> flow = BatchNorm(1)
        >>> set_batchnorm_statistics(flow, torch.tensor([[10.0], [30.0]]))
        >>> flow.mean
        tensor([20.])
    """
    _measure(flow, [layer for layer in flow.modules() if isinstance(layer, BatchNorm)], data, context, inverse)


@torch.no_grad()
def _measure(
    flow: Flow, layers: Sequence[ActNorm | BatchNorm], data: Tensor, context: Tensor | None, inverse: bool
) -> None:
    """Pass data through a flow while these layers set themselves, each from what arrives there."""
    check_real_tensor("data", data, flow.event_shape)
    flow.check_inputs(data, context)
    if data.shape[: -len(flow.event_shape)].numel() < 2 and any(isinstance(layer, BatchNorm) for layer in layers):
        raise ValueError(f"data must be at least two points for a BatchNorm; got shape {tuple(data.shape)}")
    for layer in layers:
        layer._measuring = True
    try:
        (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(data, context)
        missed = sum(layer._measuring for layer in layers)  # each switches itself off once it is set
    finally:
        for layer in layers:
            layer._measuring = False
    if missed:
        raise ValueError(
            "data must reach every layer that they are to set, a BatchNorm in the direction from data to base; with "
            f"inverse={inverse} they miss {missed}"
        )


def _standard(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of each coordinate, as far as an `ActNorm` can hold them."""
    variance, mean = torch.var_mean(points.reshape(-1, points.shape[-1]), 0, correction=0)
    # Constant coordinates are only centred: where all spread is rounding, there is no scale to take out.
    constant = variance.sqrt() <= 8 * torch.finfo(mean.dtype).eps * mean.abs()
    # The argument of log is positive: a variance of 0 is a constant's. Its root may be outside the bound of scales.
    log_scale = 0.5 * torch.where(constant, 1.0, variance).log()
    return mean, log_scale.clamp(-0.9 * LOG_SCALE_BOUND, 0.9 * LOG_SCALE_BOUND)
