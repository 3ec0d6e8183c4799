"""What a fit returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor


class Status(Enum):
    """How a fit ended.

    Attributes:
        CONVERGED: By itself: the ELBO reached a plateau, or the weights say that the posterior is reached.
        PLATEAU_NOT_REACHED: By the bound on its steps.
        INTERRUPTED: By Ctrl-C.
        STOPPED: By a callback.
        TIME: By `max_seconds`.
        FAILED: For losses or gradients that are not finite.
    """

    CONVERGED = "converged"
    PLATEAU_NOT_REACHED = "not converged"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    TIME = "out of time"
    FAILED = "failed"


class StageResult(NamedTuple):
    """A stage of a fit that needs no tuning, as it was measured by fresh draws when it ended.

    Attributes:
        name: What was fitted.
        elbo: ELBO in nats.
        elbo_mcse: Its Monte Carlo standard error.
        gap: Estimate of the log evidence, less the ELBO, in nats.
        ess_fraction: Effective part of the draws, by their importance weights.
        khat: Pareto shape of the weights' tail.
        steps: Steps taken.
        seconds: Wall time.
        kept: Whether the guide holds what came of it, or of the stage before, which was better.
    """

    name: str
    elbo: float
    elbo_mcse: float
    gap: float
    ess_fraction: float
    khat: float
    steps: int
    seconds: float
    kept: bool


class Evaluation(NamedTuple):
    """The ELBO when `step` steps were taken, by draws that changed nothing yet, and its Monte Carlo error (nats)."""

    step: int
    elbo: float
    mcse: float


@dataclass(frozen=True)
class FitResult:
    """The outcome of `FlowSVI.run`; the guide already holds the best state.

    Attributes:
        elbo: ELBO of the best state in nats, on fresh draws that chose nothing.
        elbo_mcse: Its Monte Carlo standard error.
        status: How it ended.
        stop_reason: The same, and why, in words.
        notes: What else to know, a sentence each; `print` shows them.
        steps: Steps taken.
        best_step: The step whose state was kept.
        plateau_step: The step at which the ELBO had reached a plateau and the cool-down began, `None` if it did not.
        num_skipped: Steps left out for a non-finite loss or gradient.
        seconds: Wall time.
        learning_rate: Adam's rate between warm-up and cool-down, given or found.
        execution: How the steps ran: "plain", "recorded" as a graph, or "compiled".
        execution_reason: Why they were not compiled, or an empty string.
        compile_seconds: Wall time spent on recording and compiling.
        path_gradient: Whether the last steps left the score out of the gradient ("sticking the landing").
        stages: The stages of the fit; none where it was a single one.
        starts: What the guide's warm start found, `None` without one; `print` tells it, unless it no longer matters.
        history: The ELBO estimate of each step in nats, `(steps,)`.
        evaluations: The evaluations on the way, one for each `eval_every` steps.
        model: The model that was fitted; `None`, like the next three, in a pickle, which goes without them.
        guide: Its guide.
        args: The model's arguments, `None` where they were minibatches.
        kwargs: Its keyword arguments.
    """

    elbo: float
    elbo_mcse: float
    status: Status
    stop_reason: str
    notes: tuple[str, ...]
    steps: int
    best_step: int
    plateau_step: int | None
    num_skipped: int
    seconds: float
    learning_rate: float
    execution: str
    execution_reason: str
    compile_seconds: float
    path_gradient: bool
    stages: tuple[StageResult, ...]
    starts: Any
    history: Tensor = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    model: Callable[..., Any] = field(repr=False)
    guide: Callable[..., Any] = field(repr=False)
    args: tuple[Any, ...] | None = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None, "guide": None, "args": None, "kwargs": {}}

    @property
    def converged(self) -> bool:
        """Whether the run ended by itself, at a plateau or at the posterior."""
        return self.status is Status.CONVERGED

    def __str__(self) -> str:
        """One line for people."""
        # Where L-BFGS runs that came to no mode ended is of no interest once the fit has come further.
        told = self.starts is not None and not (self.converged and self.starts.without_mode)
        notes = f" (Note: {'; '.join(self.notes)})" if self.notes else ""
        return (
            f"ELBO {self.elbo:.3f} +- {self.elbo_mcse:.3f} after {self.steps} steps in {self.seconds:.1f} s "
            f"({self.stop_reason})" + (f"; {self.starts}" if told else "") + notes
        )
