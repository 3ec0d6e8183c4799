"""Transformers that are mixtures of sigmoids: the deep sigmoidal flow and the mixture of logistics."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_nf.flows.numerics import implicit_gradient, soft_bound, solve_increasing
from pyro_nf.flows.transformers.affine import Affine
from pyro_nf.interface.arguments import Size, checked

# Of |log a| and |b|: slopes of a unit between 1/20 and 20, and of the whole map above e^-3 sigmoid(-10) = 2e-6, far
# enough from 0 for an inverse in float32.
LOG_SLOPE_BOUND = 3.0
SHIFT_BOUND = 10.0


class DeepSigmoidal:
    r"""`y = logit(sum_k w_k sigmoid(a_k x + b_k))`, w on the simplex, a > 0: the deep sigmoidal flow of one layer.

    `dy/dx = sum_k w_k a_k s_k (1 - s_k) / (s (1 - s))`, `s_k = sigmoid(a_k x + b_k)`, `s = sum_k w_k s_k`. Both tails
    are linear, with the smallest a as slope, so the image is R. Everything is computed from `log s` and `log(1 - s)`:
    no logit is clipped. With all parameters 0 every unit is the identity; each unit's b grows at a pace of its own, or
    equal units would stay equal forever. The inverse is found numerically, with implicit gradients.

    Args:
        num_units: Number of sigmoids.

    References:
        Huang, Krueger, Lacoste, Courville (2018), "Neural autoregressive flows", arXiv:1804.00779, equation 8.
    """

    @checked
    def __init__(self, num_units: Size = 8) -> None:
        self.num_units = num_units
        self.num_params = 3 * num_units

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y` and `log dy/dx`."""
        return _mix(x, *self._unpack(params))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x`, found numerically, and `log dx/dy`."""
        log_w, log_a, b = self._unpack(params)
        # s is a mean of the s_k, so y lies between the smallest and the largest a_k x + b_k.
        candidates = ((y[..., None] - b) * (-log_a).exp()).detach()

        def mixture(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = _mix(x, log_w, log_a, b)
            return value, log_slope.exp()

        x = solve_increasing(mixture, y, candidates.amin(-1), candidates.amax(-1))
        if torch.is_grad_enabled():
            value, log_slope = _mix(x, log_w, log_a, b)
            x = implicit_gradient(x, y - value, lambda r: r * (-log_slope.detach()).exp())
        return x, -_mix(x, log_w, log_a, b)[1]

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw_w, raw_a, raw_b = params.unflatten(-1, (3, self.num_units)).unbind(-2)
        pace = torch.arange(1, self.num_units + 1, dtype=params.dtype, device=params.device) * (2 / self.num_units)
        return raw_w.log_softmax(-1), soft_bound(raw_a, LOG_SLOPE_BOUND), soft_bound(pace * raw_b, SHIFT_BOUND)


class LogisticMixture:
    r"""`y = exp(s) logit(sum_k w_k sigmoid((x - loc_k) / scale_k)) + shift`: the mixture of logistics of Flow++.

    The sum is the distribution function of a mixture of logistic distributions, `DeepSigmoidal` with `a = 1 / scale`
    and `b = -loc / scale`, and an affine map follows: it can move a whole coordinate, which the mixture alone can do
    only within its bounds. s is softly bounded by +-5.

    Args:
        num_components: Number of logistic distributions.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel (2019), "Flow++", arXiv:1902.00275, equations 10-16.
    """

    @checked
    def __init__(self, num_components: Size = 8) -> None:
        self.mixture = DeepSigmoidal(num_components)
        self.affine = Affine()
        self.num_params = self.mixture.num_params + self.affine.num_params

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y` and `log dy/dx`."""
        mixture, affine = self._split(params)
        z, log_slope = self.mixture.forward(x, mixture)
        y, log_scale = self.affine.forward(z, affine)
        return y, log_slope + log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x`, found numerically, and `log dx/dy`."""
        mixture, affine = self._split(params)
        z, log_scale = self.affine.inverse(y, affine)
        x, log_slope = self.mixture.inverse(z, mixture)
        return x, log_slope + log_scale

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        return params[..., : self.mixture.num_params], params[..., self.mixture.num_params :]


def _mix(x: Tensor, log_w: Tensor, log_a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = log_a.exp() * x[..., None] + b
    log_s = logsigmoid(u)
    log_rest = log_s - u  # logsigmoid(-u)
    log_total, log_total_rest = (log_w + log_s).logsumexp(-1), (log_w + log_rest).logsumexp(-1)
    log_slope = (log_w + log_a + log_s + log_rest).logsumexp(-1)
    return log_total - log_total_rest, log_slope - log_total - log_total_rest
