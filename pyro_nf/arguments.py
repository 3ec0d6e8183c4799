"""Checks of what a user passes: each raises one sentence that names the argument, what came and what is accepted."""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pyro import poutine


def check_whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return a whole number within bounds, as a Python int.

    Args:
        name: The argument's name.
        value: What came: a Python or NumPy integer. Other types are refused, `True` and `2.0` too.
        least: The smallest number that is accepted.
        most: The largest; `None` for no bound.

    Raises:
        ValueError: If it is no whole number, or out of bounds.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}; got {_shown(value)}")
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
    near = (
        difflib.get_close_matches(value, [c for c in accepted if isinstance(c, str)], n=1, cutoff=0.4)
        if isinstance(value, str)
        else []
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be {listed}; got {_shown(value)}{hint}")


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
