"""Log densities of traces: which draws have one, and why the others have none."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_nf.compiler.functorch import in_vmap, is_batched
from pyro_nf.programs.contraction import contract, log_sum_exp
from pyro_nf.programs.enumeration import NOTHING, Enumeration, run_enumerated
from pyro_nf.programs.grouped import compute_log_prob
from pyro_nf.programs.noise import running
from pyro_nf.programs.sites import is_data, is_enumerated, is_latent, subsample_scale
from pyro_nf.programs.validity import bounds, can_fail, demand, holds, is_checked, parameters, seen, support_of, unwrap


def run_model(
    model: Callable[[], Any], latents: poutine.Trace | None, enumeration: Enumeration = NOTHING
) -> poutine.Trace:
    """Run a model, which has its arguments, on the latents of a trace; return its trace.

    Args:
        model: The model.
        latents: Their trace; `None` where a handler around the call gives them values.
        enumeration: The discrete latents that are summed out, which have all their values in the trace. Those that take
            one value a run make several traces, the others being the first one's `branches`.
    """
    with running():
        first, *others = (
            fill_masked(run_enumerated(model, latents, enumeration, fixed)) for fixed in enumeration.branches()
        )
    first.branches = others
    return first


def fill_masked(trace: poutine.Trace) -> poutine.Trace:
    """Put values of the support where a model's data are masked and have no density, and return the trace."""
    for site in trace.nodes.values():
        if is_data(site) and isinstance(site["value"], Tensor):
            leaf, mask = unwrap(site["fn"], site["mask"])
            if isinstance(mask, Tensor):
                site["value"] = _filled(site["value"], mask, leaf)
    return trace


def in_words(shares: dict[str, float]) -> str:
    """Say why draws have no density, as `Program.without_density` found it: the two most frequent reasons."""
    if not shares:
        return "a few of very many draws have no density under the model"
    parts = [f"{reason} in {_percent(share)} of the draws" for reason, share in itertools.islice(shares.items(), 2)]
    return f"draws have no density: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def log_prob_sum(trace: poutine.Trace, has_coordinates: bool = False) -> Tensor:
    """Return a model's log density, all scales and masks applied, as a tensor; each site keeps its `log_prob`.

    It is minus infinity for a draw for which a distribution's parameter leaves its constraint, or a value its support:
    formulas give some number there.

    Args:
        trace: The model's.
        has_coordinates: Whether the latents come from the real line, and so are inside their supports.
    """
    if branches := getattr(trace, "branches", []):
        first, *others = (_summed(each, has_coordinates) for each in (trace, *branches))
        return log_sum_exp(torch.stack([first, *others]), 0)
    return _summed(trace, has_coordinates)


def _summed(trace: poutine.Trace, has_coordinates: bool) -> Tensor:
    """`log_prob_sum` of a single trace."""
    shared = getattr(trace, "shared", None) or nullcontext()
    with running(), shared:
        flags = [inside for *_, inside in _validity(trace, latents=not has_coordinates)]
    usable = list({id(flag): flag for flag in flags}.values())  # the steps of a chain share many
    if any(map(is_enumerated, trace.nodes.values())):
        with running():
            with shared:
                compute_log_prob(trace)
            total = contract(trace).total()
    else:
        total = guide_log_prob(trace)
    if not usable:
        return total
    return torch.where(functools.reduce(torch.logical_and, usable), total, -math.inf)


def guide_log_prob(trace: poutine.Trace) -> Tensor:
    """Return a guide's log density as a tensor; each site keeps its `log_prob`."""
    with running():
        trace.compute_log_prob()
    return torch.as_tensor(trace.log_prob_sum())


def _validity(trace: poutine.Trace, latents: bool, everything: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what can leave its constraint: the site, what is wrong then, and whether this draw's is inside, `()`.

    Args:
        trace: The model's.
        latents: Whether to look at the values of latents, too.
        everything: Whether to look for NaN, and at what is the same for all draws.
    """
    trained = any(site["type"] == "param" for site in trace.nodes.values())
    in_batch = in_vmap()

    def varies(tensor: Tensor) -> bool:
        """Whether a tensor may depend on the draw: where draws are batched, what is not in the batch does not."""
        return everything or trained or not in_batch or is_batched(tensor)

    for name, site in trace.nodes.items():
        if not (is_latent(site) or is_data(site)):
            continue
        leaf, mask = unwrap(site["fn"], site["mask"])
        for parameter in parameters(site["fn"], site["mask"]):
            if everything:
                yield name, f"its {parameter.name} is NaN", _all(~parameter.is_nan())
            if can_fail(parameter.constraint) and varies(parameter.value):
                yield name, f"its {parameter.name} is not {demand(parameter.constraint)}", _all(parameter.holds())
        support = support_of(leaf)
        if mask is False or support is None or not can_fail(support) or not is_checked(site["fn"]):
            continue
        if any(map(varies, bounds(support))) or (latents and is_latent(site) and varies(site["value"])):
            inside = holds(support, site["value"], closed=True)
            inside = inside | ~mask if isinstance(mask, Tensor) else inside
            yield name, f"its value is outside the support of {type(leaf).__name__}", _all(inside)


def obstacles(trace: poutine.Trace) -> dict[str, Tensor]:
    """Return for each reason why the model has no density at a draw whether it is the first of them, `()`."""
    found: dict[str, Tensor] = {}
    with running():
        reasons = [*_validity(trace, latents=True, everything=True)]
    guide_log_prob(trace)
    so_far = torch.tensor(True)
    summed = any(map(is_enumerated, trace.nodes.values()))
    for name, site in trace.nodes.items():
        if is_latent(site) or is_data(site):
            own = [(what, inside) for place, what, inside in reasons if place == name]
            if not summed or is_latent(site):  # data may have no density under some of the discrete latents' values
                own.append(("its density is not finite", torch.as_tensor(site["log_prob_sum"]).isfinite()))
            for what, inside in own:
                found[f"site {name!r}: {what}"] = so_far & ~inside
                so_far = so_far & inside
    return found


def _all(flags: Tensor) -> Tensor:
    return flags.all() if flags.dim() else flags


def local_log_prob(trace: poutine.Trace) -> Tensor:
    """Return a trace's log density for each element of its one plate, `(size,)`, without a subsample's scale."""
    guide_log_prob(trace)
    if any(map(is_enumerated, trace.nodes.values())):
        with running():
            terms = contract(trace).terms
        return torch.stack([term.value.reshape(-1) for term in terms]).sum(0)
    total = torch.zeros(())
    for site in trace.nodes.values():
        if is_latent(site) or is_data(site):
            (frame,) = site["cond_indep_stack"]
            # One plate: one entry a datum, wherever its dimension is.
            total = total + site["log_prob"].reshape(-1) / subsample_scale(frame)
    return total


def _filled(value: Tensor, mask: Tensor, leaf: Any) -> Tensor:
    """Put some value of the support where data have no density and are masked: its gradient would still be NaN."""
    support = support_of(leaf)
    if support is None:
        return value
    broken = ~value.isfinite()
    if not bounds(support):
        broken = broken | ~_spread(support.check(value), value)
    missing = (seen(broken, leaf.event_dim, None) & ~mask)[(...,) + (None,) * leaf.event_dim]
    if support.is_discrete:  # 0 is a count, a class and a failure
        return torch.where(missing, torch.zeros_like(value), value)
    to_support = biject_to(support)
    return torch.where(missing, to_support(value.new_zeros(to_support.inverse_shape(value.shape))), value)


def _spread(entries: Tensor, value: Tensor) -> Tensor:
    """Repeat what is said of vectors or matrices for each of their numbers."""
    return entries[(...,) + (None,) * (value.dim() - entries.dim())].expand_as(value)
