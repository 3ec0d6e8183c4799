"""The evidence of each datum, for models whose latents are local to the data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_nf.diagnostics.weights import require_whole_data
from pyro_nf.tracing import Particle, Program, is_data, is_latent, local_log_prob, local_plate
from pyro_nf.waits import one_at_a_time


@dataclass(frozen=True)
class LocalEvidence:
    r"""Bounds on the log evidence of each datum n, in nats.

    Attributes:
        elbo: `E_q[log p(x_n, z_n) - log q(z_n | x_n)]`, `(size,)`.
        log_evidence: `log mean_k p(x_n, z_nk) / q(z_nk | x_n)`, `(size,)`: the importance-sampled log-likelihood.
        num_samples: Draws k for each datum.
    """

    elbo: Tensor
    log_evidence: Tensor
    num_samples: int


@one_at_a_time
def local_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 500,
    chunk_size: int = 50,
    **kwargs: Any,
) -> LocalEvidence:
    """Estimate the evidence of each datum of a model with one plate, all of whose sites stand in it.

    Args:
        model: The Pyro model, a deep latent Gaussian model for instance.
        guide: Its guide.
        *args: The model's arguments: all the data to score, nothing subsampled.
        num_samples: Draws for each datum.
        chunk_size: Draws at once, which bounds the memory.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a site stands outside the plate, or in several, or the plate is subsampled.

    References:
        Burda, Grosse, Salakhutdinov (2015), "Importance weighted autoencoders", arXiv:1509.00519, equation 8.
    """
    program = Program(model, guide)
    require_whole_data(program, args, kwargs)
    particle = program.structure(args, kwargs).particle
    if local_plate(particle) is None:
        sites = [(name, site) for name, site in particle.model.nodes.items() if is_latent(site) or is_data(site)]
        raise ValueError(
            "local_evidence takes models whose sites all stand in one plate; got "
            + ", ".join(
                f"{name!r} in {[f.name for f in site['cond_indep_stack']] or 'no plate'}" for name, site in sites
            )
        )

    def log_weights(particle: Particle) -> dict[str, Tensor]:
        return {"log_w": local_log_prob(particle.model) - local_log_prob(particle.guide)}

    # Running sums of log w and (in logs) of w: memory does not grow with num_samples.
    total, log_total = torch.zeros(()), torch.tensor(-math.inf)
    with torch.no_grad():
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            log_w = program.map(log_weights, program.draw(size, args, kwargs), args, kwargs)["log_w"]
            total = total.to(log_w) + log_w.sum(0)
            log_total = torch.logaddexp(log_total.to(log_w), log_w.logsumexp(0))
    return LocalEvidence(total / num_samples, log_total - math.log(num_samples), num_samples)
