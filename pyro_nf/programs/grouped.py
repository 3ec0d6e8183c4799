"""Log densities of sites that look alike, as of the steps of a chain, computed as one batch."""

from collections import defaultdict
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_nf.programs.rows import Row, row_of, rows_together
from pyro_nf.programs.sites import is_data, is_enumerated

# Sites that are worth a batch of their own.
_MIN_ALIKE = 4
# Distributions whose parameters, as they keep them, have the shape of the batch, and then their own.
_PLAIN = (
    dist.Bernoulli,
    dist.Beta,
    dist.Binomial,
    dist.Categorical,
    dist.Exponential,
    dist.Gamma,
    dist.Geometric,
    dist.Laplace,
    dist.LogNormal,
    dist.NegativeBinomial,
    dist.Normal,
    dist.Poisson,
    dist.StudentT,
)


def compute_log_prob(trace: poutine.Trace) -> None:
    """Compute the log densities of a trace's sites as `Trace.compute_log_prob` does, those that look alike together.

    The latter are a `Row` each, which `log_prob_of` returns as a tensor.
    """
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, site in trace.nodes.items():
        summed = is_data(site) or is_enumerated(site)
        if summed and "log_prob" not in site and type(site["fn"]) in _PLAIN:
            value = site["value"]
            if isinstance(value, Tensor):
                alike[_looks(site["fn"], value)].append(name)
    for names in alike.values():
        if len(names) >= _MIN_ALIKE:
            _compute(trace, names)
    trace.compute_log_prob()


def _parameters(fn: Any) -> dict[str, Tensor]:
    own = {name: vars(fn)[name] for name in fn.arg_constraints if name in vars(fn)}
    if "logits" in own:
        own.pop("probs", None)
    return own


def _looks(fn: Any, value: Tensor) -> Any:
    shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in _parameters(fn).items())
    return type(fn), fn.batch_shape, value.shape, value.dtype, shapes


def _compute(trace: poutine.Trace, names: list[str]) -> None:
    sites = [trace.nodes[name] for name in names]
    first = sites[0]["fn"]
    rank = len(first.batch_shape)
    parameters = {name: stacked([_parameters(site["fn"])[name] for site in sites]) for name in _parameters(first)}
    values = stacked([site["value"] for site in sites])
    # A site's number stands to the left of all that its value and its batch have.
    depth = max(rank, values.dim() - 1)
    parameters = {name: _deepened(each, depth - rank) for name, each in parameters.items()}
    values = _deepened(values, depth - (values.dim() - 1))
    log_probs = type(first)(**parameters, validate_args=False).log_prob(values)
    for number, site in enumerate(sites):
        site["unscaled_log_prob"] = site["log_prob"] = Row(log_probs, number if len(log_probs) > 1 else 0)


def log_prob_of(site: dict[str, Any]) -> Tensor:
    """Return a site's log density, its scale and mask applied."""
    value = site["log_prob"]
    if isinstance(value, Row):
        value = scale_and_mask(value.value(), site["scale"], site["mask"])
    return torch.as_tensor(value)


def stacked(tensors: list[Tensor]) -> Tensor:
    """Stack tensors, each but once; what is the same tensor in all of them becomes a single row."""
    different = {id(tensor): tensor for tensor in tensors}
    if len(different) == 1:
        return tensors[0][None]
    if all(hasattr(tensor, "_row") for tensor in different.values()):
        table = rows_together([row_of(tensor) for tensor in different.values()])
    else:
        table = torch.stack(list(different.values()))
    if len(different) == len(tensors):
        return table
    place = {key: number for number, key in enumerate(different)}
    return table.index_select(0, torch.tensor([place[id(tensor)] for tensor in tensors], device=table.device))


def _deepened(tensor: Tensor, number: int) -> Tensor:
    """Put dimensions of size 1 behind the first one."""
    return tensor.reshape(tensor.shape[:1] + (1,) * number + tensor.shape[1:]) if number else tensor
