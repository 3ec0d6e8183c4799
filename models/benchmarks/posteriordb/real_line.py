"""A posterior on the real line: its log density there, and its reference draws."""

from functools import partial
from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_nf.models.benchmarks.posteriordb.loader import Posterior
from pyro_nf.programs.coordinates import LogDensity, model_log_density
from pyro_nf.programs.sites import is_latent
from pyro_nf.programs.supports import bijection


def log_density(posterior: Posterior) -> LogDensity:
    """Return the model's log density of its latents on the real line, side by side in its order, `(dim,) -> ()`."""
    return model_log_density(partial(posterior.model, *posterior.args))


def on_real_line(posterior: Posterior) -> dict[str, Tensor]:
    """Return the reference draws of each latent on the real line, chain after chain, in the model's order.

    Returns:
        `{site: (num_draws, *shape)}`.

    Raises:
        ValueError: If there are no reference draws.
    """
    if posterior.reference is None:
        raise ValueError(f"posterior must have reference draws; {posterior.name!r} has none")
    draws = posterior.reference
    return {name: bijection(site).inv(draws[name].flatten(0, 1)) for name, site in latents(posterior).items()}


def latents(posterior: Posterior) -> dict[str, dict[str, Any]]:
    """Return the latent sites of the model, in its order."""
    trace = poutine.trace(posterior.model).get_trace(*posterior.args)
    return {name: site for name, site in trace.nodes.items() if is_latent(site)}
