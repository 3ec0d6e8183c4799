"""The checks behind `check_flow`, one function each."""

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from pyro_nf.flows import Flow
from pyro_nf.testing.cases import ROUNDING, BreachError, Case, Maps, error_of, largest, size_of


def _jacobian(case: Case, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return the log-determinants and, by autograd, the Jacobians `(n, dim, dim)`."""
    point = case.points.clone().requires_grad_()
    value, log_det = case.maps()(point, case.context, inverse)
    # Points do not mix (see `shapes`), so one backward pass gives a row of every Jacobian.
    rows = [torch.autograd.grad(y.sum(), point, retain_graph=True)[0].flatten(1) for y in value.flatten(1).unbind(1)]
    return log_det, torch.stack(rows, 1)


def log_det(case: Case, inverse: bool) -> float:
    """The log-determinant against autograd's."""
    log_det, jacobian = _jacobian(case, inverse)
    wanted = _slogdet(jacobian)
    # The entries of autograd's Jacobian are rounded as well; elimination rounds them relative to the largest, once for
    # each row, but has nothing to do in a triangular matrix.
    errors = ROUNDING * jacobian.abs()
    if bool(jacobian.triu(1).any()) and bool(jacobian.tril(-1).any()):
        rows = torch.finfo(jacobian.dtype).eps * jacobian.shape[-1]
        errors = errors + rows * jacobian.abs().amax((-2, -1), keepdim=True)
    near = [_slogdet(jacobian + errors * torch.randn_like(jacobian)) for _ in range(3)]
    rounding = 4 * torch.stack([(other - wanted).abs() for other in near]).amax(0)
    # Errors that move it by as much as a tenth are no longer small: the Jacobian is singular to rounding.
    return error_of(log_det, wanted, torch.where(rounding > 0.1, math.inf, rounding))


def _slogdet(matrix: Tensor) -> Tensor:
    full = bool(matrix.triu(1).any()) and bool(matrix.tril(-1).any())
    log_det: Tensor = torch.linalg.slogdet(matrix)[1] if full else matrix.diagonal(dim1=1, dim2=2).abs().log().sum(-1)
    return log_det


def triangular(case: Case, kind: str) -> float:
    """The largest entry of the Jacobian where it must be zero."""
    _, jacobian = _jacobian(case, inverse=False)
    return float((jacobian.triu(1) if kind == "lower" else jacobian.tril(-1)).abs().max())


def round_trip(case: Case, inverse: bool) -> float:
    """There and back again; where rounding loses the way back, what is found must map to the same point."""
    maps, context = case.maps(), case.context
    there = maps(case.points, context, inverse)[0].detach()
    back = maps(there, context, not inverse)[0].detach()
    rounding = case.rounding(lambda maps, point: maps(point, context, not inverse)[0], there)
    # Rounding of the size of the point itself says nothing about the error.
    lost = rounding > 0.1 * (1 + size_of(case.points))
    again = maps(back, context, inverse)[0]
    again_rounding = case.rounding(lambda maps, point: maps(point, context, inverse)[0], back)
    errors = [error_of(back[~lost], case.points[~lost], rounding[~lost])] if not bool(lost.all()) else []
    errors += [error_of(again[lost], there[lost], again_rounding[lost])] if bool(lost.any()) else []
    return largest(errors)


def cancel(case: Case) -> float:
    """The log-determinants of there and back sum to zero."""
    maps, context = case.maps(), case.context
    y, log_det = (result.detach() for result in maps(case.points, context))
    rounding = case.rounding_back(lambda maps, y: maps(y, context, inverse=True)[1], y)
    return error_of(-maps(y, context, inverse=True)[1], log_det, rounding)


def joint_score(case: Case) -> float:
    """The density that comes with a draw is the density of the draw."""
    maps = case.maps()
    y, log_det = (result.detach() for result in maps(case.points, case.context))
    return error_of(case.score(maps, y), case.log_base(case.points) - log_det, case.rounding_back(case.score, y))


def pushed_score(case: Case) -> float | None:
    """The score that a forward pass carries along is the gradient of the log density."""
    maps = case.maps()
    if not isinstance(maps.flow, Flow):
        return None

    def gradient(maps: Maps, y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(case.score(maps, y).sum(), y)[0]

    y, _, score = maps.flow.forward_with_score(case.points, -case.points, case.context)
    return error_of(score, gradient(maps, y), case.rounding_back(gradient, y.detach()))


@torch.no_grad()
def integral(case: Case) -> float:
    """The density sums to 1 over a grid."""
    maps, shape = case.maps(), case.points.shape[1:]
    context = None if case.context is None else case.context[0]
    # The grid covers the image of a box that holds all but 1e-9 of the base's mass.
    axis = torch.linspace(-6.5, 6.5, 101)
    box = torch.cartesian_prod(*[axis] * shape.numel()).reshape(-1, *shape)
    image = maps(box.to(case.points), context)[0].flatten(1).cpu()
    steps = 20001 if shape.numel() == 1 else 301
    axes = [torch.linspace(float(a.min()), float(a.max()), steps, dtype=a.dtype) for a in image.unbind(1)]
    grid = torch.cartesian_prod(*axes).reshape(-1, *shape)
    x, log_det = maps(grid.to(case.points), context, inverse=True)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    return abs(float((case.log_base(x) + log_det).exp().sum()) * cell - 1)


def precision(case: Case, inverse: bool) -> None:
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
                raise BreachError(f"fails: {name} is not finite in {dtype}")
            if (tensor.dtype, tensor.device) != (dtype, case.points.device):
                raise BreachError(
                    f"fails: {name} is {tensor.dtype} on {tensor.device} for {dtype} on {case.points.device}"
                )


def gradcheck(case: Case, inverse: bool) -> None:
    """Gradients to input, context and parameters against finite differences."""
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
    names = [*("point", "context")[: len(given)], *(name.removeprefix("flow.") for name in parameters)]
    try:
        torch.autograd.gradcheck(function, inputs, fast_mode=True)
    except GradcheckError as error:
        text = re.sub(r"input (\d+)", lambda found: names[int(found[1])], str(error).splitlines()[0].rstrip(","))
        raise BreachError(f"fails: {text} (finite differences fail as well where the map grows too fast)") from error


def shapes(case: Case, inverse: bool) -> float:
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
            raise BreachError(f"are wrong: points {came} give {tuple(value.shape)}, log-det {tuple(log_det.shape)}")
        expanded = [given[0].expand(whole + event).reshape(-1, *event)]
        expanded += [context.expand(*whole, width).reshape(-1, width) for context in given[1:]]
        for i in range(whole.numel()):
            single = maps(*(tensor[i] for tensor in expanded), inverse=inverse)
            got = value.reshape(-1, *event)[i], log_det.reshape(-1)[i]
            errors += [error_of(g[None], s[None]) for g, s in zip(got, single, strict=True)]
    return largest(errors)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function by `torch.compile`, as a transformation for `transformed`."""
    torch.compiler.reset()  # each function compiled before counts as a recompilation
    compiled = torch.compile(function, fullgraph=True)

    def call(*given: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of its own code
            return compiled(*given)

    return call


def transformed(case: Case, inverse: bool, by: Callable[..., Any]) -> float:
    """The map under a transformation of functions (`vmap`, compilation) against the plain call."""
    maps, given = case.maps(), [case.points] if case.context is None else [case.points, case.context]
    got = by(lambda *given: maps(*given, inverse=inverse))(*given)
    return largest(map(error_of, got, maps(*given, inverse=inverse)))


def cache(case: Case, inverse: bool) -> float:
    """After an update of the parameters, the same input gives what a fresh copy gives."""
    maps = case.maps()
    maps(case.points, case.context, inverse)
    with torch.no_grad():
        for p in maps.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fresh = case.maps()
    fresh.load_state_dict(maps.state_dict())
    wanted = fresh(case.points.clone(), case.context, inverse)
    return largest(map(error_of, maps(case.points, case.context, inverse), wanted))


def parameters(case: Case) -> None:
    """The registered parameters are the leaves of the graph, and each moves the result."""
    maps = case.maps()
    total = sum((result * torch.randn_like(result)).sum() for result in maps(case.points, case.context))
    named = {p: name.removeprefix("flow.") for name, p in maps.named_parameters() if p.requires_grad and p.numel()}
    if not isinstance(total, Tensor) or not total.requires_grad:
        idle = list(named.values())
    else:
        for leaf in _leaves(total):
            if leaf not in named and leaf.numel():
                raise BreachError(f"fail: a tensor of shape {tuple(leaf.shape)} requires grad, but is not registered")
        gradients = torch.autograd.grad(total, list(named), allow_unused=True)
        idle = [name for name, g in zip(named.values(), gradients, strict=True) if g is None or not bool(g.any())]
    if idle:
        raise BreachError(f"fail: of no influence on point and log-det are {', '.join(idle)}")


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


def copies(case: Case, factory: Callable[[], TransformModule] | None) -> float:
    """Copies after a backward pass, and a fresh flow with the state of this one."""
    flow, given = case.maps().flow, (case.points, case.context)
    wanted = Maps(flow)(*given)
    total = wanted[0].sum() + wanted[1].sum()
    if total.requires_grad:
        total.backward()
    copies: list[TransformModule] = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    if factory is not None:
        copies.append(factory().to(case.points))
        copies[-1].load_state_dict(flow.state_dict())
    return largest(error for other in copies for error in map(error_of, Maps(other)(*given), wanted))


def distributions(case: Case) -> float:
    """Torch's and Pyro's `TransformedDistribution` score any point as the flow does."""
    maps, errors = case.maps(), []
    transform: Any = maps.flow
    if case.context is not None:
        transform = transform.condition(case.context)
    for package in (torch.distributions, dist):
        base = package.Independent(package.Normal(torch.zeros_like(case.points[0]), 1.0), case.event_dim)
        law = package.TransformedDistribution(base, [transform])
        for value in (case.points.clone(), law.rsample(case.points.shape[:1]).detach()):
            errors.append(error_of(law.log_prob(value), case.score(maps, value)))
    return largest(errors)


def identity(case: Case) -> float:
    """Both directions leave a point where it is."""
    errors = []
    for inverse in (False, True):
        value, log_det = case.maps()(case.points, case.context, inverse)
        errors += [error_of(value, case.points), error_of(log_det, torch.zeros_like(log_det))]
    return largest(errors)
