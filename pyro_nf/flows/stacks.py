"""Named stacks of flows, each the identity at first: `make("realnvp", dim)`."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_nf.flows.autoregressive import Autoregressive
from pyro_nf.flows.base import Flow, Inverse, Sequential
from pyro_nf.flows.coupling import Coupling
from pyro_nf.flows.planar import Planar
from pyro_nf.flows.radial import Radial
from pyro_nf.flows.transformers import Additive, Affine, Gated, Transformer


def make(name: str, dim: int, **options: Any) -> Flow:
    """Build a named stack over `dim` coordinates.

    Args:
        name: One of `names()`.
        dim: Number of coordinates.
        **options: `depth`, `context_dim`, and `hidden_dims` where the flow has networks.

    Returns:
        A flow that is the identity at first.

    Raises:
        ValueError: If there is no such name; the nearest ones are offered.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.stacks import make
        >>> make("realnvp", 5, depth=2)(torch.zeros(5))
        tensor([0., 0., 0., 0., 0.], grad_fn=<IndexBackward0>)
    """
    if name not in _STACKS:
        near = difflib.get_close_matches(str(name), _STACKS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"flow must be one of {', '.join(names())}; got {name!r}{hint}")
    return _STACKS[name](dim, **options)


def names() -> list[str]:
    """Return the names that `make` knows."""
    return sorted(_STACKS)


def planar(dim: int, depth: int = 16, context_dim: int = 0) -> Sequential:
    """Planar flows (Rezende & Mohamed 2015)."""
    return Sequential(*(Planar(dim, context_dim) for _ in range(depth)))


def radial(dim: int, depth: int = 16, context_dim: int = 0) -> Sequential:
    """Radial flows (Rezende & Mohamed 2015)."""
    return Sequential(*(Radial(dim, context_dim) for _ in range(depth)))


def nice(dim: int, depth: int = 8, hidden_dims: Sequence[int] = (32, 32), context_dim: int = 0) -> Sequential:
    """Additive couplings with alternating masks (Dinh et al. 2014)."""
    return _couplings(dim, depth, Additive(), hidden_dims, context_dim)


def realnvp(dim: int, depth: int = 8, hidden_dims: Sequence[int] = (32, 32), context_dim: int = 0) -> Sequential:
    """Affine couplings with alternating masks (Dinh et al. 2016)."""
    return _couplings(dim, depth, Affine(), hidden_dims, context_dim)


def iaf(dim: int, depth: int = 4, hidden_dims: Sequence[int] | None = None, context_dim: int = 0) -> Sequential:
    """Gated inverse autoregressive flows in alternating order (Kingma et al. 2016): one pass to sample."""
    return _autoregressive(dim, depth, Gated(), hidden_dims, context_dim)


def maf(dim: int, depth: int = 4, hidden_dims: Sequence[int] | None = None, context_dim: int = 0) -> Inverse:
    """Affine masked autoregressive flows in alternating order (Papamakarios et al. 2017): one pass to score."""
    return Inverse(_autoregressive(dim, depth, Affine(), hidden_dims, context_dim))


def _couplings(
    dim: int, depth: int, transformer: Transformer, hidden_dims: Sequence[int], context_dim: int
) -> Sequential:
    """Couplings in pairs: a random half is transformed by the first, the other half by the second."""
    generator = torch.Generator().manual_seed(0)  # the same masks for every user, and no draw from the global state
    flows = []
    for layer in range(depth):
        if layer % 2 == 0:
            half = torch.randperm(dim, generator=generator).argsort() < (dim + 1) // 2
        mask = half if layer % 2 == 0 or dim == 1 else ~half
        flows.append(Coupling(dim, mask.tolist(), transformer, hidden_dims, context_dim))
    return Sequential(*flows)


def _autoregressive(
    dim: int, depth: int, transformer: Transformer, hidden_dims: Sequence[int] | None, context_dim: int
) -> Sequential:
    return Sequential(
        *(
            Autoregressive(dim, transformer, hidden_dims, reverse=layer % 2 == 1, context_dim=context_dim)
            for layer in range(depth)
        )
    )


_STACKS: dict[str, Callable[..., Flow]] = {
    function.__name__: function for function in (planar, radial, nice, realnvp, iaf, maf)
}
