"""What `check_flow` looks at, and how errors are measured.

Everything is computed in float64, and the error of a point or a log-determinant counts
relative to 1 + its size. The limit, `TOLERANCE`, lies 8 digits above float64's rounding unit, so that a right formula
passes by far. Yet a map with wild parameters can be so steep that exact formulas lose these digits as well: no inverse
can be better than the rounding of its input allows. A numerically stable computation returns the exact result of
slightly perturbed data. So the suite evaluates the map again with its parameters perturbed by `ROUNDING`, relatively,
and its input relative to 1 + its size, and forgives errors up to four times the change that this makes (of the few
perturbations tried, none is the worst). At ordinary parameters that is nothing. Where it moves a point that should come
back by more than the tolerance, the point is lost, and its log-determinant is not compared with that of the way there.
"""

import copy
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn

from pyro_nf.flows import Flow

TOLERANCE = 1e-8
# 64 rounding units of float64: the errors of some dozens of operations.
ROUNDING = 64 * torch.finfo(torch.float64).eps
# Of the sum over a grid that stands for the integral, at moderate parameters: a grid errs by half a cell at a jump.
INTEGRAL_TOLERANCE = 5e-3
# Parameters as they came, or normal of this standard deviation.
INITIAL, MODERATE, RANDOM, WILD = 0.0, 0.1, 1.0, 5.0


class BreachError(Exception):
    """A finding without a figure."""


class Maps(nn.Module):
    """Both directions of a flow or transform as one callable module."""

    def __init__(self, flow: TransformModule) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, point: Tensor, context: Tensor | None = None, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return the mapped point and the log-determinant."""
        if isinstance(self.flow, Flow):
            return (self.flow.inverse_and_log_det if inverse else self.flow.forward_and_log_det)(point, context)
        if inverse:
            x = self.flow.inv(point)
            return x, -self.flow.log_abs_det_jacobian(x, point)
        y = self.flow(point)
        return y, self.flow.log_abs_det_jacobian(point, y)


@dataclass(frozen=True)
class Case:
    """A flow at some parameters, with points `(n, *event_shape)` and contexts `(n, context_dim)` to try it on."""

    name: str
    wild: bool
    pristine: Maps
    neighbours: tuple[Maps, ...]
    points: Tensor
    context: Tensor | None
    event_dim: int

    @staticmethod
    def make(flow: TransformModule, event_shape: tuple[int, ...], scale: float, seed: int, reach: float) -> "Case":
        """Copy a flow, set its parameters to this scale, and draw points for it."""
        torch.manual_seed(seed)
        maps = Maps(copy.deepcopy(flow)).double()
        parameters = list(maps.parameters())
        base = torch.randn(6, *event_shape, dtype=torch.float64)
        far = [multiple * base[:3] for multiple in (10, 100, 1000) if multiple <= reach]
        points = [base, *far, torch.zeros_like(base[:1])]
        with torch.no_grad():
            for p in parameters:
                if scale != INITIAL:
                    p.copy_(scale * torch.randn(p.shape, dtype=torch.float64))
                if p.shape == torch.Size(event_shape):
                    points.append(p[None].cpu())
            neighbours = tuple(copy.deepcopy(maps) for _ in range(3))
            for p in (p for neighbour in neighbours for p in neighbour.parameters()):
                p.mul_(1 + ROUNDING * torch.randn_like(p))
        device = parameters[0].device if parameters else None
        all_points = torch.cat(points).to(device)
        width = getattr(flow, "context_dim", 0)
        context = torch.randn(len(all_points), width, dtype=torch.float64).to(device) if width else None
        name = "as they came" if scale == INITIAL else f"~ N(0, {scale:g}^2)"
        return Case(name, scale == WILD, maps, neighbours, all_points, context, len(event_shape))

    def maps(self) -> Maps:
        """Return the flow, in a copy of its own for each check."""
        return copy.deepcopy(self.pristine)

    def rounding(self, function: Callable[[Maps, Tensor], Tensor], point: Tensor) -> Tensor:
        """Return what to forgive `function(maps, point)` because of `ROUNDING` of point and parameters, `(n,)`."""
        result = function(self.maps(), point)
        errors = ROUNDING * (1 + point.abs())
        near = (function(maps, point + errors * torch.randn_like(point)) for maps in self.neighbours)
        return 4 * torch.stack([size_of(other - result) for other in near]).amax(0)

    def rounding_back(self, function: Callable[[Maps, Tensor], Tensor], y: Tensor) -> Tensor:
        """Return `rounding` of a function of the inverse of y, infinite where the inverse itself is lost."""
        back = self.rounding(lambda maps, y: maps(y, self.context, inverse=True)[0], y)
        return torch.where(back > TOLERANCE * (1 + size_of(self.points)), math.inf, self.rounding(function, y))

    def log_base(self, x: Tensor) -> Tensor:
        """Return the log density of a standard normal base."""
        return -0.5 * (x**2 + math.log(2 * math.pi)).flatten(x.dim() - self.event_dim).sum(-1)

    def score(self, maps: Maps, y: Tensor) -> Tensor:
        """Return the log density of `y`, over a standard normal base."""
        x, log_det = maps(y, self.context, inverse=True)
        score: Tensor = self.log_base(x) + log_det
        return score


@dataclass(frozen=True)
class Check:
    """One thing that must hold: `measure` returns an error, at most `limit`, or raises; `fault` says what is wrong."""

    name: str
    fault: str
    measure: Callable[[Case], float | None]
    scales: tuple[float, ...] = (RANDOM,)
    limit: float = TOLERANCE

    def run(self, case: Case) -> tuple[float | None, str | None]:
        """Return the error if there is one, and what to say if it is too large."""
        try:
            error = self.measure(case)
        except BreachError as breach:
            return math.nan, str(breach)
        except Exception as exception:  # whatever a flow under test raises is a finding
            return math.nan, textwrap.shorten(f"raises {type(exception).__name__}: {exception}", 160)
        if error is None or error <= self.limit:
            return error, None
        return error, "is not finite" if math.isnan(error) else f"{self.fault}: {error:.1e}, allowed {self.limit:.0e}"


def size_of(tensor: Tensor) -> Tensor:
    """The largest entry of each point or, of log-determinants, each entry: `(n,)`."""
    return tensor.detach().abs() if tensor.dim() < 2 else tensor.detach().flatten(1).abs().amax(1)


def error_of(got: Tensor, wanted: Tensor, rounding: Tensor | float = 0.0) -> float:
    """The largest |got - wanted| relative to 1 + |wanted|, less where rounding explains it; NaN if not finite."""
    if got.shape != wanted.shape:
        raise BreachError(f"must have shape {tuple(wanted.shape)}; got {tuple(got.shape)}")
    # The ratio form of |got - wanted| <= TOLERANCE (1 + |wanted|) + rounding, which may be infinite.
    error = size_of(got - wanted) / (1 + size_of(wanted) + rounding / TOLERANCE)
    return largest(error.tolist())


def largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN if there is one."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
