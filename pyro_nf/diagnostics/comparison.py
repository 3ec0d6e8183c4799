"""Fits of one model side by side."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.diagnostics.diagnosis import diagnose
from pyro_nf.diagnostics.weights import require_whole_data
from pyro_nf.interface.arguments import Arguments, check_has
from pyro_nf.programs.matching import require_weights
from pyro_nf.programs.program import Program
from pyro_nf.programs.sites import is_data, is_latent
from pyro_nf.programs.traces import log_prob_sum, run_model

# Draws at which the densities of two models are compared, and by how much they may differ by rounding alone.
_NUM_DRAWS, _ROUNDING = 3, 1e-4


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
        **options: Those of `diagnose`: `num_samples`, `num_sets`, `num_starts`, `progress`.

    Returns:
        A row for each fit, with `gap`, `elbo`, `log_evidence`, `log_evidence_se`, `khat`, `ess_fraction`, `seconds`,
        `converged`, `verdict` (a string), `reliable` (whether that is "right"), `reasons`.

    Raises:
        ValueError: If there is no fit, a fit was to minibatches, whose weights mean nothing, or fits are not of one
            model and the same data: their latents, data or densities differ. (Another model has other evidence: compare
            such by the `log_evidence` of `diagnose`, or by `loo`.)

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
    check_has("fits", fits, ("items", "values"), "a dictionary of names and results of FlowSVI.run")
    if not fits:
        raise ValueError("fits must hold at least one fit; got none")
    for name, fit in fits.items():
        if fit.args is None:
            raise ValueError(f"fits[{name!r}] must be a fit to all the data; it was one to minibatches, or pickled")
    first, *others = fits
    for name in others:
        difference = _difference(fits[first], fits[name])
        if difference:
            raise ValueError(
                f"fits[{name!r}] must be of the same model and data as fits[{first!r}], for their gaps are to one "
                f"evidence; {difference}"
            )
    found = {
        name: diagnose(fit.model, fit.guide, Arguments(*(fit.args or ()), **fit.kwargs), **options)
        for name, fit in fits.items()
    }
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


def _difference(first: Fit, other: Fit) -> str:
    """Say in what two fits' joint densities differ, which are compared as functions; nothing if in nothing."""
    given = [(fit.args or (), fit.kwargs) for fit in (first, other)]
    if first.model == other.model and _are_same(*given):
        return ""
    nodes = []
    for fit, (args, kwargs) in zip((first, other), given, strict=True):
        program = Program(fit.model, fit.guide).bind(*args, **kwargs)
        require_weights(program)
        require_whole_data(program)
        nodes.append(program.spec.traces.model.nodes)
    return _of_sites(*nodes) or _of_densities(first, other)


def _are_same(one: Any, other: Any) -> bool:
    """Whether arguments are the same objects, all through."""
    if isinstance(one, (tuple, list)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_are_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_same(one[key], other[key]) for key in one)
    return one is other


def _of_sites(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Say in which latents, or in which data, two runs of models differ."""
    for what, kind in (("latent", is_latent), ("observed", is_data)):
        one, two = ({name: site for name, site in nodes.items() if kind(site)} for nodes in (first, other))
        if one.keys() != two.keys():
            names = (", ".join(map(repr, each)) or "none" for each in (two, one))
            return "its {} sites are {}, and there {}".format(what, *names)
        for name in one:
            value, there = (torch.as_tensor(each[name]["value"]).detach().cpu() for each in (two, one))
            if value.shape != there.shape:
                return f"its {what} site {name!r} has shape {tuple(value.shape)}, and there {tuple(there.shape)}"
            changed = _num_changed(value, there) if kind is is_data else 0
            if changed:
                return f"its data at site {name!r} differ in {changed} of {value.numel()} numbers"
    return ""


def _num_changed(one: Tensor, other: Tensor) -> int:
    """Return how many numbers differ, in the lower precision of the two."""
    if one.dtype != other.dtype:
        one, other = one.float(), other.float()
    return int(((one != other) & ~(one.isnan() & other.isnan())).sum())


def _of_densities(first: Fit, other: Fit) -> str:
    """Say by how much the densities differ at the same draws, if by more than rounding."""
    with torch.no_grad(), poutine.block():
        for _ in range(_NUM_DRAWS):
            draw = poutine.trace(first.guide).get_trace(*(first.args or ()), **first.kwargs)
            one, two = (_log_density(fit, draw) for fit in (first, other))
            if one != two and not (two - one).abs() <= _ROUNDING * max(1.0, float(one.abs())):
                return f"at the same draw its log density is {float(two):.6g}, and there {float(one):.6g}"
    return ""


def _log_density(fit: Fit, draw: poutine.Trace) -> Tensor:
    return log_prob_sum(run_model(partial(fit.model, *(fit.args or ()), **fit.kwargs), draw)).double().cpu()
