"""The stages of a fit that needs no tuning, in their order."""

from dataclasses import dataclass

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
    """

    stages: tuple[Stage, ...]
    finish: tuple[Stage, ...] = ()
    max_gap: float = 0.005


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
