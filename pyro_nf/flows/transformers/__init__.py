"""Transformers: invertible maps of one coordinate, whose parameters a coupling or autoregressive flow supplies.

A transformer is a stateless object with `num_params` and two methods, and with all parameters 0 it is the identity. A
new one is one file here, and works in both wirings.
"""

from pyro_nf.flows.transformers.affine import Additive, Affine, Gated
from pyro_nf.flows.transformers.base import Transformer
from pyro_nf.flows.transformers.sigmoidal import DeepSigmoidal, LogisticMixture
from pyro_nf.flows.transformers.spline import RationalQuadraticSpline

__all__ = [
    "Additive",
    "Affine",
    "DeepSigmoidal",
    "Gated",
    "LogisticMixture",
    "RationalQuadraticSpline",
    "Transformer",
]
