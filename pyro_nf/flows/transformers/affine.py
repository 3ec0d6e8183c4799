"""Transformers that are affine in their coordinate: additive, affine, gated."""

import math

import torch
from torch import Tensor

from pyro_nf.flows.numerics import soft_bound
from pyro_nf.interface.arguments import Positive, checked


class Additive:
    r"""`y = x + shift`: volume preserving.

    References:
        Dinh, Krueger, Bengio (2014), "NICE", arXiv:1410.8516, section 3.2.
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x + shift` and zero."""
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y - shift` and zero."""
        x = y - params[..., 0]
        return x, torch.zeros_like(x)


class Affine:
    r"""`y = shift + exp(s) x`, with s softly bounded.

    Args:
        bound: Bound of `|s|`; the default lets one layer scale by e^5 = 148 either way.

    References:
        Dinh, Sohl-Dickstein, Bengio (2016), "Density estimation using Real NVP", arXiv:1605.08803, equation 4.
    """

    num_params = 2

    @checked
    def __init__(self, bound: Positive = 5.0) -> None:
        self.bound = bound

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `shift + exp(s) x` and s."""
        shift, log_scale = params[..., 0], soft_bound(params[..., 1], self.bound)
        y = torch.addcmul(shift, log_scale.exp(), x)
        return y, log_scale.expand_as(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(y - shift) exp(-s)` and -s."""
        shift, log_scale = params[..., 0], soft_bound(params[..., 1], self.bound)
        x = (y - shift) * (-log_scale).exp()
        return x, -log_scale.expand_as(x)


class Gated:
    r"""`y = x gate / gate_0 + shift (1 - gate) / (1 - gate_0)`, `gate = sigmoid(s + forget_bias)`, gate_0 at s = 0.

    The numerically stable update of inverse autoregressive flow, both terms divided by their gates at s = 0: so it
    starts as the identity, and as ready to shift as to scale. s is softly bounded, or a closed gate would forget x to
    rounding error and not be invertible.

    Args:
        forget_bias: How far the gate is open at first.
        bound: Bound of `|s|`.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), "Improving variational inference with inverse
        autoregressive flow", arXiv:1606.04934, equations 12-14.
    """

    num_params = 2

    @checked
    def __init__(self, forget_bias: float = 2.0, bound: Positive = 5.0) -> None:
        self.forget_bias = forget_bias
        self.bound = bound

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y` and `log(gate / gate_0)`."""
        offset, scale, log_scale = self._unpack(params)
        y = torch.addcmul(offset, scale, x)
        return y, log_scale.expand_as(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` and `-log(gate / gate_0)`."""
        offset, scale, log_scale = self._unpack(params)
        x = (y - offset) / scale
        return x, -log_scale.expand_as(x)

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, s = params[..., 0], soft_bound(params[..., 1], self.bound) + self.forget_bias
        first_closing = math.exp(-self.forget_bias)
        first, closing = 1 + first_closing, (-s).exp()  # of a bounded number
        scale = first / (1 + closing)
        # A gate's complement is closing * gate, without cancellation.
        return closing / first_closing * scale * shift, scale, math.log(first) - closing.log1p()
