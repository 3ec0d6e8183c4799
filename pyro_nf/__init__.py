"""pyro-nf: normalizing-flow guides for Pyro. Swap the guide, fit it, check it.

- `pyro_nf.guides`: `AutoFlow`, `AmortizedFlow`;
- `pyro_nf.inference`: `FlowSVI`; `pyro_nf.objectives`: `ELBO`, also for Pyro's own `SVI`;
- `pyro_nf.diagnostics`: `diagnose`, `to_arviz`, `local_evidence`;
- `pyro_nf.flows`: the flows; `pyro_nf.testing`: `check_flow`, for your own;
- `pyro_nf.models`: models and data to start from.
"""

__version__ = "0.1.0"
