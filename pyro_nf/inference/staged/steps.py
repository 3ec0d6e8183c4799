"""Stages that take steps of an optimizer: a base with parameters of its own, and the flow."""

from dataclasses import dataclass

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.inference.staged.stage import Fitted, Problem, StepPlan


@dataclass(frozen=True)
class Steps:
    """Adam on the base and the layers.

    Attributes:
        name: Its name.
        learning_rate: Adam's. Coordinates in which the posterior is nearly standard make rates universal; a flow's
            networks want a lower one.
        max_steps: Upper bound of its steps.
        eval_every: Steps between evaluations.
        has_network: Whether the network is trained.
        whitens: Whether it begins in coordinates in which the posterior found so far, without its map, is the base.
        graph: As of a `StepPlan`.
        max_gap: Divergence from the posterior, in nats, below which it is good enough.
    """

    name: str
    learning_rate: float
    max_steps: int
    eval_every: int
    has_network: bool = True
    whitens: bool = False
    graph: str = "flow"
    max_gap: float = 0.005

    def num_points(self, num_particles: int) -> int:
        """Its first block of steps."""
        return self.eval_every * num_particles

    def applies(self, so_far: Approximation) -> bool:
        """A network may train any; without it only what the stages before could not fit, a base's own parameters."""
        return self.has_network or any(True for _ in so_far.base.parameters())

    def fit(self, problem: Problem, so_far: Approximation) -> Fitted:
        """Take the steps."""
        start = so_far.copy(has_network=self.has_network)
        if self.whitens:
            start.affine.whiten()
        plan = StepPlan(self.name, self.learning_rate, self.max_steps, self.eval_every, self.graph)
        found, account = problem.train(start, plan)
        return Fitted(found, account.history, steps=account)
