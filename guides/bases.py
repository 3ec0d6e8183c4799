"""Base distributions of flow guides: modules that make one at each call, from their present parameters."""

import difflib
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf.flows.numerics import positive
from pyro_nf.guides.mixture import MixtureBase

# Below two degrees of freedom a Student-t has no variance, and the ELBO's gradient none either.
_MIN_DF = 2.0


class NormalBase(nn.Module):
    """Standard normal over `dim` coordinates."""

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self) -> Any:
        """Return the distribution."""
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
    """Raise a `ValueError` unless this names a base, the nearest ones offered, or makes one."""
    if callable(base) or base in _BASES:
        return
    near = difflib.get_close_matches(str(base), _BASES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"base must be one of {', '.join(_BASES)}, or a factory dim -> module; got {base!r}{hint}")


def make_base(base: BaseLike, dim: int) -> nn.Module:
    """Build a base over `dim` coordinates, from its name or its factory."""
    check_base(base)
    return _BASES[base](dim) if isinstance(base, str) else base(dim)
