"""Checks of what a user passes: each raises one sentence that names the argument, what came and what is accepted."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


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


def check_callable(name: str, value: Any) -> None:
    """Check that a model or a guide can be called.

    Raises:
        ValueError: If it cannot.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function of Pyro's sample statements or a PyroModule; got {_shown(value)}")


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


def _shown(value: Any) -> str:
    """A value as a sentence can show it: its type too where that is not plain, and not pages of it."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else f"{text[:77]}..."
    plain = value is None or isinstance(value, (bool, int, float, str))
    return text if plain else f"{text} (a {type(value).__name__})"
