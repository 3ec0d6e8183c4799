"""Maps from the real line to the supports of a model's sites."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import CholeskyTransform
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    Transform,
    identity_transform,
)

from pyro_nf.programs.rewrites import may_hold

# Densities of angles, which torch declares on the whole real line, where they repeat for ever and have no integral.
_PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
_exp, _sigmoid = ExpTransform(), SigmoidTransform()
_WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


class Entries(Transform):
    r"""Write a vector into the lower triangle of a matrix, row by row, the diagonal through a map of its own.

    The density of a matrix counts the entries of its lower triangle, so the log-determinant is the diagonal map's.
    torch's maps to triangular matrices take a full matrix, of which they ignore one half: no bijections.

    Args:
        codomain: The matrices: what there is above the diagonal, and on it.
        diagonal: Maps real numbers to the diagonal; `None` for ones there.
        mirror: Whether the matrix is symmetric, rather than zero above the diagonal.

    Shapes:
        `(*batch, dim (dim + 1) / 2)` to `(*batch, dim, dim)`; with ones on the diagonal from `dim (dim - 1) / 2`.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(
        self, codomain: constraints.Constraint, diagonal: Transform | None = identity_transform, mirror: bool = False
    ) -> None:
        super().__init__()
        self.codomain = codomain
        self.diagonal, self.mirror = diagonal, mirror
        self._offset = -1 if diagonal is None else 0

    def _dim(self, size: int) -> int:
        # size = dim (dim + 1) / 2, or that of dim - 1.
        return round((math.sqrt(8 * size + 1) - 1) / 2) - self._offset

    def _indices(self, dim: int, device: torch.device) -> Tensor:
        return torch.tril_indices(dim, dim, self._offset, device=device)

    def _call(self, x: Tensor) -> Tensor:
        dim = self._dim(x.shape[-1])
        rows, columns = self._indices(dim, x.device)
        positions = torch.zeros(dim, dim, dtype=torch.long, device=x.device)
        positions[rows, columns] = torch.arange(len(rows), device=x.device)
        # Gathered, not written in place: vmap batches it.
        filled = (
            x[..., positions.flatten()].unflatten(-1, (dim, dim)) if len(rows) else x.new_zeros(*x.shape[:-1], dim, dim)
        )
        below = filled.tril(-1)
        if self.diagonal is None:
            on = torch.ones_like(filled[..., 0])
        else:
            on = self.diagonal(filled.diagonal(dim1=-2, dim2=-1))
        return below + on.diag_embed() + (below.mT if self.mirror else 0.0)

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = self._indices(y.shape[-1], y.device)
        if self.diagonal is not None:
            y = y.tril(-1) + self.diagonal.inv(y.diagonal(dim1=-2, dim2=-1)).diag_embed()
        return y[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the diagonal map's log-determinant, `(*batch,)`."""
        if self.diagonal is None:
            return x.new_zeros(x.shape[:-1])
        on = y.diagonal(dim1=-2, dim2=-1)
        log_det: Tensor = self.diagonal.log_abs_det_jacobian(self.diagonal.inv(on), on).sum(-1)
        return log_det

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the matrix's shape."""
        dim = self._dim(shape[-1])
        return torch.Size((*shape[:-1], dim, dim))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Return the vector's shape."""
        dim = shape[-1] + self._offset
        return torch.Size((*shape[:-2], dim * (dim + 1) // 2))


class Interval(Transform):
    r"""Map real numbers to an interval, entry by entry: where its upper bound is finite by a sigmoid, else by exp.

    torch's map has no values where the bound is infinite, and which it is cannot be asked where `vmap` batches bounds.

    Args:
        codomain: The interval.
    """

    bijective = True
    domain = constraints.real
    sign = +1

    def __init__(self, codomain: Any) -> None:
        super().__init__()
        self.codomain = codomain
        self._lower, upper = codomain.lower_bound, torch.as_tensor(codomain.upper_bound)
        self._infinite = upper.isinf()
        # Any number in the place of infinity: the entries that are not used have a gradient, too.
        self._width = torch.where(self._infinite, 1.0, upper - self._lower)

    def _call(self, x: Tensor) -> Tensor:
        unit = torch.where(self._infinite, _exp(x), _sigmoid(x))
        value: Tensor = self._lower + self._width * unit
        return value

    def _inverse(self, y: Tensor) -> Tensor:
        unit = (y - self._lower) / self._width
        return torch.where(self._infinite, _exp.inv(unit), _sigmoid.inv(torch.where(self._infinite, 0.5, unit)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log-slopes, of the shape of `x`."""
        log_slope: Tensor = self._width.log() + torch.where(self._infinite, x, _sigmoid.log_abs_det_jacobian(x, y))
        return log_slope


def bijection(site: dict[str, Any]) -> Transform:
    """Return the bijection from real coordinates to the support of a site of a trace.

    That is `biject_to(support)`, except where torch has none (matrices, mixtures, half-infinite intervals), and for
    angles (`VonMises` and its kin), which are taken from the interval (-pi, pi). The site keeps it for the next time:
    to look at its bounds would stop the recording of a step.

    Raises:
        ValueError: If there is none, naming the site.
    """
    try:
        if "bijection" not in site:
            site["bijection"] = _bijection(_support(site["fn"]))
    except NotImplementedError:
        try:
            support = repr(site["fn"].support)
            what = f"has support {support}, which the real line has no bijection to"
        except NotImplementedError:  # as of a GaussianScaleMixture
            support = ""
            what = "has a distribution that declares no support"
        if "sphere" in support.lower():
            remedy = (
                f"with ProjectedNormal, use pyro.poutine.reparam(model, {{{site['name']!r}: ProjectedNormalReparam()}})"
            )
        else:
            remedy = "sample what it is made of, or register a bijection with torch.distributions.biject_to"
        raise ValueError(f"site {site['name']!r} {what}: {remedy}") from None
    transform: Transform = site["bijection"]
    return transform


def _support(fn: Any) -> Any:
    base = fn
    while isinstance(base, _WRAPPERS):
        base = base.base_dist
    if isinstance(base, _PERIODIC):
        return constraints.independent(constraints.interval(-math.pi, math.pi), fn.event_dim)
    return fn.support


def _bijection(support: Any) -> Any:
    if isinstance(support, constraints.independent):
        base = _bijection(support.base_constraint)
        return dist.transforms.IndependentTransform(base, support.reinterpreted_batch_ndims)
    if hasattr(support, "base_constraint"):  # of a mixture
        return _bijection(support.base_constraint)
    if isinstance(support, constraints.interval):
        infinite = torch.as_tensor(support.upper_bound).isinf()
        if may_hold(infinite) and may_hold(~infinite):
            return Interval(support)
        if may_hold(infinite):
            return biject_to(constraints.greater_than(support.lower_bound))
    if support is dist.constraints.lower_cholesky:
        return Entries(support, ExpTransform())
    if support is dist.constraints.softplus_lower_cholesky:
        return Entries(support, SoftplusTransform())
    if support is dist.constraints.unit_lower_cholesky:
        return Entries(support, None)
    if support is dist.constraints.lower_triangular:
        return Entries(support)
    if support is dist.constraints.square:
        return dist.transforms.IndependentTransform(identity_transform, 2)
    if support is dist.constraints.symmetric:
        return Entries(support, mirror=True)
    if support in (dist.constraints.positive_definite, dist.constraints.positive_semidefinite):
        factor = Entries(dist.constraints.lower_cholesky, ExpTransform())
        return ComposeTransform([factor, CholeskyTransform().inv])
    return biject_to(support)
