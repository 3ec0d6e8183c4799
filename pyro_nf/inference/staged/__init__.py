"""The fit that needs no tuning: a chain of stages, each measured, as many as the posterior needs.

A stage is a value with a name, a tolerance and two functions: whether it applies, and the fit from what is known so far
(`Stage`). Write one, and put it into a `Plan`: `FlowSVI(model, guide, plan=Plan((Normal(), MyStage())))`.
"""

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.inference.staged.normal import Normal
from pyro_nf.inference.staged.plan import DEFAULT, Plan
from pyro_nf.inference.staged.stage import Fitted, Problem, Stage, StepPlan
from pyro_nf.inference.staged.steps import Steps
from pyro_nf.inference.staged.tails import Tails
from pyro_nf.inference.staged.transport import TransportMap

__all__ = [
    "DEFAULT",
    "Approximation",
    "Fitted",
    "Normal",
    "Plan",
    "Problem",
    "Stage",
    "StepPlan",
    "Steps",
    "Tails",
    "TransportMap",
]
