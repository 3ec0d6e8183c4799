"""Observed values against their supports, and parameters against their constraints, before a fit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.programs.sites import is_data, is_latent
from pyro_nf.programs.validity import bounds, demand, parameters, seen, support_of, unwrap, value_fault


def check_data(trace: poutine.Trace, others: Callable[[], Iterable[poutine.Trace]] | None = None) -> None:
    """Check the observed values of a model's trace, made under `noise.running`, against their supports.

    Args:
        trace: The model's trace.
        others: Return traces on other draws: they tell a support that depends on latents, which values may leave for
            some draws, from one that is fixed. Without them only supports of fixed numbers count.

    Raises:
        ValueError: If values are NaN, infinite, or outside the support, and not masked.
    """
    for name, site in trace.nodes.items():
        fault = value_fault(site["fn"], site["value"], site["mask"]) if is_data(site) else None
        if fault is None or (fault.bounds and (others is None or _moves(name, fault.bounds, others()))):
            continue
        first = "" if fault.first != fault.first else f" (the first is {_short(fault.first)})"
        remedy = "mend or drop them, or hide them with poutine.mask"
        raise ValueError(f"the data of site {name!r} hold {fault.what}{first}; {remedy}")


def check_parameters(trace: poutine.Trace, others: Callable[[], Iterable[poutine.Trace]]) -> None:
    """Check the parameters of a model's distributions that are NaN or outside their constraint whatever the draw.

    Raises:
        ValueError: If there are entries that are the same on all draws, and wrong; all NaN is no such case, for a few
            draws near the guide's start do not tell.
    """
    for name, site in trace.nodes.items():
        if not (is_latent(site) or is_data(site)):
            continue
        for number, parameter in enumerate(parameters(site["fn"], site["mask"])):
            nan = parameter.is_nan()
            wrong = nan if bool(nan.any()) else torch.broadcast_tensors(~parameter.holds(), nan)[0]
            if bool(nan.all()) or not bool(wrong.any()):
                continue
            for other in others():
                there = other.nodes[name]
                value = [*parameters(there["fn"], there["mask"])][number].value
                equal = torch.isclose(value, parameter.value, 0.0, 0.0, equal_nan=True)
                wrong = wrong & ~seen(~equal, parameter.constraint.event_dim, None)
            if bool(wrong.any()):
                how = "NaN" if bool(nan.any()) else f"not {demand(parameter.constraint)}"
                raise ValueError(
                    f"site {name!r}: its {parameter.name} is {how} for {int(wrong.sum())} of {wrong.numel()} entries, "
                    "whatever the draw; look at what the model computes it from: covariates that are NaN, say"
                )


def _moves(name: str, limits: tuple[Tensor, ...], others: Iterable[poutine.Trace]) -> bool:
    """Whether the bounds of a site's support are others on other draws."""
    for trace in others:
        support = support_of(unwrap(trace.nodes[name]["fn"], None)[0])
        elsewhere = () if support is None else bounds(support)
        if len(elsewhere) != len(limits) or not all(map(torch.equal, elsewhere, limits)):
            return True
    return False


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
