"""Every private part of Pyro that the project uses: what another release of Pyro may change is changed here."""

from collections.abc import Callable
from typing import Any

from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import _bound_partial, _context_wrap
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from torch import nn

SEPARATOR = "$$$"
"""What stands in the parameter store between a module's name and that of its parameter."""


def is_subsample(site: Any) -> bool:
    """Whether a site of a trace, or a message, is the indices of a plate."""
    return isinstance(site.get("fn"), _Subsample)


def subsampled(site: Any) -> tuple[int, int] | None:
    """Return the size of a plate and of its part, if a site of a trace is the indices of a plate that is subsampled."""
    if not is_subsample(site):
        return None
    size, part = site["fn"].size, site["fn"].subsample_size
    return (size, part) if part is not None and part < size else None


def inside_handler(function: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return what a function under one of Pyro's handlers calls, and its arguments; `None` for any other function."""
    if isinstance(function, _bound_partial):  # as of poutine.condition(model, data)
        return function.func, args
    if function is _context_wrap:
        return args[1], args[2:]
    return None


def num_plate_elements() -> int:
    """Return how many elements the plates have together that the running program is in."""
    number = 1
    for handler in _PYRO_STACK:
        if isinstance(handler, IndepMessenger) and handler._vectorized is not False:
            number *= handler.size
    return number


def without_store(module: nn.Module) -> None:
    """Remove the weak references to the parameter store that Pyro leaves on parameters, which cannot be pickled."""
    for param in module.parameters():
        param.__dict__.pop("unconstrained", None)
