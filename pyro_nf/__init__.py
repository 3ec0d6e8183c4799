"""pyro-nf: normalizing-flow guides for Pyro. Swap the guide, fit it, check it.

- `pyro_nf.guides`: `AutoFlow`, `AmortizedFlow`, `StructuredFlow`;
- `pyro_nf.inference`: `FlowSVI`; `ELBO`, also for Pyro's own `SVI`;
- `pyro_nf.diagnostics`: `diagnose`, `to_arviz`, `local_evidence`, `loo`, `calibrate`, plots;
- `pyro_nf.flows`: the flows; `pyro_nf.testing`: `check_flow`, for your own;
- `pyro_nf.models`: models and data to start from;
- `pyro_nf.Arguments`: a model's arguments as one, where a name of theirs is also that of an option.

What most programs need is to be had from here, and imported when it is first asked for:
`from pyro_nf import AutoFlow, FlowSVI, diagnose, to_arviz`.
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_nf.diagnostics import corrected_posterior, diagnose, to_arviz
    from pyro_nf.guides import AmortizedFlow, AutoFlow, StructuredFlow
    from pyro_nf.inference import ELBO, FlowSVI
    from pyro_nf.interface.arguments import Arguments

__all__ = [
    "ELBO",
    "AmortizedFlow",
    "Arguments",
    "AutoFlow",
    "FlowSVI",
    "StructuredFlow",
    "corrected_posterior",
    "diagnose",
    "to_arviz",
]

_HOMES = {
    "pyro_nf.diagnostics": ("corrected_posterior", "diagnose", "to_arviz"),
    "pyro_nf.guides": ("AmortizedFlow", "AutoFlow", "StructuredFlow"),
    "pyro_nf.inference": ("ELBO", "FlowSVI"),
    "pyro_nf.interface.arguments": ("Arguments",),
}

# In a checkout, guides/ and models/ stand beside this folder, not in it (pyproject.toml maps them when it installs).
# Python started there finds this folder first: let it find the other two as well.
if not (_Path(__file__).parent / "guides").exists():
    __path__.append(str(_Path(__file__).parent.parent))


if not TYPE_CHECKING:  # a type checker would take every name for one of this module's

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(_import_module(home), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
