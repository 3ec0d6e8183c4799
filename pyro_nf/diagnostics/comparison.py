"""Fits of one model side by side."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pandas as pd

from pyro_nf.diagnostics.diagnosis import diagnose


class Fit(Protocol):
    """What `compare` reads of a fit; `FitResult` has it."""

    @property
    def model(self) -> Callable[..., Any]:
        """The model that was fitted."""

    @property
    def guide(self) -> Callable[..., Any]:
        """Its guide."""

    @property
    def args(self) -> tuple[Any, ...] | None:
        """The model's arguments; `None` where they were minibatches."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """Its keyword arguments."""

    @property
    def seconds(self) -> float:
        """Wall time of the fit."""

    @property
    def converged(self) -> bool:
        """Whether it ended by itself."""


def compare(fits: Mapping[str, Fit], **options: Any) -> pd.DataFrame:
    """Diagnose several fits of one model to the same data, the best first.

    The columns are those of `Diagnosis`, and `gap`: the log evidence, as the fit with the most effective draws
    estimates it, less the ELBO, which is the divergence KL(q || p) in nats. Guides that were fitted again since are
    diagnosed as they are now.

    Args:
        fits: Name -> what `FlowSVI(model, guide).run(...)` returned.
        **options: Those of `diagnose`: `num_samples`, `num_sets`, `num_starts`.

    Returns:
        A row for each fit, with `gap`, `elbo`, `log_evidence`, `log_evidence_se`, `khat`, `ess_fraction`, `seconds`,
        `converged`, `verdict` (a string), `reliable` (whether that is "right"), `reasons`.

    Raises:
        ValueError: If there is no fit, or a fit was to minibatches, whose weights mean nothing.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_nf.diagnostics import compare
        >>> from pyro_nf.inference import FlowSVI
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.5, 0.3))
        >>> fit = FlowSVI(model, AutoNormal(model), seed=0, progress=False, max_steps=500).run()
        >>> bool(compare({"mean-field": fit}, num_samples=1000)["gap"]["mean-field"] < 0.01)
        True
    """
    if not fits:
        raise ValueError("fits must hold at least one fit; got none")
    found = {}
    for name, fit in fits.items():
        if fit.args is None:
            raise ValueError(f"fits[{name!r}] must be a fit to all the data; it was one to minibatches, or pickled")
        found[name] = diagnose(fit.model, fit.guide, *fit.args, **fit.kwargs, **options)
    evidence = max(found.values(), key=lambda diagnosis: diagnosis.ess).log_evidence
    rows = {
        name: {
            "gap": evidence - diagnosis.elbo,
            "elbo": diagnosis.elbo,
            "log_evidence": diagnosis.log_evidence,
            "log_evidence_se": diagnosis.log_evidence_se,
            "khat": diagnosis.khat,
            "ess_fraction": diagnosis.ess_fraction,
            "seconds": fits[name].seconds,
            "converged": fits[name].converged,
            "verdict": diagnosis.verdict.value,
            "reliable": diagnosis.reliable,
            "reasons": " ".join(diagnosis.reasons),
        }
        for name, diagnosis in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("gap")
