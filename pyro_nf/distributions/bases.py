"""Base distributions of flow guides: modules that make one at each call, from their present parameters."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf.distributions.defensive import DefensiveNormal
from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.flows.numerics import positive
from pyro_nf.interface.arguments import check_choice
from pyro_nf.networks import Switch

# Below two degrees of freedom a Student-t has no variance, and the ELBO's gradient none either.
_MIN_DF = 2.0


class NormalBase(nn.Module):
    """Standard normal over `dim` coordinates; or, once `defend` was called, a mixture with a wider one.

    Args:
        dim: Number of coordinates.

    Attributes:
        defensive_weight: Weight of the wider normal, `()`.
    """

    zeros: Tensor
    defensive_weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)
        self.register_buffer("defensive_weight", torch.zeros(()))
        self.defended = Switch()

    def defend(self, weight: float) -> None:
        """Give the wider normal this weight; 0 for none."""
        self.defensive_weight.fill_(weight)
        self.defended.set(weight > 0)

    def forward(self) -> Any:
        """Return the distribution."""
        if self.defended:
            return DefensiveNormal(self.zeros, self.defensive_weight)
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)


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
