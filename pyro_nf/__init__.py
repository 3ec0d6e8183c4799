"""pyro-nf: normalizing-flow guides for Pyro. Swap the guide, fit it, check it.

- `pyro_nf.guides`: `AutoFlow`, `AmortizedFlow`;
- `pyro_nf.inference`: `FlowSVI`; `pyro_nf.inference.elbo`: `ELBO`, also for Pyro's own `SVI`;
- `pyro_nf.diagnostics`: `diagnose`, `to_arviz`, `local_evidence`, `loo`, `calibrate`, plots;
- `pyro_nf.flows`: the flows; `pyro_nf.testing`: `check_flow`, for your own;
- `pyro_nf.models`: models and data to start from;
- `pyro_nf.Arguments`: a model's arguments as one, where a name of theirs is also that of an option.
"""

__version__ = "0.1.0"

from pathlib import Path as _Path

from pyro_nf.interface.arguments import Arguments

__all__ = ["Arguments"]

# In a checkout, guides/ and models/ stand beside this folder, not in it (pyproject.toml maps them when it installs).
# Python started there finds this folder first: let it find the other two as well.
if not (_Path(__file__).parent / "guides").exists():
    __path__.append(str(_Path(__file__).parent.parent))
