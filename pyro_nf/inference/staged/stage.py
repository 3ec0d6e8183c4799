"""What a stage of a fit is: a function from what is known of a posterior to an approximation of it."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import Starts
from pyro_nf.diagnostics.weights import WeightSummary
from pyro_nf.inference.result import FitResult
from pyro_nf.interface.waits import Report


class StepPlan(NamedTuple):
    """Steps of an optimizer that a stage asks for.

    Attributes:
        name: The stage's name.
        learning_rate: Adam's.
        max_steps: Upper bound of its steps.
        eval_every: Steps between evaluations.
        graph: Stages that name the same graph take the same steps, which are recorded once.
    """

    name: str
    learning_rate: float
    max_steps: int
    eval_every: int
    graph: str


Train = Callable[..., tuple[Approximation, FitResult]]
"""`(approximation, StepPlan) -> (approximation, account of its steps)`: fits by steps, from where it is."""


class Problem(NamedTuple):
    """What the stages of a chain fit, and what they may use.

    Attributes:
        density: The posterior's log density over the coordinates, unnormalized.
        train: Fits an approximation by steps.
        num_starts: Starting points from which modes are looked for.
        report: Is told what a stage does; false ends it with what there is.
    """

    density: Density
    train: Train
    num_starts: int
    report: Report


class Fitted(NamedTuple):
    """What a stage has come to.

    Attributes:
        approximation: The approximation.
        history: ELBO at each of its steps, `(steps,)`.
        steps: The account of steps of an optimizer, `None` where there were none of that kind.
        starts: What a search for modes found, if there was one.
        weights: Importance weights, if the stage has measured them itself and knows that it made the fit better.
    """

    approximation: Approximation
    history: Tensor
    steps: FitResult | None = None
    starts: Starts | None = None
    weights: WeightSummary | None = None


class Stage(Protocol):
    """A part of a fit. The chain measures what it returns, keeps the better of that and what was there, and goes on.

    Attributes:
        name: Its name in `FitResult.stages`.
        max_gap: Divergence from the posterior, in nats, below which no further stage is needed.
    """

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def max_gap(self) -> float:
        """When it is good enough."""

    def num_points(self, num_particles: int) -> int:
        """Return at how many points it takes gradients before it can be measured, where a step has so many draws."""

    def applies(self, so_far: Approximation) -> bool:
        """Whether it can make this one better, whatever the posterior."""

    def fit(self, problem: Problem, so_far: Approximation) -> Fitted | None:
        """Fit the posterior from what is known so far; `None` if there is nothing to be had."""
