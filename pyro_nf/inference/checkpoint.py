"""A fit on its way, and the file that keeps it."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_nf.inference.optim import State
from pyro_nf.inference.ranks import Ranks
from pyro_nf.inference.result import Evaluation
from pyro_nf.inference.schedule import PlateauSchedule


@dataclass
class Progress:
    """All that a fit needs to go on.

    Attributes:
        state: Parameters and optimiser.
        schedule: The learning rate's.
        history: The ELBO estimates of blocks of steps.
        evaluations: ELBOs on the way, the first of the start.
        best: The best evaluation's parameters, averaged over its steps and after the last one, `(2, size)`.
        seconds: Wall time until now.
    """

    state: State
    schedule: PlateauSchedule
    history: list[Tensor] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return sum(map(len, self.history))

    @property
    def best_evaluation(self) -> Evaluation:
        """The latest ELBO that was not below the highest until then by more than its Monte Carlo error explains.

        The highest of many noisy ones would be there by chance, at an early step perhaps.
        """
        best = highest = self.evaluations[0]
        for evaluation in self.evaluations:
            highest = max(highest, evaluation, key=lambda e: e.elbo)
            # This evaluation is taken to be as precise: where fits explode, errors do too.
            noise = 2 * math.sqrt(2) * highest.mcse
            if evaluation is highest or (math.isfinite(evaluation.elbo) and highest.elbo - evaluation.elbo <= noise):
                best = evaluation
        return best

    def scatter(self, num_particles: int) -> float:
        """Standard deviation of the draws of a step about their block's mean, in the block where it was smallest."""
        blocks = [float(elbos.std()) for elbos in self.history if len(elbos) > 1]
        return math.sqrt(num_particles) * min([value for value in blocks if math.isfinite(value)], default=math.inf)

    def observe(self, evaluation: Evaluation, params: Tensor) -> None:
        """Note an evaluation, and keep its parameters if it is the best."""
        self.evaluations.append(evaluation)
        if self.best_evaluation is evaluation:
            self.best = params

    def save(self, path: Path, ranks: Ranks) -> None:
        """Write all of it, and each process's random state, to a file that is whole or the old one.

        Every process calls this; the first one writes.
        """
        random = ranks.gather(random_state())
        if ranks.index > 0:
            return
        content = {
            "state": self.state._asdict(),
            "schedule": self.schedule.state(),
            "history": self.history,
            "evaluations": [tuple(evaluation) for evaluation in self.evaluations],
            "best": self.best,
            "seconds": self.seconds,
            "random": random,
        }
        partial = path.with_name(f"{path.name}.partial")
        torch.save(content, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, params: Tensor, ranks: Ranks) -> "Progress":
        """Read on the first process a file that `save` wrote; set each process's random state as it was.

        Raises:
            ValueError: If it belongs to another number of parameters than `params` has, or to another number of
                processes.
        """
        content: dict[str, Any] = ranks.from_first(lambda: torch.load(path, map_location="cpu", weights_only=True))
        state = State(*(content["state"][name].to(params.device) for name in State._fields))
        if state.params.shape != params.shape:
            raise ValueError(
                f"checkpoint {str(path)!r} holds {len(state.params)} parameters; model and guide have {len(params)}"
            )
        if len(content["random"]) != ranks.size:
            raise ValueError(
                f"checkpoint {str(path)!r} is of {len(content['random'])} processes, each with its random state; "
                f"there are {ranks.size}"
            )
        set_random_state(content["random"][ranks.index])
        return cls(
            state,
            PlateauSchedule.from_state(content["schedule"]),
            [elbos.to(params.device) for elbos in content["history"]],
            [Evaluation(*evaluation) for evaluation in content["evaluations"]],
            content["best"].to(params.device),
            content["seconds"],
        )


def random_state() -> list[Tensor]:
    """Return the state of torch's generators, that of the processor first."""
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Set the generators as `random_state` found them."""
    torch.random.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
