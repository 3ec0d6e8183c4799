"""Inference: fit a guide."""

from pyro_nf.inference.flow_svi import FlowSVI
from pyro_nf.inference.result import Evaluation, FitResult, Status

__all__ = ["Evaluation", "FitResult", "FlowSVI", "Status"]
