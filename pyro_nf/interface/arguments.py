"""What a user passes: a model's arguments as one, and checks whose sentence says what came and what is accepted."""

import collections.abc
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import numpy as np
import torch
from pyro import poutine
from torch import Tensor


class Arguments:
    """All arguments of a model as one, for calls that have options of the same names.

    Every function that takes a model's arguments takes them one by one, or all in one of these, and nothing of the
    model's beside it: `diagnose(model, guide, Arguments(y, num_samples=3), num_samples=10_000)`.

    Args:
        *args: The model's arguments.
        **kwargs: The model's keyword arguments.

    Attributes:
        args: The arguments, a tuple.
        kwargs: The keyword arguments, a dictionary.

    Example:
        >>> from pyro_nf import Arguments
        >>> Arguments([1.0, 2.0], num_samples=3)
        Arguments([1.0, 2.0], num_samples=3)
    """

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        shown = [repr(value) for value in self.args] + [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"Arguments({', '.join(shown)})"


def unpacked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a model's arguments and keyword arguments, whether they came one by one or as an `Arguments`.

    Raises:
        ValueError: If there is something beside an `Arguments`.
    """
    bundles = [value for value in args if isinstance(value, Arguments)]
    if not bundles:
        return args, kwargs
    if len(args) > 1 or kwargs:
        beside = [type(value).__name__ for value in args if value is not bundles[0]] + [f"{name}=" for name in kwargs]
        raise ValueError(
            f"Arguments must hold all of the model's arguments; got {', '.join(beside)} beside it: put them into it"
        )
    return bundles[0].args, bundles[0].kwargs


def check_whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return a whole number within bounds, as a Python int.

    Args:
        name: The argument's name.
        value: What came: a Python or NumPy integer. Other types are refused, `True` and `2.0` too.
        least: The smallest number that is accepted; `None` for no bound.
        most: The largest; `None` for no bound.

    Raises:
        ValueError: If it is no whole number, or out of bounds.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least) or (most is not None and value > most):
        bounds = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{bounds}; got {_shown(value)}")
    return int(value)


def check_number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """Return a finite real number within bounds, as a Python float.

    Args:
        name: The argument's name.
        value: What came: a Python or NumPy number. Other types are refused, `True` too.
        above: It must be greater than this.
        least: It must not be less than this.

    Raises:
        ValueError: If it is no finite number, or out of bounds.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value <= above or value < least:
        bounds = [f"greater than {above:g}"] * math.isfinite(above) + [f"of at least {least:g}"] * math.isfinite(least)
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}".rstrip() + f"; got {_shown(value)}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a `bool`.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {_shown(value)}")
    return value


def check_callable(name: str, value: Any) -> None:
    """Check that a model or a guide can be called.

    Raises:
        ValueError: If it cannot.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function of Pyro's sample statements or a PyroModule; got {_shown(value)}")


def check_has(name: str, value: Any, attributes: Iterable[str], what: str) -> None:
    """Raise a `ValueError` unless a value has these attributes.

    Args:
        name: The argument's name.
        value: What came.
        attributes: What it must have.
        what: What is accepted, in words.
    """
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
        raise ValueError(f"{name} must be {what}; got {_shown(value)}")


def check_choice(name: str, value: Any, choices: Iterable[Any], also: str = "") -> Any:
    """Return the value if it is one of the choices; names that are nearly right get the nearest one offered.

    Args:
        name: The argument's name.
        value: What came.
        choices: What is accepted.
        also: What else is accepted, for the sentence: "a Flow or a factory", say.

    Raises:
        ValueError: If it is none of them.
    """
    accepted = list(choices)
    if any(type(value) is type(choice) and value == choice for choice in accepted):
        return value
    words = [repr(choice) for choice in accepted] + ([also] if also else [])
    listed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    raise ValueError(f"{name} must be {listed}; got {_shown(value)}{did_you_mean(value, accepted)}")


def did_you_mean(value: Any, choices: Iterable[Any], most: int = 1) -> str:
    """Return the end of a sentence that offers the names nearest to one that is not known.

    Args:
        value: What came.
        choices: What is accepted; names are offered, and nothing else.
        most: How many names to offer at most.

    Returns:
        `"; did you mean 'a' or 'b'?"`, or nothing if no name is near.
    """
    if not isinstance(value, str):
        return ""
    known = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(value, known, n=most, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def named_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's arguments by the names of its parameters, defaults too; by number where it tells no names."""
    try:
        bound = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {f"argument {number + 1}": value for number, value in enumerate(args)} | kwargs
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}[{number}]": item for number, item in enumerate(value)}
        else:
            found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def explain_failure(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
    """Raise a `ValueError` if a model that failed runs once its lists and NumPy arrays are tensors."""
    found = [
        (name, value) for name, value in named_arguments(model, args, kwargs).items() if _as_tensor(value) is not None
    ]
    if not found:
        return
    try:
        with poutine.block(), torch.no_grad(), torch.random.fork_rng():
            model(*map(_or_tensor, args), **{name: _or_tensor(value) for name, value in kwargs.items()})
    except Exception:  # these arguments are not what it fails for
        return
    names = " and ".join(name for name, _ in found)
    kinds = " and ".join(
        dict.fromkeys("NumPy array" if isinstance(v, np.ndarray) else type(v).__name__ for _, v in found)
    )
    raise ValueError(
        f"the model's data must be tensors, on which it runs; got a {kinds} for {names}: pass torch.as_tensor(...)"
    ) from error


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Return a list, tuple or array of numbers as a tensor, floating point numbers in the default dtype."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    try:
        tensor = torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _or_tensor(value: Any) -> Any:
    tensor = _as_tensor(value)
    return value if tensor is None else tensor


def _shown(value: Any) -> str:
    """A value as a sentence can show it: its type too where that is not plain, and not pages of it."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else f"{text[:77]}..."
    plain = value is None or isinstance(value, (bool, int, float, str))
    return text if plain else f"{text} (a {type(value).__name__})"


def check_real_tensor(
    name: str, value: Any, event_shape: Sequence[int | None] = (), *, batch: bool = True, finite: bool = True
) -> Tensor:
    """Return a tensor of real floating-point numbers, at least one, that has numbers (it is not on "meta").

    Args:
        name: The argument's name.
        value: What came.
        event_shape: What its last dimensions must be; `None` for a dimension of any size.
        batch: Whether dimensions before these are accepted.
        finite: Whether NaN and infinities are refused.

    Raises:
        ValueError: If it is anything else.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    last = shape[len(shape) - len(event_shape) :] if batch else shape
    fits = len(last) == len(event_shape) and all(w in (None, g) for w, g in zip(event_shape, last, strict=True))
    if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point() or not fits or not value.numel():
        sizes = ", ".join([*["*batch"] * batch, *("any" if size is None else str(size) for size in event_shape)])
        got = f"{value.dtype} of shape {shape} on {value.device}" if isinstance(value, Tensor) else _shown(value)
        raise ValueError(f"{name} must be a tensor of real numbers, at least one, of shape ({sizes}); got {got}")
    if finite and not bool(value.isfinite().all()):
        broken = int((~value.isfinite()).sum())
        raise ValueError(f"{name} must be finite; {broken} of its {value.numel()} numbers are NaN or infinite")
    return value


class AtLeast(NamedTuple):
    """Mark of an annotated number: `Annotated[int, AtLeast(1)]`."""

    least: float


class Above(NamedTuple):
    """Mark of an annotated number: `Annotated[float, Above(0)]`."""

    bound: float


Size = Annotated[int, AtLeast(1)]
"""A positive whole number."""
Count = Annotated[int, AtLeast(0)]
"""A whole number that is not negative."""
Positive = Annotated[float, Above(0)]
"""A positive number."""

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a function by their annotations at each call, before it begins.

    Checked are numbers (with the bounds that `Size`, `Count`, `Positive` and `Annotated` state), flags, strings, the
    choices of a `Literal`, sequences of numbers, tensors, and what is annotated as a class of torch or of this
    library; an argument annotated `X | None` may be `None`. Other annotations say nothing here.

    Raises:
        ValueError: From the function it decorates, for the first argument that is not as annotated, naming it.
    """
    signature = inspect.signature(function)
    # Names in quotes are of modules that are imported for type checkers alone.
    hints = {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too many arguments, or too few: Python's own message, from the function itself
            return function(*args, **kwargs)
        for name, value in given.items():
            if name in hints:
                kind = signature.parameters[name].kind
                values = value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)
                if kind is not inspect.Parameter.VAR_KEYWORD:
                    for each in values:
                        _check(name, each, hints[name])
        return function(*args, **kwargs)

    return call


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` unless a value is what an annotation says."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin in (Union, UnionType):
        _check_union(name, value, parts)
    elif origin is Literal:
        check_choice(name, value, parts)
    elif origin is Annotated:
        base, mark = parts[0], parts[1]
        if base is int:
            check_whole_number(name, value, least=int(mark.least))
        elif isinstance(mark, Above):
            check_number(name, value, above=mark.bound)
        else:
            check_number(name, value, least=mark.least)
    elif hint is int:
        check_whole_number(name, value, least=None)
    elif hint is float:
        check_number(name, value)
    elif hint is bool:
        check_flag(name, value)
    elif origin in (list, collections.abc.Sequence) and parts and parts[0] is not Any:
        _check_sequence(name, value, parts[0])
    elif origin is collections.abc.Callable:
        if not callable(value):
            raise ValueError(f"{name} must be callable; got {_shown(value)}")
    elif isinstance(origin or hint, type) and not _is_plain_protocol(hint) and not isinstance(value, origin or hint):
        raise ValueError(f"{name} must be a {(origin or hint).__name__}; got {_shown(value)}")


def _is_plain_protocol(hint: Any) -> bool:
    """Whether this is a protocol that cannot be asked for its instances."""
    return getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)


def _check_union(name: str, value: Any, parts: tuple[Any, ...]) -> None:
    """Accept what one of the parts accepts; if there is but one beside `None`, that one says what is wrong."""
    real = [part for part in parts if part is not NoneType]
    if value is None and len(real) < len(parts):
        return
    errors = []
    for part in real:
        try:
            _check(name, value, part)
        except ValueError as error:
            errors.append(str(error))
        else:
            return
    if len(errors) == 1:
        raise ValueError(errors[0])
    accepted = " or ".join(error.removeprefix(f"{name} must be ").partition("; got ")[0] for error in errors)
    raise ValueError(f"{name} must be {accepted}; got {_shown(value)}")


def _check_sequence(name: str, value: Any, part: Any) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, (collections.abc.Sequence, range)):
        raise ValueError(f"{name} must be a list or a tuple; got {_shown(value)}")
    for index, each in enumerate(value):
        _check(f"{name}[{index}]", each, part)
