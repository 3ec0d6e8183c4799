"""Public names that have changed: the old ones work for one release, and say what to write instead."""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that hands out old names with a warning.

    Assign it under `if not TYPE_CHECKING:`. A type checker takes a module with a `__getattr__` to have every name that
    there is, and would no longer see a misspelt one.

    Args:
        module: The module's `__name__`.
        names: New names by old ones: of something in the module itself, or, with dots, of something elsewhere.

    Returns:
        A function of a name; it raises an `AttributeError` for one that it does not know.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(".")
        warn_of_old(f"{module}.{name}", f"{home or module}.{new}")
        return getattr(importlib.import_module(home) if home else sys.modules[module], new)

    return get


def warn_of_old(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that something goes with the next release, by its old name and its new one."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=stacklevel
    )


def renamed_keyword(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator of functions whose keyword `old` is called `new` by now: they take both, the old one warns.

    Raises:
        ValueError: From the decorated function, if it gets both.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                if new in kwargs:
                    raise ValueError(f"{old} is the old name of {new}; got both: pass {new} alone")
                warn_of_old(f"{old}=", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> Any:
    """Return a property of a class that hands out an attribute by its old name, with a warning."""

    def get(self: Any) -> Any:
        warn_of_old(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(get, doc=f"`{new}`, by its old name.")
