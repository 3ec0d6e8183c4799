"""Targets in one and two dimensions whose exact density a grid gives: four energies, and the frequency of a sine."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nf.interface.arguments import Size, checked

# The energies' square is [-HALF_WIDTH, HALF_WIDTH]^2.
HALF_WIDTH = 4.0
# The sine's frequency is below this.
MAX_FREQUENCY = 2.0
# Variance of the sine's observations.
_NOISE_VARIANCE = 0.125


class Grid(NamedTuple):
    """A target's exact density, by quadrature at the middles of the cells of a square or an interval.

    Attributes:
        points: The middles, `(*shape, dim)`.
        density: The normalised density there, `(*shape,)`.
        log_evidence: Logarithm of the integral of the unnormalised density, in nats.
        cell: Area (in one dimension, length) of a cell.
    """

    points: Tensor
    density: Tensor
    log_evidence: float
    cell: float


def u1(z: Tensor) -> Tensor:
    """Return a ring's energy, with two ends cut out of it: two crescents. `z: (*batch, 2)` -> `(*batch,)`."""
    ring = 0.5 * ((z.norm(dim=-1) - 2.0) / 0.4) ** 2
    result: Tensor = ring - torch.logaddexp(_well(z[..., 0] - 2.0, 0.6), _well(z[..., 0] + 2.0, 0.6))
    return result


def u2(z: Tensor) -> Tensor:
    """Return the energy of a ridge along a sine, `(*batch,)`."""
    return -_well(_from_sine(z), 0.4)


def u3(z: Tensor) -> Tensor:
    """Return the energy of that ridge with a second one, which leaves it and comes back, `(*batch,)`."""
    w2 = 3.0 * torch.exp(_well(z[..., 0] - 1.0, 0.6))
    return -torch.logaddexp(_well(_from_sine(z), 0.35), _well(_from_sine(z) + w2, 0.35))


def u4(z: Tensor) -> Tensor:
    """Return the energy of that ridge with a second one, which branches off, `(*batch,)`."""
    w3 = 3.0 * torch.sigmoid((z[..., 0] - 1.0) / 0.3)
    return -torch.logaddexp(_well(_from_sine(z), 0.4), _well(_from_sine(z) + w3, 0.35))


# By their names in the paper.
ENERGIES = MappingProxyType({"U1": u1, "U2": u2, "U3": u3, "U4": u4})


@checked
def box(dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return the upper right corner of the square, `(2,)`: the argument of `energy`."""
    return torch.full((2,), HALF_WIDTH, dtype=dtype, device=device)


def energy(potential: Callable[[Tensor], Tensor], corner: Tensor) -> None:
    r"""Pyro model with the density `exp(-U(z)) / Z` on a square; `partial(energy, u1)` is the model of `corner` alone.

    U2, U3 and U4 do not grow in z_1, so that only on a bounded set there is a Z. z has the support of the square, which
    a guide keeps to through its bijection from R^2: its density is exactly zero outside, and no penalty is needed.
    The model's evidence is Z.

    Args:
        potential: U, `(*batch, 2)` -> `(*batch,)`.
        corner: The square's upper right corner, `(2,)`; the lower left one is its opposite.

    References:
        Rezende, Mohamed (2015), "Variational inference with normalizing flows", arXiv:1505.05770, table 1.

    Example:
        >>> from functools import partial
        >>> from pyro_nf.guides import AutoFlow
        >>> from pyro_nf.models.benchmarks import energies
        >>> guide = AutoFlow(partial(energies.energy, energies.u1))
        >>> guide.sample_posterior(5, energies.box())["z"].shape
        torch.Size([5, 2])
    """
    z = pyro.sample("z", dist.Uniform(-corner, corner).to_event(1))
    # The prior's density is 1 / area.
    pyro.factor("energy", (2.0 * corner).log().sum() - potential(z))


@checked
def energy_grid(potential: Callable[[Tensor], Tensor], num_points: Size = 1000, corner: Tensor | None = None) -> Grid:
    """Return the exact density on `num_points` x `num_points` points; `points[i, j]` is at the i-th z_1, j-th z_2.

    At 1,000 points the log evidence is that of 4,000 within 1e-6 nats.

    Args:
        potential: U.
        num_points: Points along a side.
        corner: The square's upper right corner, `(2,)`; `None` for `box(torch.float64)`.
    """
    corner = box(torch.float64) if corner is None else corner
    sides = [_middles(-float(end), float(end), num_points).to(corner) for end in corner]
    points = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
    cell = math.prod(2.0 * float(end) / num_points for end in corner)
    try:
        values = potential(points)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"potential must be a function of points (*batch, 2); it fails with {error}") from error
    if not isinstance(values, Tensor) or values.shape != points.shape[:-1]:
        raise ValueError(f"potential must return a number for each point; got {values!r}")
    return _grid(points, -values, cell)


@checked
def sine_data(dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return the times 0, 5/6 and 10/6 and the observations there, all zero: the arguments of `sine`."""
    t = torch.tensor([0.0, 5.0 / 6.0, 10.0 / 6.0], dtype=dtype, device=device)
    return t, torch.zeros_like(t)


def sine(t: Tensor, y: Tensor) -> Tensor:
    r"""Pyro model of a sine of unknown frequency, `y_i ~ N(sin(2 pi f t_i), 0.125)` (a variance), `f ~ U(0, 2)`.

    On `sine_data` the posterior has modes near 0.6, 1.2 and 1.8, and half a one at 0, where the sine is zero too.

    Args:
        t: Times, `(n,)`.
        y: Observations, `(n,)`.

    References:
        Huang, Krueger, Lacoste, Courville (2018), "Neural autoregressive flows", arXiv:1804.00779, section 6.1.
    """
    zero = torch.zeros((), dtype=t.dtype, device=t.device)
    f = pyro.sample("f", dist.Uniform(zero, zero + MAX_FREQUENCY))
    likelihood = dist.Normal(torch.sin(2.0 * math.pi * f * t), _NOISE_VARIANCE**0.5)
    with pyro.plate("time", len(t)):
        result: Tensor = pyro.sample("y", likelihood, obs=y)
    return result


@checked
def sine_grid(t: Tensor, y: Tensor, num_points: Size = 10_000) -> Grid:
    """Return the exact posterior of the sine's frequency on `num_points` points of (0, 2).

    Args:
        t: Times, `(n,)`.
        y: Observations, `(n,)`.
        num_points: Number of points.
    """
    f = _middles(0.0, MAX_FREQUENCY, num_points).to(t.device)
    mean = torch.sin(2.0 * math.pi * f[:, None] * t.double())
    log_prob = dist.Normal(mean, _NOISE_VARIANCE**0.5).log_prob(y.double()).sum(-1) - math.log(MAX_FREQUENCY)
    return _grid(f[:, None], log_prob, MAX_FREQUENCY / num_points)


def _well(distance: Tensor, scale: float) -> Tensor:
    """A normal's log density, less its constant."""
    return -0.5 * (distance / scale) ** 2


def _from_sine(z: Tensor) -> Tensor:
    return z[..., 1] - torch.sin(0.5 * math.pi * z[..., 0])


def _middles(start: float, end: float, num: int) -> Tensor:
    edges = torch.linspace(start, end, num + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


def _grid(points: Tensor, log_density: Tensor, cell: float) -> Grid:
    log_evidence = float(log_density.flatten().logsumexp(0)) + math.log(cell)
    return Grid(points, (log_density - log_evidence).exp(), log_evidence, cell)
