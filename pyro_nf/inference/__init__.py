"""Inference: fit a guide."""

from pyro_nf.inference.result import Evaluation, FitResult, Status
from pyro_nf.inference.svi import FlowSVI

__all__ = ["Evaluation", "FitResult", "FlowSVI", "Status"]
