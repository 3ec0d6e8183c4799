"""Named stacks of flows, each the identity at first: `make("realnvp", dim)`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from pyro_nf.flows.autoregressive import Autoregressive
from pyro_nf.flows.base import Flow, Inverse, Sequential
from pyro_nf.flows.block_autoregressive import BlockAutoregressive
from pyro_nf.flows.convolution import ConvolutionCoupling
from pyro_nf.flows.coupling import Coupling
from pyro_nf.flows.elementwise import PReLU
from pyro_nf.flows.householder import Householder
from pyro_nf.flows.linear import Diagonal, LULinear, Rotation, random_orthogonal
from pyro_nf.flows.linear_iaf import LinearIAF
from pyro_nf.flows.normalization import ActNorm
from pyro_nf.flows.planar import Planar
from pyro_nf.flows.radial import Radial
from pyro_nf.flows.sylvester import Sylvester
from pyro_nf.flows.transformers import (
    Additive,
    Affine,
    DeepSigmoidal,
    Gated,
    LogisticMixture,
    RationalQuadraticSpline,
    Transformer,
)
from pyro_nf.interface.arguments import Count, Size, checked, did_you_mean


@checked
def make(name: str, dim: Size, **options: Any) -> Flow:
    """Build a named stack over `dim` coordinates.

    Args:
        name: One of `names()`.
        dim: Number of coordinates.
        **options: `depth`, `context_dim`, `hidden_dims` where the flow has networks, and what else the function of
            this name in `pyro_nf.flows.stacks` takes.

    Returns:
        A flow that is the identity at first.

    Raises:
        ValueError: If there is no such name; the nearest ones are offered.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.stacks import make
        >>> make("realnvp", 5, depth=2)(torch.zeros(5)).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if name not in _STACKS:
        hint = did_you_mean(name, _STACKS, most=3)
        raise ValueError(f"flow must be one of {', '.join(names())}; got {name!r}{hint}")
    return _STACKS[name](dim, **options)


def names() -> list[str]:
    """Return the names that `make` knows."""
    return sorted(_STACKS)


@checked
def planar(dim: Size, depth: Size = 16, context_dim: Count = 0) -> Sequential:
    """Planar flows (Rezende & Mohamed 2015)."""
    return Sequential(*(Planar(dim, context_dim) for _ in range(depth)))


@checked
def radial(dim: Size, depth: Size = 16, context_dim: Count = 0) -> Sequential:
    """Radial flows (Rezende & Mohamed 2015)."""
    return Sequential(*(Radial(dim, context_dim) for _ in range(depth)))


@checked
def sylvester_orthogonal(
    dim: Size, depth: Size = 4, num_units: Size | None = None, context_dim: Count = 0
) -> Sequential:
    """Sylvester flows with a free orthonormal basis (van den Berg et al. 2018)."""
    return Sequential(*(Sylvester(dim, num_units, "orthogonal", context_dim) for _ in range(depth)))


@checked
def sylvester_householder(
    dim: Size, depth: Size = 4, num_units: Size | None = None, context_dim: Count = 0
) -> Sequential:
    """Sylvester flows with a basis of reflections (van den Berg et al. 2018)."""
    return Sequential(*(Sylvester(dim, num_units, "householder", context_dim) for _ in range(depth)))


@checked
def sylvester_triangular(dim: Size, depth: Size = 4, context_dim: Count = 0) -> Sequential:
    """Sylvester flows along the coordinates, in alternating order (van den Berg et al. 2018)."""
    return Sequential(
        *(Sylvester(dim, None, "triangular", context_dim, reverse=layer % 2 == 1) for layer in range(depth))
    )


@checked
def householder(dim: Size, depth: Size = 5, context_dim: Count = 0) -> Sequential:
    """Pairs of Householder reflections (Tomczak & Welling 2016): volume preserving."""
    return Sequential(*(Householder(dim, 2, context_dim) for _ in range(depth)))


@checked
def linear_iaf(dim: Size, depth: Size = 1, num_matrices: Size = 1, context_dim: Count = 0) -> Sequential:
    """Linear IAF, or with `num_matrices` > 1 convex combination linear IAF (Tomczak & Welling 2017)."""
    return Sequential(*(LinearIAF(dim, num_matrices, context_dim) for _ in range(depth)))


@checked
def nice(dim: Size, depth: Size = 8, hidden_dims: Sequence[Size] = (32, 32), context_dim: Count = 0) -> Sequential:
    """Additive couplings with alternating masks, and a diagonal at the end (Dinh et al. 2014)."""
    couplings = _couplings(dim, depth, Additive(), hidden_dims, context_dim)
    return Sequential(*couplings, Diagonal(dim, context_dim))


@checked
def nice_perm(dim: Size, depth: Size = 8, hidden_dims: Sequence[Size] = (32, 32), context_dim: Count = 0) -> Sequential:
    """Additive couplings, each in a random order of its own (Rezende & Mohamed 2015): volume preserving.

    There a permutation stands before every coupling; here it is undone after it, so that the flow starts as the
    identity: which is a coupling with a random mask. The two differ by one permutation at the end of the stack.
    """
    generator = torch.Generator().manual_seed(0)
    masks = [_random_half(dim, generator) for _ in range(depth)]
    return Sequential(*(Coupling(dim, mask.tolist(), Additive(), hidden_dims, context_dim) for mask in masks))


@checked
def nice_ortho(
    dim: Size, depth: Size = 8, hidden_dims: Sequence[Size] = (32, 32), context_dim: Count = 0
) -> Sequential:
    """Additive couplings, each in a random orthonormal basis of its own (Rezende & Mohamed 2015): volume preserving.

    As in `nice_perm`, the basis is undone after the coupling.
    """
    generator = torch.Generator().manual_seed(0)
    flows: list[Flow] = []
    for _ in range(depth):
        turn = Rotation(dim, start=random_orthogonal(dim, generator), trainable=False)
        flows += [turn, Coupling(dim, None, Additive(), hidden_dims, context_dim), Inverse(turn)]
    return Sequential(*flows)


@checked
def realnvp(dim: Size, depth: Size = 8, hidden_dims: Sequence[Size] = (32, 32), context_dim: Count = 0) -> Sequential:
    """Affine couplings with alternating masks (Dinh et al. 2016)."""
    return Sequential(*_couplings(dim, depth, Affine(), hidden_dims, context_dim))


@checked
def glow(dim: Size, depth: Size = 8, hidden_dims: Sequence[Size] = (32, 32), context_dim: Count = 0) -> Sequential:
    """Affine couplings, each before a linear map and an actnorm (Kingma & Dhariwal 2018), for vectors."""
    steps = [
        (coupling, LULinear(dim), ActNorm(dim))
        for coupling in _couplings(dim, depth, Affine(), hidden_dims, context_dim)
    ]
    return Sequential(*(flow for step in steps for flow in step))


@checked
def spline_coupling(
    dim: Size, depth: Size = 4, hidden_dims: Sequence[Size] = (32, 32), num_bins: Size = 8, context_dim: Count = 0
) -> Sequential:
    """Rational-quadratic spline couplings with alternating masks (Durkan et al. 2019)."""
    return Sequential(*_couplings(dim, depth, RationalQuadraticSpline(num_bins), hidden_dims, context_dim))


@checked
def flowpp(
    dim: Size, depth: Size = 4, hidden_dims: Sequence[Size] = (32, 32), num_components: Size = 8, context_dim: Count = 0
) -> Sequential:
    """Mixture of logistics couplings with alternating masks (Ho et al. 2019)."""
    return Sequential(*_couplings(dim, depth, LogisticMixture(num_components), hidden_dims, context_dim))


@checked
def convolution(
    dim: Size,
    depth: Size = 8,
    hidden_dims: Sequence[Size] = (32, 32),
    kind: Literal["circular", "symmetric"] = "circular",
    context_dim: Count = 0,
) -> Sequential:
    """Couplings by data-dependent convolutions, with alternating masks (Karami et al. 2019)."""
    masks = _alternating_masks(dim, depth)
    return Sequential(*(ConvolutionCoupling(dim, mask, kind, hidden_dims, context_dim) for mask in masks))


@checked
def prelu(dim: Size, depth: Size = 8, context_dim: Count = 0) -> Sequential:
    """Linear maps by LU factors, each before a PReLU (He et al. 2015): piecewise linear, without a network."""
    return Sequential(
        *(flow for _ in range(depth) for flow in (LULinear(dim, None, context_dim), PReLU(dim, context_dim)))
    )


@checked
def iaf(dim: Size, depth: Size = 4, hidden_dims: Sequence[Size] | None = None, context_dim: Count = 0) -> Sequential:
    """Gated inverse autoregressive flows in alternating order (Kingma et al. 2016): one pass to sample."""
    return _autoregressive(dim, depth, Gated(), hidden_dims, context_dim)


@checked
def maf(dim: Size, depth: Size = 4, hidden_dims: Sequence[Size] | None = None, context_dim: Count = 0) -> Inverse:
    """Affine masked autoregressive flows in alternating order (Papamakarios et al. 2017): one pass to score."""
    return Inverse(_autoregressive(dim, depth, Affine(), hidden_dims, context_dim))


@checked
def spline_autoregressive(
    dim: Size, depth: Size = 2, hidden_dims: Sequence[Size] | None = None, num_bins: Size = 8, context_dim: Count = 0
) -> Sequential:
    """Autoregressive rational-quadratic splines in alternating order (Durkan et al. 2019): one pass to sample."""
    return _autoregressive(dim, depth, RationalQuadraticSpline(num_bins), hidden_dims, context_dim)


@checked
def naf(
    dim: Size, depth: Size = 2, hidden_dims: Sequence[Size] | None = None, num_units: Size = 8, context_dim: Count = 0
) -> Sequential:
    """Autoregressive deep sigmoidal flows in alternating order (Huang et al. 2018): one pass to sample."""
    return _autoregressive(dim, depth, DeepSigmoidal(num_units), hidden_dims, context_dim)


@checked
def bnaf(dim: Size, depth: Size = 2, units: Size = 8, context_dim: Count = 0) -> Sequential:
    """Block neural autoregressive flows in alternating order (De Cao et al. 2019): one pass to sample."""
    return Sequential(
        *(BlockAutoregressive(dim, units, reverse=layer % 2 == 1, context_dim=context_dim) for layer in range(depth))
    )


def _random_half(dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(dim, generator=generator).argsort() < (dim + 1) // 2


def _alternating_masks(dim: int, depth: int) -> list[list[bool]]:
    """Masks in pairs: a random half is transformed by the first coupling, the other half by the second."""
    generator = torch.Generator().manual_seed(0)  # the same masks for every user, and no draw from the global state
    halves = [_random_half(dim, generator) for _ in range(0, depth, 2)]
    masks = [mask for half in halves for mask in (half, half if dim == 1 else ~half)]
    return [mask.tolist() for mask in masks[:depth]]


def _couplings(
    dim: int, depth: int, transformer: Transformer, hidden_dims: Sequence[int], context_dim: int
) -> list[Coupling]:
    masks = _alternating_masks(dim, depth)
    return [Coupling(dim, mask, transformer, hidden_dims, context_dim) for mask in masks]


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
    function.__name__: function
    for function in (
        planar,
        radial,
        sylvester_orthogonal,
        sylvester_householder,
        sylvester_triangular,
        householder,
        linear_iaf,
        nice,
        nice_perm,
        nice_ortho,
        realnvp,
        glow,
        spline_coupling,
        flowpp,
        convolution,
        prelu,
        iaf,
        maf,
        spline_autoregressive,
        naf,
        bnaf,
    )
}
