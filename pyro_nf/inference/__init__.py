"""Inference: fit a guide, in stages or by steps; objectives, also for Pyro's own `SVI`."""

from pyro_nf.inference.elbo import ELBO, IWELBO, KLAnnealedELBO
from pyro_nf.inference.result import Evaluation, FitResult, Status
from pyro_nf.inference.svi import FlowSVI

__all__ = ["ELBO", "IWELBO", "Evaluation", "FitResult", "FlowSVI", "KLAnnealedELBO", "Status"]
