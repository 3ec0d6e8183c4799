"""`check_flow`: a conformance suite for any flow, and for any torch or Pyro transform of R^n with parameters.

How errors are measured. Everything is computed in float64, and the error of a point or a log-determinant counts
relative to 1 + its size. The limit, `TOLERANCE`, lies 8 digits above float64's rounding unit, so that a right formula
passes by far. Yet a map with wild parameters can be so steep that exact formulas lose these digits as well: no inverse
can be better than the rounding of its input allows. A numerically stable computation returns the exact result of
slightly perturbed data. So the suite evaluates the map again with its input and parameters perturbed by `ROUNDING`,
relatively, and forgives an error as large as the change that this makes. At ordinary parameters that is nothing.
"""

import copy
import math
import pickle
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn

from pyro_nf.flows import Flow

TOLERANCE = 1e-8
# 64 rounding units of float64: the errors of some dozens of operations.
ROUNDING = 64 * torch.finfo(torch.float64).eps
# Of the sum over a grid that stands for the integral, at moderate parameters.
INTEGRAL_TOLERANCE = 1e-3
# Parameters as they came, or normal of this standard deviation.
INITIAL, MODERATE, RANDOM, WILD = 0.0, 0.3, 1.0, 5.0


@dataclass(frozen=True)
class FlowReport:
    """What `check_flow` measured.

    Args:
        flow: Name of the flow's class.
        figures: The largest error that each check saw; NaN where there was none to compute.
        limits: The limit of each error.
        failures: A sentence for each failure; empty if the flow keeps its contract.
    """

    flow: str
    figures: dict[str, float]
    limits: dict[str, float]
    failures: tuple[str, ...]

    def __str__(self) -> str:
        """Return a table of the figures, and the failures below it."""
        rows = [f"  {name:<20} {self.figures[name]:8.1e}  (limit {self.limits[name]:.0e})" for name in self.figures]
        return "\n".join([self.flow, *rows, *self.failures])


class FlowError(AssertionError):
    """A flow breaks its contract: the message has a sentence for each failure, `report` all figures."""

    def __init__(self, report: FlowReport) -> None:
        super().__init__("\n  ".join([f"{report.flow} breaks its contract:", *report.failures]))
        self.report = report


def check_flow(
    flow: TransformModule,
    *,
    event_shape: tuple[int, ...] | None = None,
    identity: bool = True,
    triangular: Literal["lower", "upper"] | None = None,
    factory: Callable[[], TransformModule] | None = None,
    compile: Literal["forward", "inverse"] | None = None,  # noqa: A002 - as torch calls it
    seed: int = 0,
) -> FlowReport:
    r"""Check that a flow keeps its contract, and say where it does not.

    The flow is copied, so that it stays as it is; so does the global random state. The checks run at the parameters as
    they came, at parameters `~ N(0, 1)` and `~ N(0, 5^2)`; at standard normal points, the same times 10, 100 and 1000,
    zero, and every parameter that has the shape of a point (the centre of a radial flow); in both directions:

    - log-determinants are those of autograd's Jacobian, and cancel in a round trip;
    - `f(f^{-1}(y)) = y` and `f^{-1}(f(x)) = x`; the joint score of a draw is the score of this draw;
    - gradients are finite and agree with finite differences; in 1 and 2 dimensions the density integrates to 1;
    - dtype, device and batch shape are kept, contexts broadcast, `vmap` gives the same;
    - parameters are registered and of influence; there is no cache; copies and pickles give the same; torch's and
      Pyro's `TransformedDistribution` can score any point.

    Args:
        flow: A `Flow`, or another transform module with domain and codomain R^n.
        event_shape: Shape of one point; `None` to ask the flow (`event_shape`, or Pyro's `input_dim`).
        identity: Whether the flow is the identity at the parameters as they came.
        triangular: Shape of the Jacobian, for autoregressive flows.
        factory: Makes another flow of this architecture, into which the `state_dict` has to load.
        compile: Direction that `torch.compile(fullgraph=True)` has to leave unchanged; takes a while.
        seed: Seed of points and parameters.

    Returns:
        The largest error that each check saw.

    Raises:
        FlowError: If a check fails, after all have run.
        ValueError: If the shape of a point is not known.

    Example:
        >>> from pyro_nf.flows import Planar
        >>> check_flow(Planar(3)).failures
        ()
    """
    if event_shape is None:
        width: Any = getattr(flow, "input_dim", None)
        event_shape = getattr(flow, "event_shape", None if width is None else (width,))
    if event_shape is None or len(event_shape) != flow.domain.event_dim:
        raise ValueError(
            f"event_shape of a {type(flow).__name__} must have {flow.domain.event_dim} sizes; got {event_shape}"
        )
    every = (INITIAL, RANDOM, WILD)
    checks = []
    for name, inverse in (("forward", False), ("inverse", True)):
        checks += [
            _Check(f"{name} log-det", "differs from autograd's", partial(_log_det, inverse=inverse), every),
            _Check(f"{name} round trip", "misses the start", partial(_round_trip, inverse=inverse), every),
            _Check(f"{name} precision", "", partial(_precision, inverse=inverse), every),
            _Check(f"{name} gradcheck", "", partial(_gradcheck, inverse=inverse)),
            _Check(f"{name} shapes", "differ from one point after another", partial(_shapes, inverse=inverse)),
            _Check(f"{name} cache", "differs from a fresh copy", partial(_cache, inverse=inverse)),
            _Check(
                f"{name} vmap", "differs from the batch", partial(_transformed, inverse=inverse, by=torch.func.vmap)
            ),
        ]
    checks += [
        _Check("sum of log-dets", "of both directions is not 0", _cancel, every),
        _Check("joint score", "differs from the score of the draw", _joint_score, every),
        _Check("parameters", "", _parameters),
        _Check("copies", "differ from the original", partial(_copies, factory=factory), limit=0.0),
        _Check("distributions", "of torch and Pyro score differently", _distributions),
    ]
    if math.prod(event_shape) <= 2:
        checks.append(_Check("density", "has an integral off 1", _integral, (MODERATE,), INTEGRAL_TOLERANCE))
    if identity:
        checks.append(_Check("identity", "is missed", _identity, (INITIAL,)))
    if triangular is not None:
        fault = f"is not {triangular} triangular"
        checks.append(_Check("Jacobian", fault, partial(_triangular, kind=triangular), limit=0.0))
    if compile is not None:
        compiled = partial(_transformed, inverse=compile == "inverse", by=_compiled)
        checks.append(_Check(f"{compile} compile", "differs from the plain call", compiled))

    figures: dict[str, float] = {}
    failures: dict[str, list[str]] = defaultdict(list)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        cases = {scale: _Case.make(flow, event_shape, scale, seed) for scale in (*every, MODERATE)}
        for check in checks:
            for case in map(cases.__getitem__, check.scales):
                figure, failure = check.run(case)
                if figure is not None:
                    figures[check.name] = _largest([figures.get(check.name, 0.0), figure])
                if failure is not None:
                    failures[f"{check.name} {failure}"].append(case.name)
    sentences = tuple(f"{failure} (parameters {', '.join(names)})" for failure, names in failures.items())
    limits = {check.name: check.limit for check in checks if check.name in figures}
    report = FlowReport(type(flow).__name__, figures, limits, sentences)
    if failures:
        raise FlowError(report)
    return report


class _BreachError(Exception):
    """A finding without a figure."""


class _Maps(nn.Module):
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
class _Case:
    """A flow at some parameters, with points `(n, *event_shape)` and contexts `(n, context_dim)` to try it on."""

    name: str
    wild: bool
    pristine: _Maps
    neighbours: tuple[_Maps, ...]
    points: Tensor
    context: Tensor | None
    event_dim: int

    @staticmethod
    def make(flow: TransformModule, event_shape: tuple[int, ...], scale: float, seed: int) -> "_Case":
        torch.manual_seed(seed)
        maps = _Maps(copy.deepcopy(flow)).double()
        parameters = list(maps.parameters())
        base = torch.randn(6, *event_shape, dtype=torch.float64)
        points = [base, 10 * base[:3], 100 * base[:3], 1000 * base[:3], torch.zeros_like(base[:1])]
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
        return _Case(name, scale == WILD, maps, neighbours, all_points, context, len(event_shape))

    def maps(self) -> _Maps:
        """Return the flow, in a copy of its own for each check."""
        return copy.deepcopy(self.pristine)

    def rounding(self, function: Callable[[_Maps, Tensor], Tensor], point: Tensor) -> Tensor:
        """Return how far `ROUNDING` of the point and the parameters moves `function(maps, point)`, `(n,)`."""
        result = function(self.maps(), point)
        near = (function(maps, point * (1 + ROUNDING * torch.randn_like(point))) for maps in self.neighbours)
        return torch.stack([_size(other - result) for other in near]).amax(0)

    def log_base(self, x: Tensor) -> Tensor:
        """Return the log density of a standard normal base."""
        return -0.5 * (x**2 + math.log(2 * math.pi)).flatten(x.dim() - self.event_dim).sum(-1)

    def score(self, maps: _Maps, y: Tensor) -> Tensor:
        """Return the log density of `y`, over a standard normal base."""
        x, log_det = maps(y, self.context, inverse=True)
        score: Tensor = self.log_base(x) + log_det
        return score


@dataclass(frozen=True)
class _Check:
    """One thing that must hold: `measure` returns an error, at most `limit`, or raises; `fault` says what is wrong."""

    name: str
    fault: str
    measure: Callable[[_Case], float | None]
    scales: tuple[float, ...] = (RANDOM,)
    limit: float = TOLERANCE

    def run(self, case: _Case) -> tuple[float | None, str | None]:
        """Return the error if there is one, and what to say if it is too large."""
        try:
            error = self.measure(case)
        except _BreachError as breach:
            return math.nan, str(breach)
        except Exception as exception:  # whatever a flow under test raises is a finding
            return math.nan, textwrap.shorten(f"raises {type(exception).__name__}: {exception}", 160)
        if error is None or error <= self.limit:
            return error, None
        return error, "is not finite" if math.isnan(error) else f"{self.fault}: {error:.1e}, allowed {self.limit:.0e}"


def _size(tensor: Tensor) -> Tensor:
    """The largest entry of each point or, of log-determinants, each entry: `(n,)`."""
    return tensor.detach().abs() if tensor.dim() < 2 else tensor.detach().flatten(1).abs().amax(1)


def _error(got: Tensor, wanted: Tensor, rounding: Tensor | float = 0.0) -> float:
    """The largest |got - wanted| relative to 1 + |wanted|, less where rounding explains it; NaN if not finite."""
    if got.shape != wanted.shape:
        raise _BreachError(f"must have shape {tuple(wanted.shape)}; got {tuple(got.shape)}")
    # The ratio form of |got - wanted| <= TOLERANCE (1 + |wanted|) + rounding. Where rounding is infinite, it is NaN.
    error = (_size(got - wanted) + 0 * rounding) / (1 + _size(wanted) + rounding / TOLERANCE)
    return _largest(error.tolist())


def _largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN if there is one."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _jacobian(case: _Case, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return the log-determinants and, by autograd, the Jacobians `(n, dim, dim)`."""
    point = case.points.clone().requires_grad_()
    value, log_det = case.maps()(point, case.context, inverse)
    # Points do not mix (see `_shapes`), so one backward pass gives a row of every Jacobian.
    rows = [torch.autograd.grad(y.sum(), point, retain_graph=True)[0].flatten(1) for y in value.flatten(1).unbind(1)]
    return log_det, torch.stack(rows, 1)


def _log_det(case: _Case, inverse: bool) -> float:
    log_det, jacobian = _jacobian(case, inverse)
    wanted = torch.linalg.slogdet(jacobian)[1]
    # The entries of autograd's Jacobian are rounded as well.
    near = [torch.linalg.slogdet(jacobian * (1 + ROUNDING * torch.randn_like(jacobian)))[1] for _ in range(3)]
    return _error(log_det, wanted, torch.stack([(other - wanted).abs() for other in near]).amax(0))


def _triangular(case: _Case, kind: str) -> float:
    _, jacobian = _jacobian(case, inverse=False)
    return float((jacobian.triu(1) if kind == "lower" else jacobian.tril(-1)).abs().max())


def _round_trip(case: _Case, inverse: bool) -> float:
    maps, context = case.maps(), case.context
    there = maps(case.points, context, inverse)[0].detach()
    rounding = case.rounding(lambda maps, point: maps(point, context, not inverse)[0], there)
    return _error(maps(there, context, not inverse)[0], case.points, rounding)


def _cancel(case: _Case) -> float:
    maps, context = case.maps(), case.context
    y, log_det = (result.detach() for result in maps(case.points, context))
    rounding = case.rounding(lambda maps, point: maps(point, context, inverse=True)[1], y)
    return _error(-maps(y, context, inverse=True)[1], log_det, rounding)


def _joint_score(case: _Case) -> float:
    maps = case.maps()
    y, log_det = (result.detach() for result in maps(case.points, case.context))
    return _error(case.score(maps, y), case.log_base(case.points) - log_det, case.rounding(case.score, y))


@torch.no_grad()
def _integral(case: _Case) -> float:
    maps, shape = case.maps(), case.points.shape[1:]
    context = None if case.context is None else case.context[0]
    # The grid covers the image of a box that holds all but 1e-9 of the base's mass.
    axis = torch.linspace(-6.5, 6.5, 101)
    box = torch.cartesian_prod(*[axis] * shape.numel()).reshape(-1, *shape)
    image = maps(box.to(case.points), context)[0].flatten(1).cpu()
    steps = 20001 if shape.numel() == 1 else 401
    axes = [torch.linspace(float(a.min()), float(a.max()), steps, dtype=a.dtype) for a in image.unbind(1)]
    grid = torch.cartesian_prod(*axes).reshape(-1, *shape)
    x, log_det = maps(grid.to(case.points), context, inverse=True)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    return abs(float((case.log_base(x) + log_det).exp().sum()) * cell - 1)


def _precision(case: _Case, inverse: bool) -> None:
    """Values and gradients keep dtype and device, and are finite."""
    # In float32, in which flows are trained, not at parameters whose own size is far from any training.
    for dtype in (torch.float64,) if case.wild else (torch.float64, torch.float32):
        maps = case.maps().to(dtype)
        inputs = {"points": case.points.to(dtype, copy=True).requires_grad_()}
        if case.context is not None:
            inputs["context"] = case.context.to(dtype, copy=True).requires_grad_()
        results = maps(*inputs.values(), inverse=inverse)
        inputs |= {name: p for name, p in maps.named_parameters() if p.requires_grad}
        total = sum((result * torch.randn_like(result)).sum() for result in results)
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        outcomes = dict(zip(("point", "log-det"), results, strict=True))
        outcomes |= {f"gradient to {name}": g for name, g in zip(inputs, gradients, strict=True) if g is not None}
        for name, tensor in outcomes.items():
            if not bool(tensor.isfinite().all()):
                raise _BreachError(f"fails: {name} is not finite in {dtype}")
            if (tensor.dtype, tensor.device) != (dtype, case.points.device):
                raise _BreachError(
                    f"fails: {name} is {tensor.dtype} on {tensor.device} for {dtype} on {case.points.device}"
                )


def _gradcheck(case: _Case, inverse: bool) -> None:
    maps = case.maps()
    given = [case.points[:2]] if case.context is None else [case.points[:2], case.context[:2]]
    parameters = {name: p for name, p in maps.named_parameters() if p.requires_grad}

    def function(*inputs: Tensor) -> Tensor:
        # Clones, because gradcheck changes its inputs in place, and a transform may cache by identity.
        tensors = [tensor.clone() for tensor in inputs]
        replaced = dict(zip(parameters, tensors[len(given) :], strict=True))
        value, log_det = torch.func.functional_call(maps, replaced, tuple(tensors[: len(given)]), {"inverse": inverse})
        # As one tensor, because gradcheck passes over outputs without gradient: a detached log-determinant.
        return torch.cat([value.flatten(1), log_det[:, None]], 1)

    inputs = [tensor.detach().clone().requires_grad_() for tensor in (*given, *parameters.values())]
    torch.autograd.gradcheck(function, inputs, fast_mode=True)


def _shapes(case: _Case, inverse: bool) -> float:
    """Batch shapes, and contexts that broadcast over them, against one point after another."""
    maps, event, errors = case.maps(), case.points.shape[1:], []
    shapes: list[tuple[tuple[int, ...], ...]] = [((), ()), ((1,), (1,)), ((2, 3), (2, 3)), ((0,), (0,))]
    if case.context is not None:
        shapes += [((2, 3), ()), ((2, 3), (1,)), ((2, 3), (2, 1)), ((), (3,)), ((0,), ())]
    for batch, context_batch in shapes:
        given = [case.points[: math.prod(batch)].reshape(*batch, *event)]
        if case.context is not None:
            width = case.context.shape[-1]
            given.append(case.context[: math.prod(context_batch)].reshape(*context_batch, width))
        whole = torch.broadcast_shapes(batch, context_batch)
        value, log_det = maps(*given, inverse=inverse)
        if value.shape != whole + event or log_det.shape != whole:
            came = " and contexts ".join(str(tuple(tensor.shape)) for tensor in given)
            raise _BreachError(f"are wrong: points {came} give {tuple(value.shape)}, log-det {tuple(log_det.shape)}")
        expanded = [given[0].expand(whole + event).reshape(-1, *event)]
        expanded += [context.expand(*whole, width).reshape(-1, width) for context in given[1:]]
        for i in range(whole.numel()):
            single = maps(*(tensor[i] for tensor in expanded), inverse=inverse)
            got = value.reshape(-1, *event)[i], log_det.reshape(-1)[i]
            errors += [_error(g[None], s[None]) for g, s in zip(got, single, strict=True)]
    return _largest(errors)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # each function compiled before counts as a recompilation
    compiled = torch.compile(function, fullgraph=True)

    def call(*given: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of its own code
            return compiled(*given)

    return call


def _transformed(case: _Case, inverse: bool, by: Callable[..., Any]) -> float:
    maps, given = case.maps(), [case.points] if case.context is None else [case.points, case.context]
    got = by(lambda *given: maps(*given, inverse=inverse))(*given)
    return _largest(map(_error, got, maps(*given, inverse=inverse)))


def _cache(case: _Case, inverse: bool) -> float:
    maps = case.maps()
    maps(case.points, case.context, inverse)
    with torch.no_grad():
        for p in maps.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fresh = case.maps()
    fresh.load_state_dict(maps.state_dict())
    wanted = fresh(case.points.clone(), case.context, inverse)
    return _largest(map(_error, maps(case.points, case.context, inverse), wanted))


def _parameters(case: _Case) -> None:
    """The registered parameters are the leaves of the graph, and each moves the result."""
    maps = case.maps()
    total = sum((result * torch.randn_like(result)).sum() for result in maps(case.points, case.context))
    named = {p: name.removeprefix("flow.") for name, p in maps.named_parameters() if p.requires_grad and p.numel()}
    if not isinstance(total, Tensor) or not total.requires_grad:
        idle = list(named.values())
    else:
        for leaf in _leaves(total):
            if leaf not in named and leaf.numel():
                raise _BreachError(f"fail: a tensor of shape {tuple(leaf.shape)} requires grad, but is not registered")
        gradients = torch.autograd.grad(total, list(named), allow_unused=True)
        idle = [name for name, g in zip(named.values(), gradients, strict=True) if g is None or not bool(g.any())]
    if idle:
        raise _BreachError(f"fail: of no influence on point and log-det are {', '.join(idle)}")


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    stack: list[Any] = [tensor.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            stack += [following for following, _ in node.next_functions]


def _copies(case: _Case, factory: Callable[[], TransformModule] | None) -> float:
    """Copies after a backward pass, and a fresh flow with the state of this one."""
    flow, given = case.maps().flow, (case.points, case.context)
    wanted = _Maps(flow)(*given)
    total = wanted[0].sum() + wanted[1].sum()
    if total.requires_grad:
        total.backward()
    copies: list[TransformModule] = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    if factory is not None:
        copies.append(factory().to(case.points))
        copies[-1].load_state_dict(flow.state_dict())
    return _largest(error for other in copies for error in map(_error, _Maps(other)(*given), wanted))


def _distributions(case: _Case) -> float:
    maps, errors = case.maps(), []
    transform: Any = maps.flow
    if case.context is not None:
        transform = transform.condition(case.context)
    for package in (torch.distributions, dist):
        base = package.Independent(package.Normal(torch.zeros_like(case.points[0]), 1.0), case.event_dim)
        law = package.TransformedDistribution(base, [transform])
        for value in (case.points.clone(), law.rsample(case.points.shape[:1]).detach()):
            errors.append(_error(law.log_prob(value), case.score(maps, value)))
    return _largest(errors)


def _identity(case: _Case) -> float:
    errors = []
    for inverse in (False, True):
        value, log_det = case.maps()(case.points, case.context, inverse)
        errors += [_error(value, case.points), _error(log_det, torch.zeros_like(log_det))]
    return _largest(errors)
