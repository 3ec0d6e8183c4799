"""Networks: what flows and encoders take their parameters from."""

from pyro_nf.networks.made import MADE, MaskedLinear
from pyro_nf.networks.mlp import MLP
from pyro_nf.networks.parameters import ContextParameters

__all__ = ["MADE", "MLP", "ContextParameters", "MaskedLinear"]
