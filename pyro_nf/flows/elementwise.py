"""Nonlinear gates, one coordinate at a time: PReLU, leaky ReLU, S-Log."""

import math

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import LOG_SCALE_BOUND, soft_bound
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters

# One gate grows at most like e^|x|, which float32 holds up to |x| = 88.
SLOG_BOUND = 1.0


class PReLU(Flow):
    r"""Parametric rectifier, `y_i = x_i` for `x_i >= 0` and `alpha_i x_i` below, `alpha_i > 0`.

    `log_det = sum of log alpha_i over x_i < 0`. Both directions cost O(dim). `log alpha` is trained, softly bounded by
    +-30, and starts at 0: the identity.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        He, Zhang, Ren, Sun (2015), "Delving deep into rectifiers", arXiv:1502.01852, equation 1.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.elementwise import PReLU
        >>> PReLU(2)(torch.tensor([-1.0, 3.0])).detach()
        tensor([-1.,  3.])
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters({"log_alpha": torch.zeros(dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale the negative coordinates by alpha."""
        (raw,) = self.params(context)
        return _rectify(x, soft_bound(raw, LOG_SCALE_BOUND))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale the negative coordinates by 1 / alpha."""
        (raw,) = self.params(context)
        return _rectify(y, -soft_bound(raw, LOG_SCALE_BOUND))


class LeakyReLU(Flow):
    r"""Leaky rectifier, `y_i = x_i` for `x_i >= 0` and `alpha x_i` below, with one fixed alpha.

    `log_det = log(alpha)` times the number of negative coordinates. Both directions cost O(dim). There is nothing to
    train; the identity is `alpha = 1`.

    Args:
        dim: Number of coordinates.
        alpha: Slope below zero, positive.

    Raises:
        ValueError: If `alpha` is not positive and finite.

    References:
        Maas, Hannun, Ng (2013), "Rectifier nonlinearities improve neural network acoustic models", ICML workshop.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.elementwise import LeakyReLU
        >>> LeakyReLU(2, alpha=0.5)(torch.tensor([-1.0, 3.0]))
        tensor([-0.5000,  3.0000])
    """

    @checked
    def __init__(self, dim: Size, alpha: float = 0.01) -> None:
        super().__init__((dim,))
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a positive, finite number; got {alpha}")
        self.log_alpha = math.log(alpha)  # alpha > 0 by the check above

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale the negative coordinates by alpha."""
        return _rectify(x, torch.full_like(x, self.log_alpha))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale the negative coordinates by 1 / alpha."""
        return _rectify(y, torch.full_like(y, -self.log_alpha))


class SLog(Flow):
    r"""S-Log gate, `y = sign(x) log(1 + alpha |x|) / alpha`, for each coordinate, and its inverse for `alpha < 0`.

    The inverse of a gate is `y = sign(x) (exp(|alpha| |x|) - 1) / |alpha|`. Calling it the gate of `-|alpha|` makes
    one family of all gates and inverses, continuously differentiable through the identity at `alpha = 0`, where the
    flow starts: alpha > 0 makes tails lighter, alpha < 0 heavier. With `u = alpha |x|`, the terms of `log_det` are
    `-log(1 + u)` for alpha > 0 and `-u` for alpha < 0. Both directions cost O(dim).

    `|alpha|` is softly bounded by 1. A sharper gate is this one between two scalings, because the gate of `k alpha` at
    x is the gate of `alpha` at `k x`, over k. Beware that one of the directions is exponential: at a distance x, it
    overflows for `|alpha x| > 88` in float32 and 709 in float64, its gradients a little before.

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Karami, Schuurmans, Sohl-Dickstein, Dinh, Duckworth (2019), "Invertible convolutional flow", NeurIPS 32. The
        gate there has alpha > 0.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.elementwise import SLog
        >>> flow = SLog(2)
        >>> torch.nn.init.ones_(flow.params.alpha).detach()  # softly bounded to 1/2
        tensor([1., 1.])
        >>> flow(torch.tensor([-2.0, 3.0])).detach()  # -2 log(1 + 1) and 2 log(1 + 3/2)
        tensor([-1.3863,  1.8326])
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters({"alpha": torch.zeros(dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the gate of alpha."""
        (raw,) = self.params(context)
        return _slog(x, soft_bound(raw, SLOG_BOUND))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the gate of -alpha."""
        (raw,) = self.params(context)
        return _slog(y, -soft_bound(raw, SLOG_BOUND))


def _rectify(x: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    negative = x < 0
    return torch.where(negative, log_alpha.exp() * x, x), torch.where(negative, log_alpha, 0.0).sum(-1)


def _slog(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    u = alpha * x.abs()
    # log1p of a number >= 0. Clamping the branch that is not taken keeps its gradient finite, as does the where below.
    log_u = u.clamp(min=0).log1p()
    # Differentiating gate / alpha by alpha, autograd subtracts terms of size 1 / u: an error of eps / u. Near 0, the
    # series to second order errs by u^3, and by u^2 in its derivative. They meet at |u| = eps^(1/3): values are exact
    # to rounding everywhere, derivatives to eps^(2/3).
    far = u.abs() > torch.finfo(u.dtype).eps ** (1 / 3)
    near_u = torch.where(far, 0.0, u)
    series = x * (1 - near_u / 2 + near_u**2 / torch.where(u > 0, 3, 6))
    gate = x.sign() * torch.where(u > 0, log_u, -(-u).clamp(min=0).expm1()) / torch.where(far, alpha, 1.0)
    return torch.where(far, gate, series), -torch.where(u > 0, log_u, u).sum(-1)
