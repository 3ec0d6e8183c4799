"""What a fit by steps is asked to do, as one value."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyro_nf.inference.elbo import ELBO
from pyro_nf.inference.watch import Callback
from pyro_nf.interface.arguments import check_choice, check_number, check_whole_number

# Options that a checkpoint is of: with others, its fit would have been another one.
_OF_A_CHECKPOINT = ("num_particles", "learning_rate", "weight_decay", "eval_every", "clip_norm", "seed")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of a fit by steps of Adam, as `FlowSVI` documents them.

    Raises:
        ValueError: If an option is not of its kind, or out of range; the sentence says what is accepted.
    """

    objective: ELBO
    num_particles: int
    learning_rate: float | None
    weight_decay: float
    max_steps: int
    eval_every: int
    eval_particles: int
    clip_norm: float
    num_starts: int
    compile: bool | Literal["auto"]
    checkpoint: Path | None
    max_seconds: float | None
    seed: int | None

    def __post_init__(self) -> None:
        for name in ("num_particles", "max_steps", "eval_every", "eval_particles"):
            self._set(name, check_whole_number(name, getattr(self, name)))
        self._set("num_starts", check_whole_number("num_starts", self.num_starts, least=0))
        self._set("weight_decay", check_number("weight_decay", self.weight_decay, least=0))
        self._set("clip_norm", check_number("clip_norm", self.clip_norm, above=0))
        self._set("compile", check_choice("compile", self.compile, (True, False, "auto")))
        for name in ("learning_rate", "max_seconds"):
            value = getattr(self, name)
            self._set(name, None if value is None else check_number(name, value, above=0))
        self._set("seed", None if self.seed is None else check_whole_number("seed", self.seed, least=0))
        self._set("objective", _checked_objective(self.objective))
        self._set("checkpoint", None if self.checkpoint is None else _checked_path(self.checkpoint))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def of_a_checkpoint(self) -> dict[str, Any]:
        """Return the options that a checkpoint is of."""
        return {name: getattr(self, name) for name in _OF_A_CHECKPOINT}


def _checked_objective(objective: Any) -> ELBO:
    if not isinstance(objective, ELBO):
        raise ValueError(
            "objective must be one of pyro_nf.inference.elbo, such as ELBO(), or None for that; got "
            f"{type(objective).__module__}.{type(objective).__qualname__}"
        )
    return objective


def _checked_path(checkpoint: Any) -> Path:
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(f"checkpoint must be a file's path, or None; got {checkpoint!r}")
    path = Path(os.fsdecode(checkpoint))
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint must be a path in a folder that exists; got {str(path)!r}: make the folder first")
    if path.is_dir():
        raise ValueError(f"checkpoint must be a file's path; got the folder {str(path)!r}: name a file in it")
    return path


def checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return callbacks as a tuple, once it is known that they can be called."""
    given = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    if not isinstance(callbacks, Iterable) or not all(map(callable, given)):
        raise ValueError(f"callbacks must be a list of functions of an Evaluation; got {callbacks!r}")
    return given
