"""Distributions made of a base and a flow, sampled and scored in one pass."""

from pyro_nf.distributions.flow import FlowDistribution, ScoredDraw

__all__ = ["FlowDistribution", "ScoredDraw"]
