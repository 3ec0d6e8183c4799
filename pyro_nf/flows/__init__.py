"""Flows: invertible maps with trainable parameters. Nothing in here knows about inference."""

from pyro_nf.flows import stacks
from pyro_nf.flows.affine import ElementwiseAffine, LowerTriangularAffine
from pyro_nf.flows.autoregressive import Autoregressive
from pyro_nf.flows.base import Flow, Inverse, Sequential
from pyro_nf.flows.coupling import Coupling
from pyro_nf.flows.permutation import Permutation
from pyro_nf.flows.planar import Planar
from pyro_nf.flows.radial import Radial
from pyro_nf.flows.transformers import Additive, Affine, Gated, Transformer

__all__ = [
    "Additive",
    "Affine",
    "Autoregressive",
    "Coupling",
    "ElementwiseAffine",
    "Flow",
    "Gated",
    "Inverse",
    "LowerTriangularAffine",
    "Permutation",
    "Planar",
    "Radial",
    "Sequential",
    "Transformer",
    "stacks",
]
