"""Diagnostics: can this posterior be trusted, and how to take it to ArviZ."""

from pyro_nf.diagnostics.arviz_bridge import to_arviz
from pyro_nf.diagnostics.local import LocalEvidence, local_evidence
from pyro_nf.diagnostics.weights import Diagnosis, diagnose

__all__ = ["Diagnosis", "LocalEvidence", "diagnose", "local_evidence", "to_arviz"]
