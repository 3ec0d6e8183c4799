"""A guide and the model that is fitted: one pair, whichever model the guide was made of."""

from collections.abc import Mapping
from typing import Any, Protocol

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.programs.coordinates import LogDensity, model_log_density
from pyro_nf.programs.program import BoundProgram, Program
from pyro_nf.programs.sites import is_latent
from pyro_nf.programs.supports import bijection

Site = dict[str, Any]


class HasCoordinates(Protocol):
    """A guide whose draws are cut from one vector on the real line."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent."""

    def latent_sites(self) -> Mapping[str, Site]:
        """Return the latent sites, as in a trace, in the order in which the vector is cut."""


def paired_density(program: BoundProgram) -> Density:
    """Return the log density of a model over the coordinates of a guide, for many points at once.

    Args:
        program: The Pyro model that is fitted, the guide's own or another with the same latents, such as
            `poutine.scale(model, 0.1)`; a guide that `HasCoordinates`; and their arguments. A subsampled plate has one
            minibatch.

    Raises:
        ValueError: If the latents of model and guide are not the same.
    """
    # A first run of its own: the draws that it takes belong to what a seed stands for.
    program = Program(program.program.model, program.program.guide).bind(*program.args, **program.kwargs)
    indices = program.draw(1).indices
    order = check_pair(program)
    log_density = model_log_density(program.model, indices, program.spec.enumeration)
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        log_density = _reordered(log_density, order)
    return Density(log_density, program.num_numbers)


def check_pair(program: BoundProgram) -> Tensor:
    """Check that a guide's latents are those of the program's model, in whatever order.

    Returns:
        Where each coordinate of the model, in the order in which its latents come, stands in the guide's vector,
        `(dim,)`.

    Raises:
        ValueError: If names, shapes or supports differ.
    """
    trace = program.spec.traces.model
    guide: Any = program.program.guide  # which `HasCoordinates`
    own = guide.latent_sites()
    given = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    differences = [f"the guide has no {name!r}" for name in given if name not in own]
    differences += [_absence(name, trace) if name not in given else _difference(own[name], given[name]) for name in own]
    if found := [difference for difference in differences if difference]:
        raise ValueError(
            f"the guide was made of a model with other latents than the one that is fitted: {'; '.join(found)}. "
            f"Make the guide of the model that is fitted: {type(guide).__name__}(model)"
        )
    ends = torch.tensor([_size(site) for site in own.values()]).cumsum(0).tolist()
    end_of = dict(zip(own, ends, strict=True))
    places = [torch.arange(end_of[name] - _size(site), end_of[name]) for name, site in given.items()]
    device = next(iter(given.values()))["value"].device
    return torch.cat(places).to(device)


def _reordered(log_density: LogDensity, order: Tensor) -> LogDensity:
    return lambda point: log_density(point.index_select(0, order))


def _absence(name: str, trace: poutine.Trace) -> str:
    """Say in which way a latent of the guide is none of the model."""
    if name in trace.nodes and trace.nodes[name]["type"] == "sample":
        return f"the guide samples {name!r}, which the model observes"
    return f"the guide samples {name!r}, which the model does not"


def _difference(own: Site, given: Site) -> str:
    """Say how a site of the model differs from the guide's, or return an empty string."""
    name, shapes = own["name"], [tuple(site["fn"].shape()) for site in (own, given)]
    if shapes[0] != shapes[1]:
        return f"{name!r} has the shape {shapes[0]} in the guide and {shapes[1]} in the model"
    maps = [bijection(site) for site in (own, given)]
    sizes = [to_support.inverse_shape(torch.Size(shapes[0])) for to_support in maps]
    if sizes[0] == sizes[1]:
        # Two supports are one if the real line goes into them alike.
        points = torch.linspace(-1, 1, sizes[0].numel()).to(given["value"]).reshape(sizes[0]) + 0.1
        one, other = (to_support(points).double() for to_support in maps)
        if torch.allclose(one, other, rtol=1e-4, atol=1e-6):
            return ""
    return f"{name!r} has the support {own['fn'].support} in the guide and {given['fn'].support} in the model"


def _size(site: Site) -> int:
    size: int = bijection(site).inverse_shape(site["fn"].shape()).numel()
    return size
