"""A fitted guide as ArviZ data: InferenceData in ArviZ 0.x, DataTree in 1.x."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pyro_nf.diagnostics.diagnosis import judge
from pyro_nf.diagnostics.weights import log_densities, pareto_smooth, require_whole_data, summarise
from pyro_nf.tracing import Particle, Program, is_data, is_deterministic, is_latent

Array = npt.NDArray[Any]


def to_arviz(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 4000, **kwargs: Any
) -> Any:
    """Draw from a fitted guide and return ArviZ's data structure.

    The draws are independent: they form one chain, for which R-hat says nothing. Groups:

    - `posterior`: latent and deterministic sites, `(chain=1, draw, *shape)`; the dimensions of a plate bear its name;
    - `log_likelihood`: of every observed site, pointwise;
    - `observed_data`: the observed sites;
    - `sample_stats`: `log_p` and `log_q` of each draw, `log_weight` (Pareto-smoothed, normalised: exponentials sum to
      1), and as attributes the diagnosis of these draws: `khat`, `ess`, `elbo`, `log_evidence`, `reliable`, ...

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled.
        num_samples: Draws.
        **kwargs: The model's keyword arguments.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x).

    Raises:
        ValueError: If a plate is subsampled, or `num_samples` is less than 100.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import to_arviz
        >>> from pyro_nf.guides import AutoFlow
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("unit", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> data = to_arviz(model, AutoFlow(model), torch.zeros(3), num_samples=200)
        >>> dict(data["log_likelihood"]["y"].sizes)
        {'chain': 1, 'draw': 200, 'unit': 3}
    """
    if num_samples < 100:
        raise ValueError(f"num_samples must be at least 100; got {num_samples}")
    program = Program(model, guide)
    require_whole_data(program, args, kwargs)
    sites = program.structure(args, kwargs).particle.model.nodes
    posterior = [name for name, site in sites.items() if is_latent(site) or is_deterministic(site)]
    observed = [name for name, site in sites.items() if is_data(site)]

    def extract(particle: Particle) -> dict[str, Tensor]:
        stats = log_densities(particle)  # which also leaves each site's log_prob in the traces
        return {
            **{f"sample_stats/{name}": value.double() for name, value in stats.items()},
            **{f"posterior/{name}": particle.model.nodes[name]["value"] for name in posterior},
            **{f"log_likelihood/{name}": particle.model.nodes[name]["log_prob"] for name in observed},
        }

    groups: dict[str, dict[str, Array]] = {"posterior": {}, "log_likelihood": {}, "sample_stats": {}}
    for key, value in program.map_in_chunks(extract, num_samples, args, kwargs).items():
        group, _, name = key.partition("/")
        groups[group][name] = _numpy(value)[None]
    groups["observed_data"] = {name: _numpy(sites[name]["value"]) for name in observed}
    log_weights = groups["sample_stats"]["log_p"] - groups["sample_stats"]["log_q"]
    groups["sample_stats"]["log_weight"] = pareto_smooth(log_weights[0])[0][None]
    dims, coords = _dims(sites, {*posterior, *observed})
    data = _from_dict({group: values for group, values in groups.items() if values}, dims, coords)
    diagnosis = dataclasses.asdict(judge(summarise(log_weights)))
    # NetCDF attributes are numbers and strings.
    diagnosis |= {"reliable": int(diagnosis["reliable"]), "reasons": "; ".join(diagnosis["reasons"])}
    data["sample_stats"].attrs.update(diagnosis)
    return data


def _from_dict(groups: dict[str, dict[str, Array]], dims: Any, coords: Any) -> Any:
    import arviz  # here, because it takes seconds to import

    if arviz.__version__.startswith("0."):
        return arviz.from_dict(**groups, dims=dims, coords=coords)
    return arviz.from_dict(groups, dims=dims, coords=coords)


def _dims(sites: Mapping[str, Any], names: set[str]) -> tuple[dict[str, list[str]], dict[str, Array]]:
    """Name the dimensions that stand in a plate after it; ArviZ names the others `site_dim_0`, ..."""
    dims, coords = {}, {}
    for name in names:
        site = sites[name]
        batch_dim = site["value"].dim() - site["fn"].event_dim
        labels = [f"{name}_dim_{i}" for i in range(site["value"].dim())]
        for frame in site["cond_indep_stack"]:
            position = batch_dim + (frame.dim or 0)
            # A plate of the same name as a variable would be its own coordinate.
            if frame.vectorized and position >= 0 and frame.name not in names:
                labels[position] = frame.name
                coords[frame.name] = np.arange(frame.size)
        dims[name] = labels
    return dims, coords


def _numpy(value: Tensor) -> Array:
    array: Array = value.detach().cpu().numpy()
    return array
