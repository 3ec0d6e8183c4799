"""Flows: invertible maps with trainable parameters. Nothing in here knows about inference."""

from typing import TYPE_CHECKING

from pyro_nf.flows import stacks
from pyro_nf.flows.affine import ElementwiseAffine, LowerTriangularAffine
from pyro_nf.flows.autoregressive import Autoregressive
from pyro_nf.flows.base import Flow, Inverse, Sequential
from pyro_nf.flows.block_autoregressive import BlockAutoregressive
from pyro_nf.flows.convolution import CircularConvolution, ConvolutionCoupling, SymmetricConvolution
from pyro_nf.flows.coupling import Coupling
from pyro_nf.flows.elementwise import LeakyReLU, PReLU, SLog
from pyro_nf.flows.householder import Householder
from pyro_nf.flows.images import Channelwise, ImageCoupling, Split, Squeezed, multiscale
from pyro_nf.flows.linear import Diagonal, LULinear, Rotation, random_orthogonal
from pyro_nf.flows.linear_iaf import LinearIAF
from pyro_nf.flows.normalization import ActNorm, BatchNorm, initialize_actnorm, set_batchnorm_statistics
from pyro_nf.flows.paced import Paced, unpaced
from pyro_nf.flows.permutation import Permutation
from pyro_nf.flows.planar import Planar
from pyro_nf.flows.radial import Radial
from pyro_nf.flows.sylvester import Sylvester
from pyro_nf.flows.transformers import (
    Additive,
    Affine,
    DeepSigmoidal,
    Gated,
    LogisticMixture,
    RationalQuadraticSpline,
    Transformer,
)
from pyro_nf.flows.triangular import QuadraticTriangularMap
from pyro_nf.flows.whitened import WhitenedAffine
from pyro_nf.interface.renamed import renamed

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "BlockAutoregressive",
    "Channelwise",
    "CircularConvolution",
    "ConvolutionCoupling",
    "Coupling",
    "DeepSigmoidal",
    "Diagonal",
    "ElementwiseAffine",
    "Flow",
    "Gated",
    "Householder",
    "ImageCoupling",
    "Inverse",
    "LULinear",
    "LeakyReLU",
    "LinearIAF",
    "LogisticMixture",
    "LowerTriangularAffine",
    "PReLU",
    "Paced",
    "Permutation",
    "Planar",
    "QuadraticTriangularMap",
    "Radial",
    "RationalQuadraticSpline",
    "Rotation",
    "SLog",
    "Sequential",
    "Split",
    "Squeezed",
    "Sylvester",
    "SymmetricConvolution",
    "Transformer",
    "WhitenedAffine",
    "initialize_actnorm",
    "multiscale",
    "random_orthogonal",
    "set_batchnorm_statistics",
    "stacks",
    "unpaced",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "Triangular": "QuadraticTriangularMap",
            "initialize": "initialize_actnorm",
            "set_statistics": "set_batchnorm_statistics",
        },
    )
