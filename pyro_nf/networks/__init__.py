"""Networks: what flows and encoders take their parameters from."""

from pyro_nf.networks.convolutional import ConvNet
from pyro_nf.networks.gated import GatedLinear, GatedMLP
from pyro_nf.networks.images import ImageDecoder, ImageEncoder
from pyro_nf.networks.made import MADE, MaskedLinear
from pyro_nf.networks.mlp import MLP
from pyro_nf.networks.order_agnostic import OrderAgnosticMADE
from pyro_nf.networks.parameters import ContextParameters, freeze, start_at_zero
from pyro_nf.networks.switch import Switch

__all__ = [
    "MADE",
    "MLP",
    "ContextParameters",
    "ConvNet",
    "GatedLinear",
    "GatedMLP",
    "ImageDecoder",
    "ImageEncoder",
    "MaskedLinear",
    "OrderAgnosticMADE",
    "Switch",
    "freeze",
    "start_at_zero",
]
