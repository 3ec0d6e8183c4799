"""The evidence of each datum, for models whose latents are local to the data."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_nf.diagnostics.progress import Progress, counted
from pyro_nf.diagnostics.weights import require_whole_data
from pyro_nf.interface.arguments import check_whole_number, unpacked
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.matching import require_weights
from pyro_nf.programs.program import Program, Randomness, TracePair
from pyro_nf.programs.sites import is_data, is_latent, local_plate
from pyro_nf.programs.traces import local_log_prob

# Rows that a sentence names.
_MAX_ROWS = 5


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
@takes_model_arguments
def local_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 500,
    chunk_size: int = 50,
    progress: bool = True,
    **kwargs: Any,
) -> LocalEvidence:
    """Estimate the evidence of each datum of a model with one plate, all of whose sites stand in it.

    Args:
        model: The Pyro model, a deep latent Gaussian model for instance.
        guide: Its guide.
        *args: The model's arguments: all the data to score, nothing subsampled; or all in one `Arguments`.
        num_samples: Draws for each datum.
        chunk_size: Draws at once, which bounds the memory.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a site stands outside the plate, or in several, the plate is subsampled, a number is not positive
            or may be meant for the model, the guide does not match the model or has no density, or a datum's density
            is NaN or infinite.

    Warns:
        UserWarning: If there are data all of whose draws lie outside the model's support; their evidence is minus
            infinity.

    References:
        Burda, Grosse, Salakhutdinov (2015), "Importance weighted autoencoders", arXiv:1509.00519, equation 8.
    """
    num_samples = check_whole_number("num_samples", num_samples)
    chunk_size = check_whole_number("chunk_size", chunk_size)
    shown = Progress("local_evidence", progress)
    args, kwargs = unpacked(args, kwargs)
    program = Program(model, guide).bind(*args, **kwargs)
    require_weights(program)
    require_whole_data(program)
    model_trace = program.spec.traces.model
    if local_plate(model_trace) is None:
        sites = [(name, site) for name, site in model_trace.nodes.items() if is_latent(site) or is_data(site)]
        raise ValueError(
            "local_evidence takes models whose sites all stand in one plate; got "
            + ", ".join(
                f"{name!r} in {[f.name for f in site['cond_indep_stack']] or 'no plate'}" for name, site in sites
            )
        )

    def log_weights(particle: TracePair) -> dict[str, Tensor]:
        return {"log_w": local_log_prob(particle.model) - local_log_prob(particle.guide)}

    def chunks() -> Iterator[Randomness]:
        for start in range(0, num_samples, chunk_size):
            yield program.draw(min(chunk_size, num_samples - start))

    # Running sums of log w and (in logs) of w: memory does not grow with num_samples.
    total, log_total = torch.zeros(()), torch.tensor(-math.inf)
    broken = torch.zeros((), dtype=torch.long)
    run = program.repeated(log_weights)
    with shown.part("weights of draws", num_samples) as advance:
        for draws in counted(chunks(), advance):
            log_w = run(draws)["log_w"]
            broken = broken.to(log_w.device) + (log_w.isnan() | log_w.isposinf()).sum(0)
            total = total.to(log_w) + log_w.sum(0)
            log_total = torch.logaddexp(log_total.to(log_w), log_w.logsumexp(0))
    _report(broken, log_total, num_samples)
    return LocalEvidence(total / num_samples, log_total - math.log(num_samples), num_samples)


def _report(broken: Tensor, log_total: Tensor, num_samples: int) -> None:
    """Name the data whose evidence cannot be had."""
    if bool(broken.any()):
        rows, worst = broken.nonzero().flatten().tolist(), int(broken.argmax())
        raise ValueError(
            f"{len(rows)} of {len(broken)} data have a NaN or infinite weight, {named_rows(rows)} (row {worst} in "
            f"{int(broken[worst])} of {num_samples} draws): the guide or the model is broken there"
        )
    outside = log_total.isneginf().nonzero().flatten().tolist()
    if outside:
        warnings.warn(
            f"no draw of the guide lies inside the model's support for {len(outside)} of {len(log_total)} data, "
            f"{named_rows(outside)}: their log evidence is minus infinity",
            stacklevel=4,
        )


def named_rows(rows: list[int]) -> str:
    """Say which rows, the first few."""
    shown = ", ".join(map(str, rows[:_MAX_ROWS]))
    rest = len(rows) - _MAX_ROWS
    return f"row{'s' * (len(rows) > 1)} {shown}" + (f" and {rest} more" if rest > 0 else "")
