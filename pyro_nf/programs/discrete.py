"""The posterior of the discrete latents that a density sums out, given the continuous ones."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_nf.programs.contraction import Contraction, aligned, contract, log_sum_exp
from pyro_nf.programs.grouped import compute_log_prob
from pyro_nf.programs.noise import running
from pyro_nf.programs.program import BoundProgram, TracePair
from pyro_nf.programs.sites import is_enumerated, is_latent

Choose = Callable[[Tensor], Tensor]
"""`(log weights, (*batch, K)) -> indices, (*batch,)`."""


def categorical(log_weights: Tensor) -> Tensor:
    """Draw an index of the last dimension, by Gumbel noise."""
    uniform = torch.rand_like(log_weights).clamp(min=torch.finfo(log_weights.dtype).tiny)
    return (log_weights - (-uniform.log()).log()).argmax(-1)


def backward(found: Contraction, choose: Choose = categorical) -> dict[str, Tensor]:
    """Choose a value of each latent that was summed out, given those that were summed out after it.

    Args:
        found: A contraction.
        choose: How: `categorical` draws from the joint posterior.

    Returns:
        Indices of the values in each site's support, `{site: tensor}`, of the shape of the site's plates.
    """
    plates = {symbol: name for name, symbol in found.plates.items()}
    chosen: dict[str, tuple[Tensor, str]] = {}
    for dim, tables, row, dims in reversed(found.tape):
        table = tables[row]
        for other in [d for d in dims if d in chosen]:
            table, dims = _at(table, dims, other, *chosen[other])
        place = dims.index(dim)
        rest = dims.replace(dim, "")
        chosen[dim] = choose(table.movedim(place, -1)), rest
    result = {}
    for name, symbol in found.symbols.items():
        value, dims = chosen[symbol]
        places = sorted(dims, key=lambda d: found.plate_dims[plates[d]])
        value = value.permute([dims.index(d) for d in places])
        depth = max([-found.plate_dims[plates[d]] for d in dims], default=0)
        shape = [1] * depth
        for d, size in zip(places, value.shape, strict=True):
            shape[found.plate_dims[plates[d]]] = size
        result[name] = value.reshape(shape)
    return result


def _at(table: Tensor, dims: str, dim: str, index: Tensor, index_dims: str) -> tuple[Tensor, str]:
    """Return a table at chosen indices along one dimension."""
    rest = dims.replace(dim, "")
    full = aligned(index, index_dims, "".join(d for d in rest if d in index_dims)) if index_dims else index
    shape = [table.shape[dims.index(d)] if d in index_dims else 1 for d in rest]
    expanded = full.reshape(shape).expand([table.shape[dims.index(d)] for d in rest])
    moved = table.movedim(dims.index(dim), -1)
    return moved.gather(-1, expanded[..., None])[..., 0], rest


def draw_discrete(trace: poutine.Trace, choose: Choose = categorical) -> dict[str, Tensor]:
    """Draw the discrete latents of a model's trace from their joint posterior, given everything else in it.

    Args:
        trace: The model's, in which they have all their values.
        choose: How a value is chosen: `categorical` draws.

    Returns:
        Values, `{site: tensor}`, each of the site's own shape.
    """
    return _by_branch(trace, lambda branch: _drawn(branch, choose), choose)


def discrete_probabilities(trace: poutine.Trace) -> dict[str, Tensor]:
    """Return the marginal posterior probability of each value of the discrete latents, given everything else.

    They are the derivatives of the log density by what is added to each value's own log density.

    Args:
        trace: The model's, in which the latents have all their values.

    Returns:
        `{site: (*plates, K)}`, the values in the order of `enumerate_support`.
    """
    return _by_branch(trace, _marginals, None)


def _drawn(trace: poutine.Trace, choose: Choose) -> dict[str, Tensor]:
    with running():
        compute_log_prob(trace)
        found = contract(trace, scaled=False)
        indices = backward(found, choose)
        return {name: _values(trace.nodes[name], index) for name, index in indices.items()}


def _values(site: dict[str, Any], index: Tensor) -> Tensor:
    """Return the values of a site at indices of its support, of its own shape."""
    fn = site["fn"]
    support = fn.enumerate_support(expand=False)
    flat = support.reshape(len(support), *fn.event_shape)
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    depth = max((-frame.dim for frame in plates), default=0)
    shape = [1] * depth
    for frame in plates:
        shape[frame.dim] = frame.size
    index = index.reshape((1,) * (depth - index.dim()) + index.shape).expand(shape)
    values: Tensor = flat[index]
    return values


def _marginals(trace: poutine.Trace) -> dict[str, Tensor]:
    tilts = {}
    for name, site in trace.nodes.items():
        if is_enumerated(site) and site["infer"].get("_enumerate_dim") is not None:
            sizes = [
                frame.size
                for frame in sorted(site["cond_indep_stack"], key=lambda frame: frame.dim or 0)
                if frame.vectorized
            ]
            like = torch.as_tensor(site["value"])
            sizes.append(len(site["fn"].enumerate_support(expand=False)))
            tilts[name] = torch.zeros(sizes, device=like.device, dtype=_dtype(trace))
    with running():
        compute_log_prob(trace)
        function: Callable[[dict[str, Tensor]], Tensor] = lambda tilt: contract(trace, tilt, scaled=False).total()  # noqa: E731
        found: dict[str, Tensor] = torch.func.grad(function)(tilts)
    return found


def _dtype(trace: poutine.Trace) -> torch.dtype:
    found = [site["log_prob"].dtype for site in trace.nodes.values() if hasattr(site.get("log_prob"), "dtype")]
    return found[0] if found else torch.get_default_dtype()


def _by_branch(
    trace: poutine.Trace, function: Callable[[poutine.Trace], dict[str, Tensor]], choose: Choose | None
) -> dict[str, Tensor]:
    """Do something in each of a trace's branches, and choose one of the results, or take their mean."""
    branches = [trace, *getattr(trace, "branches", [])]
    results = []
    for branch in branches:
        fixed = {
            name: torch.as_tensor(site["value"])
            for name, site in branch.nodes.items()
            if is_enumerated(site) and site["infer"].get("_enumerate_dim") is None
        }
        summed = any(is_enumerated(site) and name not in fixed for name, site in branch.nodes.items())
        result = function(branch) if summed else {}
        for name, value in fixed.items():
            support = branch.nodes[name]["fn"].enumerate_support(expand=False)
            here = (support == value).reshape(len(support), -1).all(-1)
            result[name] = value if choose is not None else here.to(_dtype(branch))
        results.append(result)
    if len(branches) == 1:
        return results[0]
    weights = []
    for branch in branches:
        with running():
            compute_log_prob(branch)
            weights.append(contract(branch, scaled=False).total())
    log_weights = torch.stack(weights)
    stacked = {name: torch.stack([result[name] for result in results]) for name in results[0]}
    if choose is not None:
        chosen = choose(log_weights)
        return {name: value.index_select(0, chosen.reshape(1))[0] for name, value in stacked.items()}
    shares = (log_weights - log_sum_exp(log_weights, 0)).exp()
    return {name: torch.tensordot(shares, value, 1) for name, value in stacked.items()}


def with_discrete(latents: poutine.Trace, discrete: dict[str, Tensor]) -> poutine.Trace:
    """Return a guide's trace with values of the discrete latents beside its own, for a model to be replayed on."""
    whole = latents.copy()
    for name, value in discrete.items():
        whole.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={}, fn=None)
    return whole


def sample_all(program: BoundProgram, num_samples: int) -> dict[str, Tensor]:
    """Draw all latents of a model: the guide's, and the discrete ones given these, `{site: (num_samples, *shape)}`."""

    def extract(pair: TracePair) -> dict[str, Tensor]:
        own = {name: site["value"] for name, site in pair.model.nodes.items() if is_latent(site)}
        return own | draw_discrete(pair.model)

    return program.vmap_in_chunks(extract, num_samples)


def mean_probabilities(program: BoundProgram, num_samples: int) -> dict[str, Tensor]:
    """Return the marginal probabilities of the discrete latents' values, averaged over draws of the guide."""
    found = program.vmap_in_chunks(lambda pair: discrete_probabilities(pair.model), num_samples)
    return {name: value.mean(0) for name, value in found.items()}
