"""Likelihoods of a decoder's data: what its outputs mean."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.flows.numerics import soft_bound
from pyro_nf.interface.arguments import check_whole_number

# Bounds the density: an autoencoder could otherwise put an infinite one on a constant pixel.
_MIN_SCALE = 1e-3
# Of the log scale of a logistic, in half ranges: e^-7 is a tenth of a level of 256.
_LOG_SCALE_BOUND = 7.0


@runtime_checkable
class Likelihood(Protocol):
    """A decoder's head: outputs to a distribution of data with event shape `(data_dim,)`.

    Attributes:
        num_params: Outputs for each value of a datum. They stand parameter by parameter,
            `(*batch, num_params * data_dim)`: the first of every value, then the second.
    """

    @property
    def num_params(self) -> int:
        """Outputs for each value of a datum."""

    def __call__(self, outputs: Tensor) -> TorchDistribution:
        """Return the distribution of data."""


@dataclass(frozen=True)
class BernoulliLikelihood:
    """Independent binary values, 0 and 1, with logits `outputs: (*batch, data_dim)`.

    Example:
        >>> import torch
        >>> from pyro_nf.models import BernoulliLikelihood
        >>> BernoulliLikelihood()(torch.zeros(5, 3)).log_prob(torch.ones(5, 3))[0]
        tensor(-2.0794)
    """

    num_params = 1

    def __call__(self, outputs: Tensor) -> TorchDistribution:
        """Return the distribution of data."""
        return dist.Bernoulli(logits=outputs).to_event(1)


@dataclass(frozen=True)
class NormalLikelihood:
    """Independent normals; `outputs: (*batch, 2 data_dim)` are locations, then scales before softplus, plus 0.001."""

    num_params = 2

    def __call__(self, outputs: Tensor) -> TorchDistribution:
        """Return the distribution of data."""
        loc, raw_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(raw_scale) + _MIN_SCALE).to_event(1)


@dataclass(frozen=True)
class CategoricalLikelihood:
    """Independent classes `0 .. num_classes - 1`; `outputs: (*batch, num_classes * data_dim)` are logits.

    Args:
        num_classes: Number of classes, at least 2.

    Raises:
        ValueError: If there are fewer.
    """

    num_classes: int

    def __post_init__(self) -> None:
        check_whole_number("num_classes", self.num_classes, least=2)

    @property
    def num_params(self) -> int:
        """One logit for each class."""
        return self.num_classes

    def __call__(self, outputs: Tensor) -> TorchDistribution:
        """Return the distribution of data."""
        return dist.Categorical(logits=outputs.unflatten(-1, (self.num_classes, -1)).mT).to_event(1)


@dataclass(frozen=True)
class LogisticMixtureLikelihood:
    r"""Independent mixtures of logistics, of real values or of levels `0 .. num_levels - 1`.

    Each value is `sum_k w_k Logistic(loc_k, scale_k)`. Of levels, level x has the mass that the mixture puts on
    `(x - 1/2, x + 1/2)`, the lowest and the highest all that lies beyond: the probabilities sum to 1.

    `outputs: (*batch, 3 num_components data_dim)` are logits of w, locations and log scales, each component by
    component. For levels locations and scales are in units of the half range `(num_levels - 1) / 2`, with 0 in the
    middle, so that outputs of order 1 reach every level. Log scales are softly bounded by +-7.

    Args:
        num_components: Number of logistics, at least 1.
        num_levels: Number of levels, at least 2; `None` for real values.

    Raises:
        ValueError: If a number is too small.

    References:
        Salimans, Karpathy, Chen, Kingma (2017), "PixelCNN++", arXiv:1701.05517, equations 1 and 2.

    Example:
        >>> import torch
        >>> from pyro_nf.models import LogisticMixtureLikelihood
        >>> head = LogisticMixtureLikelihood(num_components=2, num_levels=3)
        >>> levels = torch.arange(3.0)[:, None]
        >>> round(float(head(torch.zeros(6)).log_prob(levels).exp().sum()), 4)
        1.0
    """

    num_components: int = 5
    num_levels: int | None = 256

    def __post_init__(self) -> None:
        check_whole_number("num_components", self.num_components)
        if self.num_levels is not None:
            check_whole_number("num_levels", self.num_levels, least=2)

    @property
    def num_params(self) -> int:
        """Three for each component."""
        return 3 * self.num_components

    def __call__(self, outputs: Tensor) -> TorchDistribution:
        """Return the distribution of data."""
        logits, loc, raw = outputs.unflatten(-1, (3, self.num_components, -1)).mT.unbind(-3)
        log_scale = soft_bound(raw, _LOG_SCALE_BOUND)
        logistic: TorchDistribution
        if self.num_levels is None:
            logistic = dist.Logistic(loc, log_scale.exp())
        else:
            half = 0.5 * (self.num_levels - 1)
            logistic = DiscretizedLogistic(half * (1 + loc), half * log_scale.exp(), self.num_levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), logistic).to_event(1)


class DiscretizedLogistic(TorchDistribution):  # type: ignore[misc]
    r"""Logistic distribution in bins of width 1 around the levels `0 .. num_levels - 1`, its tails in the outer ones.

    `p(x) = F(x + 1/2) - F(x - 1/2)`, `F(y) = sigmoid((y - loc) / scale)`, with `F = 0` below the lowest level's bin and
    1 above the highest's.

    Args:
        loc: Location, any shape.
        scale: Positive scale, a shape that broadcasts with it.
        num_levels: Number of levels.
        validate_args: As in every torch distribution.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 - as torch declares it

    def __init__(self, loc: Tensor, scale: Tensor, num_levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The levels."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of levels."""
        if self._validate_args:
            self._validate_sample(value)
        lower = (value - 0.5 - self.loc) / self.scale
        upper = (value + 0.5 - self.loc) / self.scale
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u)), and u - l = 1 / scale > 0: nothing cancels.
        above, below = nn.functional.logsigmoid(upper), nn.functional.logsigmoid(-lower)
        inside = above + below + (-torch.expm1(-1 / self.scale)).log()
        result: Tensor = torch.where(value < 0.5, above, torch.where(value > self.num_levels - 1.5, below, inside))
        return result

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels, `(*sample_shape, *batch_shape)`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            logit = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).logit(
                torch.finfo(self.loc.dtype).eps
            )
            draws: Tensor = (self.loc + self.scale * logit).round().clamp(0, self.num_levels - 1)
        return draws

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedLogistic":
        """Return the distribution with its batch expanded."""
        return DiscretizedLogistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.num_levels, False)
