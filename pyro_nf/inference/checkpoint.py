"""A fit on its way, and the file that keeps it."""

import math
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_nf.inference.fingerprint import Identity
from pyro_nf.inference.optim import State
from pyro_nf.inference.process_group import ProcessGroup
from pyro_nf.inference.result import Evaluation
from pyro_nf.inference.schedule import PlateauSchedule
from pyro_nf.interface import untrusted

# The largest checkpoint that is read: 1 GiB, for histories, and so many tensors of the parameters' size.
_MAX_BYTES, _MAX_COPIES = 2**30, 32


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

    def log_weight_std(self, num_particles: int) -> float:
        """Standard deviation of the draws of a step about their block's mean, in the block where it was smallest."""
        blocks = [float(elbos.std()) for elbos in self.history if len(elbos) > 1]
        return math.sqrt(num_particles) * min([value for value in blocks if math.isfinite(value)], default=math.inf)

    def observe(self, evaluation: Evaluation, params: Tensor) -> None:
        """Note an evaluation, and keep its parameters if it is the best."""
        self.evaluations.append(evaluation)
        if self.best_evaluation is evaluation:
            self.best = params

    def save(self, path: Path, ranks: ProcessGroup, identity: Identity) -> None:
        """Write all of it, what it is of, and each process's random state, to a file that is whole or the old one.

        Every process calls this; the first one writes.
        """
        random = ranks.gather(random_state())
        if ranks.index > 0:
            return
        content = {
            "fingerprint": identity.fingerprint(),
            "fixed_tensors": identity.fixed_tensors(),
            "state": self.state._asdict(),
            "schedule": self.schedule.state(),
            "history": self.history,
            "evaluations": [tuple(evaluation) for evaluation in self.evaluations],
            "best": self.best,
            "seconds": self.seconds,
            "random": random,
        }
        untrusted.replace(path, lambda file: torch.save(content, file))

    @classmethod
    def load(
        cls, path: Path, params: Tensor, ranks: ProcessGroup, identity: Identity
    ) -> tuple["Progress", list[Tensor]]:
        """Read on the first process a file that `save` wrote; return what it holds, and this process's random state.

        Model and guide take over its fixed tensors.

        Raises:
            ValueError: If it is no such file, or belongs to another fit, to another number of parameters than `params`
                has, or to another number of processes.
        """
        content: dict[str, Any] = ranks.from_first(lambda: _read(path, params))
        if "fingerprint" not in content:
            raise ValueError(
                f"checkpoint {str(path)!r} was written by a version of pyro-nf that did not note of what model, data "
                "and options it is: run the fit anew"
            )
        with untrusted.damaged(str(path)):
            tensors = {name: content["state"][name].to(params.device) for name in State._fields}
            size, random = len(tensors["params"]), content["random"]
            fit = cls(
                State(**tensors),
                PlateauSchedule.from_state(content["schedule"]),
                [elbos.to(params.device) for elbos in content["history"]],
                [Evaluation(*evaluation) for evaluation in content["evaluations"]],
                content["best"].to(params.device),
                content["seconds"],
            )
        if size != len(params):
            raise ValueError(f"checkpoint {str(path)!r} holds {size} parameters; model and guide have {len(params)}")
        if len(random) != ranks.size:
            raise ValueError(
                f"checkpoint {str(path)!r} is of {len(random)} processes, each with its random state; "
                f"there are {ranks.size}"
            )
        ranks.same(lambda: identity.check(str(path), content["fingerprint"], content["fixed_tensors"]))
        return fit, random[ranks.index]


def _read(path: Path, params: Tensor) -> dict[str, Any]:
    """Read tensors and plain values, and nothing that could run or unpack to more than the file's own size."""
    with untrusted.open_regular(path, _MAX_BYTES + _MAX_COPIES * params.nbytes) as file:
        with untrusted.damaged(str(path)):
            members = zipfile.ZipFile(file).infolist()
            # As `torch.save` writes them: none is compressed, and so none lies about its size.
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                raise ValueError("its parts are compressed, which those of a checkpoint are not")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError(f"a {type(content).__name__} is no checkpoint")
        return content


def random_state() -> list[Tensor]:
    """Return the state of torch's generators, that of the processor first."""
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Set the generators as `random_state` found them."""
    torch.random.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
