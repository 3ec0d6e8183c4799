"""Base distributions of flow guides: modules that make one at each call, from their present parameters."""

import difflib
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nf.flows.numerics import positive

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


_BASES: dict[str, Callable[[int], nn.Module]] = {"normal": NormalBase, "student_t": StudentTBase}


def check_base(name: str) -> None:
    """Raise a `ValueError` unless there is a base of this name; the nearest ones are offered."""
    if name not in _BASES:
        near = difflib.get_close_matches(str(name), _BASES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"base must be one of {', '.join(_BASES)}; got {name!r}{hint}")


def make_base(name: str, dim: int) -> nn.Module:
    """Build a named base over `dim` coordinates."""
    check_base(name)
    return _BASES[name](dim)
