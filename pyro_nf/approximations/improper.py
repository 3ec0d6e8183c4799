"""Directions along which a posterior is improper: its log density has no curvature there, however far one goes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_nf.programs.coordinates import LogDensity

Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]

# Singular values of the gradients' scatter, and changes of the slope, that are rounding: multiples of the unit.
_ROUNDING = 1e3
# How far along a direction its slope is looked at: beyond any scale that a prior states on purpose.
_DISTANCES = (-1e6, -1e3, -1.0, 1.0, 1e3, 1e6)
# A coordinate is named where a direction has this part of its length in it; so many are named.
_MAIN, _MOST_NAMES = 0.1, 5


class FlatDirections(NamedTuple):
    """Where a log density is a straight line for ever, so that it has no integral.

    Attributes:
        basis: Orthonormal directions v in the coordinates, `(num_directions, dim)`.
        slopes: The log density's slope along each, `(num_directions,)`: 0 where it does not depend on it at all.
        loc: Location of the `reference` along each, `(num_directions,)`.
        scale: Its standard deviation.
    """

    basis: Tensor
    slopes: Tensor
    loc: Tensor
    scale: Tensor

    def __bool__(self) -> bool:
        return len(self.basis) > 0

    def reference(self, points: Tensor) -> Tensor:
        """Return what makes a proper density of it, `(*batch,)` for `(*batch, dim)`.

        That is a normal along each direction in place of the slope: `log N(v'x; loc, scale) - slope v'x`. Along the
        other directions the density stays what it is, so that these can be fitted and checked.
        """
        along = points @ self.basis.mT
        normal = torch.distributions.Normal(self.loc, self.scale, validate_args=False)
        log_prob: Tensor = (normal.log_prob(along) - self.slopes * along).sum(-1)
        return log_prob

    def as_wide_as(self, draws: Tensor) -> "FlatDirections":
        """Return the same, with a reference as wide as draws `(num_draws, dim)` are: any width is as good."""
        along = draws @ self.basis.mT
        return self._replace(loc=along.mean(0), scale=along.std(0))

    def made_proper(self, log_density: LogDensity) -> LogDensity:
        """Return the log density with the `reference` in it."""
        return lambda point: log_density(point) + self.reference(point)

    def describe(self, names: Sequence[str]) -> str:
        """Say in words where the posterior is improper, by the names of the coordinates."""
        places = []
        for direction in self.basis:
            main = [names[i] for i in direction.abs().argsort(descending=True).tolist() if abs(direction[i]) > _MAIN]
            listed = ", ".join(main[:_MOST_NAMES]) + (
                f" and {len(main) - _MOST_NAMES} more" * (len(main) > _MOST_NAMES)
            )
            places.append(listed if len(main) == 1 else f"a combination of {listed}")
        where = "; ".join(places)
        return (
            f"The posterior is improper along {where}: neither the prior nor the data say anything there (a latent "
            "that a mask hides, or a flat prior without data); give it a proper prior, or leave it out."
        )


@torch.no_grad()
def flat_directions(gradients: Gradients, points: Tensor) -> FlatDirections:
    r"""Find the directions along which a log density is a straight line, however far one goes.

    With g the gradients at several points, `v'(g_i - mean g) = 0` for all i is necessary; such v are singular vectors
    of the differences. They are flat if, in addition, the slope `v'g` stays the same at distances of up to a million
    to both sides of the points.

    Args:
        gradients: `(num_points, dim) -> gradients and log densities`, as `Density.gradients`.
        points: More than `dim` different points, `(num_points, dim)`.
    """
    slopes, _ = gradients(points)
    usable = slopes.isfinite().all(-1)
    slopes, points = slopes[usable], points[usable]
    dim = points.shape[1]
    none = FlatDirections(points.new_zeros(0, dim), *points.new_zeros(3, 0))
    if len(points) <= dim:
        return none
    unit = _ROUNDING * torch.finfo(points.dtype).eps
    scatter = slopes - slopes.mean(0)
    # A coordinate's own unit: scales of others must not hide its curvature.
    size = slopes.abs().amax(0)
    still = scatter.abs().amax(0) <= unit * size
    scaled = scatter / torch.where(still, torch.ones_like(size), scatter.abs().amax(0))
    _, values, vectors = torch.linalg.svd(scaled, full_matrices=True)
    values = torch.cat([values, values.new_zeros(dim - len(values))])
    candidates = vectors[values <= unit * values.max().clamp(min=1.0)]
    if not len(candidates):
        return none
    # Back from each coordinate's unit, and orthonormal.
    candidates = candidates / torch.where(still, torch.ones_like(size), scatter.abs().amax(0))
    basis = torch.linalg.qr(candidates.mT).Q.mT
    kept = [v for v in basis if _is_straight(gradients, points[0], v, slopes, unit)]
    if not kept:
        return none
    found = torch.stack(kept)
    along = (slopes @ found.mT).mean(0)
    return FlatDirections(found, along, torch.zeros_like(along), torch.ones_like(along))


def _is_straight(gradients: Gradients, point: Tensor, direction: Tensor, slopes: Tensor, unit: float) -> bool:
    distances = torch.tensor(_DISTANCES, dtype=point.dtype, device=point.device)
    far, values = gradients(point + distances[:, None] * direction)
    if not bool(far.isfinite().all() and values.isfinite().all()):
        return False
    along = far @ direction
    # Rounding of the sum, of whose terms the largest counts.
    rounding = unit * torch.cat([far, slopes]).abs().mul(direction.abs()).amax()
    return bool((along - (slopes @ direction).mean()).abs().amax() <= rounding)
