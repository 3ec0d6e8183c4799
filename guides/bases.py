"""Base distributions of flow guides: modules that make one at each call, from their present parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.flows.numerics import positive
from pyro_nf.guides.mixture import MixtureBase
from pyro_nf.interface.arguments import check_choice

# Below two degrees of freedom a Student-t has no variance, and the ELBO's gradient none either.
_MIN_DF = 2.0
# Scale of a normal base's wide part. Wider ones, and Student-t, cost more for the same k-hat: where a fit is good but
# for its tail, the largest weights are those of draws from where a normal has few, not none.
_WIDE = 1.2


class NormalBase(nn.Module):
    """Standard normal over `dim` coordinates, of which `widen` makes a part wider.

    Args:
        dim: Number of coordinates.
    """

    zeros: Tensor
    share: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)
        self.register_buffer("share", torch.zeros(()))
        self._is_wide = False

    def widen(self, share: float) -> None:
        """Let this share of the draws be of a wider normal; 0 for none."""
        self.share.fill_(share)
        self._is_wide = share > 0

    def forward(self) -> Any:
        """Return the distribution."""
        if self._is_wide:
            return DefensiveNormal(self.zeros, self.share)
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_wide = bool(self.share > 0)


class DefensiveNormal(TorchDistribution):
    r"""`(1 - w) N(0, I) + w N(0, 1.44 I)`.

    Importance weights p / q of a q with such a part have a lighter tail where p has more far draws than a normal; the
    price in divergence is of the order of w^2 where the rest fits.

    Args:
        zeros: `(dim,)`.
        share: w, between 0 and 1, `()`.
        batch_shape: Shape of independent copies.

    References:
        Hesterberg (1995), "Weighted average importance sampling and defensive mixture distributions",
        Technometrics 37, section 3.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, zeros: Tensor, share: Tensor, batch_shape: Sequence[int] = ()) -> None:
        self.zeros, self.share = zeros, share
        super().__init__(torch.Size(batch_shape), zeros.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DefensiveNormal":
        """Return the same distribution with a larger batch shape, whose draws are independent."""
        return DefensiveNormal(self.zeros, self.share, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, dim)`."""
        shape = torch.Size(sample_shape) + self.batch_shape
        draws: Tensor = dist.Normal(self.zeros, torch.ones_like(self.zeros)).rsample(shape)
        is_wide = torch.rand_like(draws[..., :1]) < self.share
        return torch.where(is_wide, _WIDE * draws, draws)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at `value: (*shape, *batch, dim)`."""
        dim, square = value.shape[-1], value.square().sum(-1)
        normal = -0.5 * (square + dim * math.log(2 * math.pi))
        wide = normal + 0.5 * square * (1 - _WIDE**-2) - dim * math.log(_WIDE)
        return torch.logaddexp((-self.share).log1p() + normal, self.share.log() + wide)


class StudentTBase(nn.Module):
    r"""Independent Student-t over `dim` coordinates, with a trainable number of degrees of freedom for each.

    `df = 2 + (init_df - 2) softplus(raw + log(e - 1))`, raw starting at 0. The base's heavy tails
    put draws where a normal base has none; df follows the ELBO during the fit.

    Args:
        dim: Number of coordinates.
        init_df: Initial degrees of freedom, more than 2.
    """

    def __init__(self, dim: int, init_df: float = 10.0) -> None:
        super().__init__()
        self.init_df = init_df
        self.raw_df = nn.Parameter(torch.zeros(dim))

    def forward(self) -> Any:
        """Return the distribution."""
        df = _MIN_DF + (self.init_df - _MIN_DF) * positive(self.raw_df)
        zeros = torch.zeros_like(df)
        return dist.StudentT(df, zeros, torch.ones_like(df)).to_event(1)


BaseLike = str | Callable[[int], nn.Module]

_BASES: dict[str, Callable[[int], nn.Module]] = {
    "normal": NormalBase,
    "student_t": StudentTBase,
    "mixture": MixtureBase,
}


def check_base(base: BaseLike) -> None:
    """Raise a `ValueError` unless this names a base, the nearest one offered, or makes one."""
    if not callable(base):
        check_choice("base", base, _BASES, also="a factory dim -> module")


def make_base(base: BaseLike, dim: int) -> nn.Module:
    """Build a base over `dim` coordinates, from its name or its factory.

    Raises:
        ValueError: If a factory makes no module that returns a distribution over as many coordinates.
    """
    check_base(base)
    if isinstance(base, str):
        return _BASES[base](dim)
    try:
        made = base(dim)
    except TypeError as error:
        raise ValueError(
            f"base must be a factory of a module from a number of coordinates; it fails: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"base must be a factory that returns a module; it returned {made!r} for dim={dim}")
    made_of = made()
    shape = getattr(made_of, "event_shape", None)
    if shape != (dim,):
        got = type(made_of).__name__ if shape is None else f"one of event shape {tuple(shape)}"
        raise ValueError(f"base must return a distribution over the {dim} coordinates when it is called; got {got}")
    return made
