"""Calls in which a function's own options stand beside a model's arguments."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from pyro_nf.interface.arguments import Arguments
from pyro_nf.programs._pyro import inside_handler

P = ParamSpec("P")
T = TypeVar("T")


def takes_model_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function take `*args` and `**kwargs` of a model beside options of its own, and refuse what may be either.

    An option that a call names is refused where the model (or the guide) has a parameter of that name which nothing
    else gives a value to. What cannot be meant for the model stays: its parameters that are bound by position or by
    `functools.partial`, all arguments in one `Arguments`, options that the function cannot do without.

    Args:
        function: A function of `model` and maybe `guide`, or a method of a guide that has its `_model`. It unpacks its
            `*args` and `**kwargs` by `unpacked`.

    Returns:
        The function; it raises a `ValueError` for such a call.
    """
    parameters = inspect.signature(function).parameters.values()
    own = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    leading = [name for name, each in own.items() if each.kind is not each.KEYWORD_ONLY]

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> T:
        lead, rest = dict(zip(leading, given, strict=False)), given[len(leading) :]
        if not any(isinstance(value, Arguments) for value in rest):
            # What the function must have, and has from nowhere else, is its own.
            needed = {name for name, each in own.items() if each.default is each.empty and name not in lead}
            asked = set(named) & set(own) - needed
            for who, run in _runs({**lead, **named}).items():
                for name in sorted(_unbound(run, rest) & asked):
                    raise ValueError(_sentence(function, lead, who, name, named[name]))
        return function(*given, **named)

    return call


def innermost(
    function: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return what stands inside Pyro's handlers and `functools.partial`, with all arguments that it is called with."""
    inner: Any = function
    kwargs = kwargs or {}
    while True:
        if (found := inside_handler(inner, args)) is not None:  # which may be a `partial` too
            inner, args = found
        elif isinstance(inner, partial):
            inner, args, kwargs = inner.func, (*inner.args, *args), {**inner.keywords, **kwargs}
        else:
            return inner, args, kwargs


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a model, of `forward` for a module; `None` where Python knows of none."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return None


def _runs(given: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return what is called with the model's arguments, by what a sentence calls it."""
    owner = given.get("self")
    if owner is not None:
        return {} if owner._model is None else {"model": owner.model}
    return {who: given[who] for who in ("model", "guide") if callable(given.get(who))}


def _unbound(function: Callable[..., Any], args: tuple[Any, ...]) -> set[str]:
    """Return the names of a function's parameters that a keyword would be the first to give a value."""
    function, args, kwargs = innermost(function, args)
    signature = signature_of(function)
    if signature is None:
        return set()
    try:
        bound = {*signature.bind_partial(*args).arguments, *kwargs}
    except TypeError:  # more of them than it takes, which it will say itself
        return set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, each in signature.parameters.items() if each.kind in kinds} - bound


def _sentence(function: Callable[..., Any], lead: dict[str, Any], who: str, name: str, value: Any) -> str:
    caller = f"{type(lead['self']).__name__}.{function.__name__}" if "self" in lead else function.__name__
    return (
        f"{name}={value!r} may be meant for {caller} or for the {who}, which has a parameter {name!r} too: pass all "
        f"arguments of the model as one, pyro_nf.Arguments(..., {name}=...), and beside it the {name} of {caller}; or "
        "give the model its value by position"
    )


def signature(args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a model's structure may depend on: the shapes of tensors, and other values that can be compared."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        if isinstance(value, dict):
            return tuple((key, describe(item)) for key, item in value.items())
        if isinstance(value, (tuple, list)):
            return tuple(map(describe, value))
        return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)

    return describe(tuple(args)), describe(kwargs)
