"""When to stop, and the learning rate on the way there."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_nf.inference.result import Evaluation


class PlateauSchedule:
    r"""Warm up, hold while the ELBO rises, cool down along a cosine once it does not, stop.

    The ELBO has stopped rising when the best evaluation of the last `patience` is no better than the best before them
    by more than twice the Monte Carlo error of the difference, nor by more than `tolerance` nats. The cool-down takes
    half as many steps again as came before it; it starts in any case early enough to end at `max_steps`.

    Args:
        learning_rate: The rate that is held.
        max_steps: Upper bound of the run.
        warmup_steps: Steps of linear rise.
        patience: Evaluations without improvement that make a plateau.
        tolerance: Improvement in nats too small to wait for.
    """

    def __init__(
        self, learning_rate: float, max_steps: int, warmup_steps: int = 50, patience: int = 5, tolerance: float = 0.01
    ) -> None:
        self.learning_rate, self.max_steps = learning_rate, max_steps
        self.warmup_steps, self.patience, self.tolerance = warmup_steps, patience, tolerance
        self._cooldown: tuple[int, int] | None = None  # first and last step
        self._start = 0  # evaluations before this step belong to a run that was to end earlier
        self.plateau_step: int | None = None

    @property
    def last_step(self) -> int:
        """The number of steps after which the run ends, as far as is known now."""
        return self.max_steps if self._cooldown is None else self._cooldown[1]

    def state(self) -> dict[str, Any]:
        """Return all that the schedule is and knows, as plain values."""
        return vars(self).copy()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PlateauSchedule":
        """Return the schedule whose `state` this is."""
        schedule = cls(state["learning_rate"], state["max_steps"])
        vars(schedule).update({name: state[name] for name in vars(schedule)})
        return schedule

    def set_max_steps(self, max_steps: int, steps: int) -> None:
        """Change the upper bound of a run on its way.

        Up to a higher one the rate is held again, where the old bound and no plateau made it cool down; only what is
        evaluated from then on can be a plateau. To a lower one it cools down faster.

        Args:
            max_steps: The new bound.
            steps: Steps taken.

        Raises:
            ValueError: If more steps than `max_steps` were taken.
        """
        if max_steps < steps:
            raise ValueError(f"max_steps must be at least the {steps} steps that the checkpoint holds; got {max_steps}")
        if self.plateau_step is not None:
            self._cool_down(self.plateau_step, max_steps)
        elif max_steps > self.max_steps and self._cooldown is not None:
            self._cooldown, self._start = None, steps
        elif self._cooldown is not None:
            self._cooldown = (self._cooldown[0], max_steps)
        self.max_steps = max_steps

    def _cool_down(self, step: int, max_steps: int) -> None:
        self._cooldown = (step, min(step + max(step // 2, 1), max_steps))

    def rates(self, step: int, num_steps: int, like: Tensor) -> Tensor:
        """Return the learning rates of `num_steps` steps from this one on, in the dtype and on the device of `like`."""
        rates = [self.rate(step + i) for i in range(num_steps)]
        return torch.tensor(rates, dtype=like.dtype, device=like.device)

    def rate(self, step: int) -> float:
        """Return the learning rate of this step, counted from 0."""
        if self._cooldown is None and step >= 2 * self.max_steps // 3:
            self._cooldown = (step, self.max_steps)
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cool = 1.0
        if self._cooldown is not None:
            first, last = self._cooldown
            cool = 0.5 * (1 + math.cos(math.pi * (step - first) / max(last - first, 1)))
        return self.learning_rate * warm * cool

    def observe(self, evaluations: list[Evaluation]) -> None:
        """Start the cool-down if the evaluations so far have reached a plateau."""
        evaluations = [evaluation for evaluation in evaluations if evaluation.step >= self._start]
        if self._cooldown is not None or len(evaluations) <= self.patience:
            return
        before = max(evaluations[: -self.patience], key=lambda e: e.elbo)
        recent = max(evaluations[-self.patience :], key=lambda e: e.elbo)
        noise = 2 * math.hypot(before.mcse, recent.mcse)
        if not recent.elbo - before.elbo > max(noise, self.tolerance):
            step = evaluations[-1].step
            self.plateau_step = step
            self._cool_down(step, self.max_steps)
