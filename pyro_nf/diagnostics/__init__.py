"""Diagnostics: can this posterior be trusted, and how to take it to ArviZ."""

from pyro_nf.diagnostics.arviz_bridge import to_arviz
from pyro_nf.diagnostics.calibration import Calibration, calibrate
from pyro_nf.diagnostics.local import LocalEvidence, local_evidence
from pyro_nf.diagnostics.loo import loo
from pyro_nf.diagnostics.plots import plot_coverage, plot_elbo, plot_flow, plot_pairs, plot_weights
from pyro_nf.diagnostics.weights import Diagnosis, diagnose

__all__ = [
    "Calibration",
    "Diagnosis",
    "LocalEvidence",
    "calibrate",
    "diagnose",
    "local_evidence",
    "loo",
    "plot_coverage",
    "plot_elbo",
    "plot_flow",
    "plot_pairs",
    "plot_weights",
    "to_arviz",
]
