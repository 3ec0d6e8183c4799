"""The stages of a fit that needs no tuning, in their order."""

from dataclasses import dataclass
from typing import Any

from pyro_nf.inference.staged.normal import Normal
from pyro_nf.inference.staged.stage import Stage
from pyro_nf.inference.staged.steps import Steps
from pyro_nf.inference.staged.tails import Tails
from pyro_nf.inference.staged.transport import TransportMap


@dataclass(frozen=True)
class Plan:
    """Stages one after another until one is good enough, and then those that finish the best of them.

    Attributes:
        stages: Each begins from the best so far.
        finish: Run on the best, unless something ended the fit early.
        max_gap: Divergence from the posterior, in nats, below which the whole fit has converged.

    Raises:
        ValueError: If these are no stages, or there is none.
    """

    stages: tuple[Stage, ...]
    finish: tuple[Stage, ...] = ()
    max_gap: float = 0.005

    def __post_init__(self) -> None:
        for name in ("stages", "finish"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not all(map(_is_stage, given)):
                raise ValueError(
                    f"{name} must be a tuple of stages, objects with name, max_gap, num_points, applies and fit; got "
                    f"{given!r}"
                )
        if not self.stages:
            raise ValueError("stages must hold at least one stage, such as Normal(); got none")


def _is_stage(stage: Any) -> bool:
    return all(hasattr(stage, part) for part in ("name", "max_gap")) and all(
        callable(getattr(stage, part, None)) for part in ("num_points", "applies", "fit")
    )


DEFAULT = Plan(
    stages=(
        Normal(),
        TransportMap(),
        Steps("affine", 0.03, 400, 50, has_network=False, graph="affine"),
        Steps("flow", 0.006, 2000, 100, whitens=True),
        Steps("flow, longer", 0.003, 4000, 200),
    ),
    finish=(Tails(),),
)
