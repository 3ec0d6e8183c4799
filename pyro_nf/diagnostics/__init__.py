"""Diagnostics: can this posterior be trusted, how to correct it, and how to take it to ArviZ."""

from pyro_nf.diagnostics.arviz_bridge import to_arviz
from pyro_nf.diagnostics.comparison import compare
from pyro_nf.diagnostics.correction import CorrectedPosterior, corrected_posterior
from pyro_nf.diagnostics.diagnosis import Diagnosis, diagnose
from pyro_nf.diagnostics.local import LocalEvidence, local_evidence

__all__ = [
    "CorrectedPosterior",
    "Diagnosis",
    "LocalEvidence",
    "compare",
    "corrected_posterior",
    "diagnose",
    "local_evidence",
    "to_arviz",
]
