"""What a fit shows on its way, and what may end it before its time."""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from pyro_nf.inference.result import Evaluation, Status

Callback = Callable[[Evaluation], bool | None]

# Seconds between looks at the clock and the bar, and between updates of the bar.
_PACE, _REFRESH = 0.2, 0.1


class Watch:
    """The bar, the callbacks, the clock and Ctrl-C of a fit.

    The first Ctrl-C ends the fit at the next look, where all is whole; the second one raises `KeyboardInterrupt`, as
    the first does where there is no look-out: outside the main thread, or where Ctrl-C has a handler of its own.

    Args:
        callbacks: Called with each evaluation; one that returns `True` ends the fit.
        max_seconds: When to end, `None` for never.
        shown: Whether to show a bar.

    Attributes:
        steps_before: Steps of the stages before this one.
    """

    def __init__(
        self, callbacks: Sequence[Callback] = (), max_seconds: float | None = None, shown: bool = False
    ) -> None:
        self.callbacks, self.max_seconds = tuple(callbacks), max_seconds
        self.steps_before = 0
        self._begin = time.perf_counter()
        self._interrupted = threading.Event()
        self._bar = tqdm(desc="FlowSVI", disable=not shown, leave=True)
        self._shown: dict[str, Any] = {"what": "", "time": -math.inf, "gap": math.nan}

    def after(self, steps: int) -> "Watch":
        """Return the same watch for a stage that begins after so many steps."""
        twin = copy.copy(self)
        twin.steps_before = steps
        return twin

    @contextmanager
    def looking_out(self, for_interrupts: bool = True) -> Iterator["Watch"]:
        """Heed Ctrl-C meanwhile; close the bar at the end."""

        def interrupt(signum: int, frame: Any) -> None:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            self._interrupted.set()

        ours = for_interrupts and threading.current_thread() is threading.main_thread()
        ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield self
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self._bar.close()

    @property
    def seconds_left(self) -> float:
        """Seconds until the fit has to end, infinite where it need not."""
        return math.inf if self.max_seconds is None else self.max_seconds - (time.perf_counter() - self._begin)

    @property
    def ended(self) -> Status | None:
        """What ends the fit now, if anything does."""
        if self._interrupted.is_set():
            return Status.INTERRUPTED
        return Status.TIME if self.seconds_left <= 0 else None

    def interrupt(self) -> None:
        """Note that a `KeyboardInterrupt` was raised."""
        self._interrupted.set()

    def report(self, what: str, done: int, total: int, elbo: float) -> bool:
        """Show how far the fit has come, and return whether to go on; a `Report`."""
        if not self._bar.disable:
            self._show(what, done, total, elbo)
        return self.ended is None

    def note_gap(self, gap: float) -> None:
        """Show from now on how far the guide is from the posterior, in nats."""
        self._shown["gap"] = gap

    def ask(self, evaluation: Evaluation) -> bool:
        """Call the callbacks, and return whether one ends the fit."""
        evaluation = evaluation._replace(step=self.steps_before + evaluation.step)
        stops = [bool(callback(evaluation)) for callback in self.callbacks]
        return any(stops)

    def num_steps(self, steps: int, seconds: float, unroll: int) -> int:
        """Return how many steps to take before the next look, if so many took so long: a multiple of `unroll`."""
        return max(1, int(_PACE * steps / max(seconds, 1e-9)) // unroll) * unroll

    def _show(self, what: str, done: int, total: int, elbo: float) -> None:
        now = time.perf_counter()
        if what != self._shown["what"]:
            self._bar.reset(total=total)  # so that the seconds left are those of this part
            self._bar.set_description_str(f"FlowSVI: {what}", refresh=False)
        elif now - self._shown["time"] < _REFRESH and done < total:
            return
        self._shown |= {"what": what, "time": now}
        figures = {"ELBO": f"{elbo:.3f}", "gap": f"{self._shown['gap']:.3f}"}
        known = [f"{name} {value}" for name, value in figures.items() if value != "nan"]
        known += [f"at most {max(self.seconds_left, 0):.0f} s left"] * (self.max_seconds is not None)
        self._bar.set_postfix_str(", ".join(known), refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()
