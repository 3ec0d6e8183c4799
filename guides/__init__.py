"""Guides: drop-in posteriors for Pyro models."""

from pyro_nf.distributions.mixture import MixtureBase
from pyro_nf.guides.amortized import AmortizedFlow
from pyro_nf.guides.auto_flow import AutoFlow
from pyro_nf.guides.structured import StructuredFlow

__all__ = ["AmortizedFlow", "AutoFlow", "MixtureBase", "StructuredFlow"]
