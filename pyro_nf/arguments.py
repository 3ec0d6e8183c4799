"""What a user passes: a model's arguments as one, and checks whose sentence says what came and what is accepted."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


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


def _shown(value: Any) -> str:
    """A value as a sentence can show it: its type too where that is not plain, and not pages of it."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else f"{text[:77]}..."
    plain = value is None or isinstance(value, (bool, int, float, str))
    return text if plain else f"{text} (a {type(value).__name__})"
