"""What Pyro's own constraints say of a site: of its values, and of its distribution's parameters."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, constraints
from torch.distributions.utils import lazy_property

# Distributions that sum missing entries out themselves.
_NAN_MASKED = (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)
_SIMPLEX, _ORDERED, _SPHERE = map(type, (constraints.simplex, dist.constraints.ordered_vector, dist.constraints.sphere))
_CORR_CHOLESKY, _CORR_MATRIX = type(constraints.corr_cholesky), type(dist.constraints.corr_matrix)
_SYMMETRIC = type(constraints.symmetric)  # and its subclasses, the positive (semi)definite ones
# Constraints of these modules are tensor operations alone, which `vmap` can batch.
_KNOWN_MODULES = ("torch.distributions.constraints", "pyro.distributions.constraints")
# Matrices that differ from their mirror images by more than this part of the largest entry are not symmetric.
_ASYMMETRY = 1e-3

Mask = Tensor | bool | None


class Fault(NamedTuple):
    """What is wrong with observed values.

    Attributes:
        what: In words, after "the data of site 'y' hold": "3 NaN".
        where: Which entries.
        first: The first of them.
        bounds: Tensors that this rests on, which may depend on latents.
    """

    what: str
    where: Tensor
    first: Any
    bounds: tuple[Tensor, ...] = ()


class Parameter(NamedTuple):
    """A parameter of a distribution.

    Attributes:
        name: Its name.
        constraint: What Pyro says that it obeys.
        value: Its value.
        mask: Which entries of its batch are seen.
        factor: A Cholesky factor of it, NaN where there is none.
    """

    name: str
    constraint: Any
    value: Tensor
    mask: Mask
    factor: Tensor | None

    def holds(self) -> Tensor:
        """Whether it obeys its constraint, or is masked, for each entry."""
        inside = holds(self.constraint, _once(self.value, self.constraint.event_dim))
        if self.factor is not None:
            inside = inside & ~self.factor.isnan().flatten(-2).any(-1)
        return inside | ~self.mask if isinstance(self.mask, Tensor) else inside

    def is_nan(self) -> Tensor:
        """Whether it is NaN, and not masked, for each entry."""
        return seen(self.value.isnan(), self.constraint.event_dim, self.mask)


def unwrap(fn: Any, mask: Mask) -> tuple[Any, Mask]:
    """Return the distribution inside the wrappers of another one, and the mask of its batch (False: all is hidden)."""
    while isinstance(fn, (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            mask = _both(mask, fn._mask)
        if isinstance(fn, Independent) and isinstance(mask, Tensor):
            mask = mask[(...,) + (None,) * fn.reinterpreted_batch_ndims]
        fn = fn.base_dist
    return fn, mask


def is_checked(fn: Any) -> bool:
    """Whether the constraints of a distribution count: not if its user said `validate_args=False`.

    Made under `noise.running`, a distribution of which nobody said anything has a 0 there.
    """
    return fn._validate_args is not False and unwrap(fn, None)[0]._validate_args is not False


def value_fault(fn: Any, value: Any, mask: Mask) -> Fault | None:
    """Return what is wrong with observed values: NaN, infinite, or outside the support."""
    leaf, mask = unwrap(fn, mask)
    if mask is False or not isinstance(value, (Tensor, int, float)):
        return None
    value = torch.as_tensor(value)
    nan = seen(value.isnan(), leaf.event_dim, mask)
    if bool(nan.any()) and not isinstance(leaf, _NAN_MASKED):
        return Fault(f"{int(nan.sum())} NaN", nan, math.nan)
    infinite = seen(value.isinf(), leaf.event_dim, mask)
    if bool(infinite.any()):
        number = int(infinite.sum())
        return Fault(f"{number} infinite {_plural('value', number)}", infinite, _first(value, infinite, leaf))
    support = support_of(leaf)
    if support is None or isinstance(leaf, _NAN_MASKED) or not is_checked(fn):
        return None
    inside = support.check(value)
    outside = seen(~inside, inside.dim() - max(value.dim() - leaf.event_dim, 0), mask)
    if not bool(outside.any()):
        return None
    number = int(outside.sum())
    what = f"{number} {_plural('value', number)} outside the support of {type(leaf).__name__}, {in_words(support)}"
    return Fault(what, outside, _first(value, outside, leaf), bounds(support))


def support_of(leaf: Any) -> Any:
    """Return a distribution's support, or `None` if it does not say, or not in terms of torch and Pyro."""
    try:
        support = leaf.support
    except NotImplementedError:
        return None
    return None if support is None or constraints.is_dependent(support) or not is_known(support) else support


def bounds(constraint: Any) -> tuple[Tensor, ...]:
    """Return the tensors that a constraint is made of."""
    found: tuple[Tensor, ...] = ()
    for value in vars(constraint).values():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            found += bounds(part) if isinstance(part, constraints.Constraint) else (part,)
    return tuple(value for value in found if isinstance(value, Tensor))


def parameters(fn: Any, mask: Mask) -> Iterator[Parameter]:
    """Yield the parameters that a distribution, and what it is made of, was given."""
    leaf, mask = unwrap(fn, mask)
    if mask is False or not is_checked(fn):
        return
    own = getattr(leaf, "arg_constraints", {})
    own = own if isinstance(own, dict) else {}
    for name, constraint in own.items():
        if not constraints.is_dependent(constraint) and is_known(constraint) and _is_given(leaf, name):
            value = getattr(leaf, name)
            if isinstance(value, Tensor):
                factor = vars(leaf).get("_unbroadcasted_scale_tril") if isinstance(constraint, _SYMMETRIC) else None
                yield Parameter(name, constraint, value, mask, factor)
    if not isinstance(mask, Tensor):  # the batch of what it is made of may be another
        for name, child in _children(leaf):
            if not own or not (name.startswith("_") or isinstance(leaf, TransformedDistribution)):
                yield from parameters(child, None)


def can_fail(constraint: Any) -> bool:
    """Whether numbers that are not NaN can break a constraint."""
    if isinstance(constraint, constraints.independent):
        return can_fail(constraint.base_constraint)
    return constraint is not constraints.real


def holds(constraint: Any, value: Tensor, closed: bool = False) -> Tensor:
    """Whether values obey a constraint, up to rounding.

    Args:
        constraint: One of torch's or Pyro's.
        value: The values.
        closed: Whether bounds are inside: a map from the real line reaches them by rounding.
    """
    if isinstance(constraint, constraints.independent):
        inner = holds(constraint.base_constraint, value, closed)
        number = constraint.reinterpreted_batch_ndims
        return inner.flatten(-number).all(-1) if number else inner
    rounding = math.sqrt(torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
    if isinstance(constraint, _SIMPLEX):
        return (value >= -rounding).all(-1) & ((value.sum(-1) - 1).abs() <= rounding)
    if isinstance(constraint, _CORR_CHOLESKY):
        return ((value.square().sum(-1) - 1).abs() <= rounding).all(-1)
    if isinstance(constraint, (_SYMMETRIC, _CORR_MATRIX)):
        return (value - value.mT).abs().amax((-1, -2)) <= _ASYMMETRY * value.abs().amax((-1, -2))
    if isinstance(constraint, _SPHERE):
        return (value.square().sum(-1) - 1).abs() <= rounding
    if isinstance(constraint, _ORDERED):
        return (value[..., 1:] >= value[..., :-1]).all(-1)
    if closed and isinstance(constraint, constraints.greater_than):
        constraint = constraints.greater_than_eq(constraint.lower_bound)
    inside: Tensor = value <= constraint.upper_bound if closed and _is_below(constraint) else constraint.check(value)
    return inside


def is_known(constraint: Any) -> bool:
    """Whether a constraint is one of torch's or Pyro's, which are tensor operations alone."""
    if isinstance(constraint, constraints.independent):
        return is_known(constraint.base_constraint)
    return type(constraint).__module__ in _KNOWN_MODULES


def seen(entries: Tensor, num_event: int, mask: Mask) -> Tensor:
    """Reduce the event dimensions of entries by any, and leave out what is masked."""
    entries = entries.flatten(-num_event).any(-1) if num_event else entries
    return entries & mask if isinstance(mask, Tensor) else entries


def in_words(constraint: Any) -> str:
    """Say which values a constraint allows."""
    if isinstance(constraint, constraints.independent):
        return in_words(constraint.base_constraint)
    lower, upper = (_number(getattr(constraint, name, None)) for name in ("lower_bound", "upper_bound"))
    words = {
        "_Boolean": "0 or 1",
        "_IntegerGreaterThan": f"whole numbers of at least {lower}",
        "_IntegerInterval": f"whole numbers from {lower} to {upper}",
        "_IntegerLessThan": f"whole numbers of at most {upper}",
        "_Integer": "whole numbers",
        "_Interval": f"numbers from {lower} to {upper}",
        "_HalfOpenInterval": f"numbers from {lower} to below {upper}",
        "_GreaterThan": f"numbers above {lower}",
        "_GreaterThanEq": f"numbers of at least {lower}",
        "_LessThan": f"numbers below {upper}",
        "_Simplex": "numbers of at least 0 with sum 1",
        "_OneHot": "zeros with a single 1",
        "_Multinomial": f"counts whose sum is at most {upper}",
        "_LowerCholesky": "lower triangular matrices with a positive diagonal",
        "_CorrCholesky": "Cholesky factors of correlation matrices",
        "_CorrMatrix": "correlation matrices",
        "_PositiveDefinite": "symmetric, positive-definite matrices",
        "_OrderedVector": "numbers in increasing order",
        "_Sphere": "vectors of length 1",
        "_Real": "finite numbers",
    }
    return words.get(type(constraint).__name__, repr(constraint))


def demand(constraint: Any) -> str:
    """Say what a parameter has to be."""
    if isinstance(constraint, constraints.independent):
        return demand(constraint.base_constraint)
    if constraint is constraints.positive:
        return "positive"
    if isinstance(constraint, _SYMMETRIC):
        return "symmetric and positive definite"
    words = in_words(constraint)
    return words.removeprefix("numbers ") if words.startswith("numbers ") else f"made of {words}"


def _is_below(constraint: Any) -> bool:
    return isinstance(constraint, constraints.less_than)


def _is_given(leaf: Any, name: str) -> bool:
    """Whether a distribution was made of a parameter, rather than that computed from another: logits from probs."""
    if name in vars(leaf):
        return True
    if isinstance(getattr(type(leaf), name, None), lazy_property):
        return False
    return all(_is_given(child, name) for _, child in _children(leaf) if hasattr(type(child), name))


def _children(leaf: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(leaf).items():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, Distribution):
                yield name, part


def _both(mask: Mask, other: Mask) -> Mask:
    if mask is False or other is False:
        return False
    if isinstance(mask, Tensor) and isinstance(other, Tensor):
        return mask & other
    return other if mask is None or mask is True else mask


def _once(value: Tensor, num_event: int) -> Tensor:
    """Leave one of the equal rows of an expanded tensor."""
    for dim in range(value.dim() - num_event):
        if value.shape[dim] > 1 and value.stride(dim) == 0:
            value = value.narrow(dim, 0, 1)
    return value


def _first(value: Tensor, where: Tensor, leaf: Any) -> Any:
    """The first value of those entries, as a number or a list of numbers."""
    shape = value.shape[value.dim() - leaf.event_dim :] if value.dim() >= leaf.event_dim else value.shape
    return value.expand((*where.shape, *shape))[tuple(where.nonzero()[0])].tolist()


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"


def _number(bound: Any) -> str:
    if bound is None:
        return ""
    if not isinstance(bound, Tensor):
        return f"{bound:g}"
    try:
        values = bound.reshape(-1).tolist()
    except RuntimeError:  # where draws are batched, or a graph is recorded
        return "a bound that depends on the draw"
    return f"{values[0]:g}" if len(set(values)) == 1 else "a bound that differs from entry to entry"
