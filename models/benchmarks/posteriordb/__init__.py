"""Posteriors of real data with reference draws: posteriordb's, as Pyro models."""

from pyro_nf.models.benchmarks.posteriordb.checks import Evidence, importance_evidence, stein_scores
from pyro_nf.models.benchmarks.posteriordb.loader import Posterior, load, names

__all__ = ["Evidence", "Posterior", "importance_evidence", "load", "names", "stein_scores"]
