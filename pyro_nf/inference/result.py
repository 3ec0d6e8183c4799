"""What a fit returns."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Evaluation(NamedTuple):
    """The ELBO after `step` steps, on fresh draws, with its Monte Carlo standard error (nats)."""

    step: int
    elbo: float
    mcse: float


@dataclass(frozen=True)
class FitResult:
    """The outcome of `FlowSVI.run`; the guide already holds the best state.

    Attributes:
        elbo: ELBO of the best state in nats, on fresh draws that chose nothing.
        elbo_mcse: Its Monte Carlo standard error.
        converged: Whether the ELBO reached a plateau and the run ended by itself.
        stop_reason: Why it ended, in words.
        steps: Steps taken.
        best_step: The step whose state was kept.
        num_skipped: Steps left out for a non-finite loss or gradient.
        seconds: Wall time.
        execution: How the steps ran: "plain", "recorded" as a graph, or "compiled".
        compile_seconds: Wall time until the first step, spent on recording and compiling if there was any.
        history: The ELBO estimate of each step in nats, `(steps,)`.
        evaluations: The fresh-draw evaluations on the way.
    """

    elbo: float
    elbo_mcse: float
    converged: bool
    stop_reason: str
    steps: int
    best_step: int
    num_skipped: int
    seconds: float
    execution: str
    compile_seconds: float
    history: Tensor = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"ELBO {self.elbo:.3f} +- {self.elbo_mcse:.3f} after {self.steps} steps in {self.seconds:.1f} s "
            f"({self.stop_reason})"
        )
