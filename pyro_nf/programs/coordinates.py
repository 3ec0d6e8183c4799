"""A model's latents as one vector on the real line, and the log density there."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_nf.programs._pyro import is_subsample
from pyro_nf.programs.contraction import log_sum_exp
from pyro_nf.programs.enumeration import NOTHING, Enumeration, run_enumerated
from pyro_nf.programs.noise import SharedSubsamples, running
from pyro_nf.programs.sites import is_latent
from pyro_nf.programs.supports import bijection
from pyro_nf.programs.traces import fill_masked, log_prob_sum

LogDensity = Callable[[Tensor], Tensor]
"""`(dim,) -> ()`, over a model's coordinates."""


def coordinates(trace: poutine.Trace) -> Tensor:
    """Return the latents of a model's trace through the bijections of their supports, side by side, `(dim,)`.

    Raises:
        ValueError: If a latent is discrete, or its support has no bijection.
    """
    sites = [site for site in trace.nodes.values() if is_latent(site)]
    for site in sites:
        if site["fn"].support.is_discrete:
            raise ValueError(f"coordinates are of continuous latents; site {site['name']!r} is discrete")
    return torch.cat([bijection(site).inv(site["value"]).reshape(-1) for site in sites])


def coordinate_names(trace: poutine.Trace) -> list[str]:
    """Return a name for each coordinate: `mu`, `theta[0]`, `theta[1]`, ..., counted along the site's entries."""
    return names_of({name: site for name, site in trace.nodes.items() if is_latent(site)})


def names_of(sites: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return a name for each coordinate of latent sites, in their order, as `coordinate_names` does."""
    names = []
    for name, site in sites.items():
        size = bijection(site).inverse_shape(site["value"].shape).numel()
        scalar = site["value"].dim() == 0
        names += [name] if scalar else [f"{name}[{i}]" for i in range(size)]
    return names


def model_log_density(
    model: Callable[[], Any], indices: dict[str, Tensor] | None = None, enumeration: Enumeration = NOTHING
) -> LogDensity:
    r"""Return `log p(x, z(u)) + log|det dz/du|` as a function of the coordinates u.

    Args:
        model: The Pyro model with its arguments, as `BoundProgram.model`.
        indices: Those of subsampled plates, as `BoundProgram.draw` gives them.
        enumeration: The discrete latents that are summed out.
    """

    def log_density(point: Tensor) -> Tensor:
        values = []
        for fixed in enumeration.branches():
            place = _AtPoint(point)
            with running(fixed=True), SharedSubsamples(indices or {}), place:
                trace = fill_masked(run_enumerated(model, None, enumeration, fixed))
            values.append(place.log_det + log_prob_sum(trace, has_coordinates=True))
        return values[0] if len(values) == 1 else log_sum_exp(torch.stack(values), 0)

    return log_density


class _AtPoint(Messenger):
    """Give each latent its value at a point, the coordinates being taken in the order in which the latents come.

    Attributes:
        log_det: Log-determinant of the map from the coordinates taken so far to the latents.
    """

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point, self.used, self.log_det = point, 0, point.new_zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg):
            return
        to_support = bijection(msg)
        shape = to_support.inverse_shape(msg["fn"].shape())
        part = self.point[self.used : self.used + shape.numel()].reshape(shape)
        self.used += shape.numel()
        msg["value"], msg["done"] = to_support(part), True
        self.log_det = self.log_det + to_support.log_abs_det_jacobian(part, msg["value"]).sum()
