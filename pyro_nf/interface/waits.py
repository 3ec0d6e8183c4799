"""Calls that take long: what they report on their way, and that they run one at a time."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Report = Callable[[str, int, int, float], bool]
"""`(what is done, how much of it, of how much, ELBO so far) -> whether to go on`."""

_turn = threading.RLock()


def silent(what: str, done: int, total: int, elbo: float) -> bool:
    """Report to nobody, and go on."""
    return True


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Let calls from several threads take turns: Pyro's handlers and torch's generators are those of the process.

    A call from inside another one, in the same thread, goes on at once.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _turn:
            return function(*args, **kwargs)

    return call
