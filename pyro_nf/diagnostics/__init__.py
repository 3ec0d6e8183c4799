"""Diagnostics: can this posterior be trusted, how to correct it, and how to take it to ArviZ."""

from pyro_nf.diagnostics.arviz_bridge import to_arviz
from pyro_nf.diagnostics.calibration import Calibration, calibrate
from pyro_nf.diagnostics.comparison import compare
from pyro_nf.diagnostics.correction import CorrectedPosterior, corrected_posterior
from pyro_nf.diagnostics.diagnosis import Diagnosis, diagnose
from pyro_nf.diagnostics.draw_plots import plot_flow, plot_pairs
from pyro_nf.diagnostics.local import LocalEvidence, local_evidence
from pyro_nf.diagnostics.loo import loo
from pyro_nf.diagnostics.plots import plot_coverage, plot_elbo, plot_weights
from pyro_nf.diagnostics.verdict import Verdict

__all__ = [
    "Calibration",
    "CorrectedPosterior",
    "Diagnosis",
    "LocalEvidence",
    "Verdict",
    "calibrate",
    "compare",
    "corrected_posterior",
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
