"""Importance weights of a guide's draws, and what they say of the guide."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from torch import Tensor

from pyro_nf.tracing import Particle, Program, log_prob_sum

Floats = npt.NDArray[np.float64]

# Fewer effective draws than this cannot carry a posterior summary.
_MIN_ESS = 100.0

# Log weights that differ by less than this are equal, up to the rounding of float32 densities.
_FLAT = 1e-3


@dataclass(frozen=True)
class Diagnosis:
    r"""How far a guide's draws can be trusted, from the weights `w = p(x, z) / q(z)` of fresh draws.

    Attributes:
        khat: Pareto shape of the weights' tail, the median over fresh sets of draws. Below `khat_threshold` the
            weights have a variance that matters, and reweighting corrects the guide.
        khat_threshold: `min(1 - 1 / log10 S, 0.7)` for S draws a set.
        ess: Effective sample size of a set, `(sum w)^2 / sum w^2`, the median over the sets.
        ess_fraction: `ess / S`: 1 for a perfect guide.
        elbo: Mean of `log w` in nats.
        elbo_mcse: Its Monte Carlo standard error.
        log_evidence: `log mean w` over all draws, an estimate of `log p(x)`, in nats.
        log_evidence_se: Its standard error, `sd(w) / (mean(w) sqrt(n))`.
        max_weight: Largest normalised weight in a set, the median over the sets.
        num_samples: S.
        reliable: Whether nothing speaks against the guide.
        reasons: What does, a sentence each.
    """

    khat: float
    khat_threshold: float
    ess: float
    ess_fraction: float
    elbo: float
    elbo_mcse: float
    log_evidence: float
    log_evidence_se: float
    max_weight: float
    num_samples: int
    reliable: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        verdict = "reliable" if self.reliable else "NOT reliable: " + "; ".join(self.reasons)
        return (
            f"ELBO {self.elbo:.3f} +- {self.elbo_mcse:.3f}, log evidence {self.log_evidence:.3f} +- "
            f"{self.log_evidence_se:.3f}, k-hat {self.khat:.2f} (below {self.khat_threshold:.2f} is good), "
            f"ESS {100 * self.ess_fraction:.1f}%: {verdict}"
        )


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    num_sets: int = 5,
    **kwargs: Any,
) -> Diagnosis:
    """Judge a guide by the importance weights of fresh draws.

    A single k-hat scatters by a tenth or two, so the one reported is the median over `num_sets` sets of draws. The
    weights cannot show a mode in which the guide puts no draws at all: start several fits from different points.

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled.
        num_samples: Draws in a set.
        num_sets: Sets.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a plate is subsampled, or a number of draws is too small.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), "Yes, but did it work?", arXiv:1802.02538; Vehtari, Simpson, Gelman,
        Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72), section 3.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.diagnostics import diagnose
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 0.1))
        >>> diagnose(model, AutoFlow(model)).reliable  # the guide starts as just this normal
        True
    """
    if num_samples < 100 or num_sets < 1:
        raise ValueError(f"num_samples must be at least 100 and num_sets at least 1; got {num_samples} and {num_sets}")
    program = Program(model, guide)
    require_whole_data(program, args, kwargs)
    sets = []
    for _ in range(num_sets):
        terms = program.map_in_chunks(log_densities, num_samples, args, kwargs)
        sets.append((terms["log_p"].double() - terms["log_q"].double()).cpu().numpy())
    return judge(np.stack(sets))


def judge(log_weights: Floats) -> Diagnosis:
    """Judge log weights `(num_sets, num_samples)`, as `diagnose` does."""
    num_samples = log_weights.shape[-1]
    threshold = min(1 - 1 / math.log10(num_samples), 0.7)
    bad = ~np.isfinite(log_weights)
    if bad.any() and not (np.isneginf(log_weights) & bad).sum() == bad.sum():
        raise ValueError(
            f"{int(bad.sum())} draws have a NaN or infinite weight: the guide or the model is broken there"
        )
    if not np.isfinite(log_weights).any(-1).all():
        raise ValueError("no draw of the guide has a finite weight: it lies outside the model's support")
    normalised = log_weights - logsumexp(log_weights, -1, keepdims=True)
    ess = float(np.median(np.exp(-logsumexp(2 * normalised, -1))))
    khat = float(np.median([pareto_smooth(row)[1] for row in log_weights]))
    total = log_weights.size
    log_mean = float(logsumexp(log_weights)) - math.log(total)
    relative = np.exp(log_weights - log_mean)
    outside = float(bad.mean())
    reasons = []
    if not khat < threshold:
        reasons.append(
            f"k-hat {khat:.2f} is not below {threshold:.2f}: the guide misses part of the posterior's tails; "
            "use a richer flow, or fit longer"
        )
    if ess < _MIN_ESS:
        reasons.append(f"only {ess:.0f} effective draws of {num_samples}: few draws carry nearly all the weight")
    if outside > 0:
        reasons.append(f"{100 * outside:.2g}% of the draws have density zero under the model")
    return Diagnosis(
        khat=khat,
        khat_threshold=threshold,
        ess=ess,
        ess_fraction=ess / num_samples,
        elbo=float(log_weights.mean()),
        elbo_mcse=float(log_weights.std() / math.sqrt(total)) if not bad.any() else math.inf,
        log_evidence=log_mean,
        log_evidence_se=float(relative.std() / math.sqrt(total)),
        max_weight=float(np.median(np.exp(normalised.max(-1)))),
        num_samples=num_samples,
        reliable=not reasons,
        reasons=tuple(reasons),
    )


def pareto_smooth(log_weights: Floats) -> tuple[Floats, float]:
    """Return Pareto-smoothed, normalised log weights `(num_samples,)`, and k-hat: ArviZ's `psislw`, 0.x or 1.x.

    Where the largest weights are equal there is no tail: k-hat is minus infinity.
    """
    import arviz  # here, because it takes seconds to import

    num_tail = math.ceil(min(len(log_weights) / 5, 3 * math.sqrt(len(log_weights))))  # Vehtari et al. (2024), section 2
    top, cutoff = log_weights.max(), np.sort(log_weights)[-num_tail]
    if top - cutoff < _FLAT:
        return log_weights - logsumexp(log_weights), -math.inf
    # A weight of zero, whose logarithm ArviZ cannot take, is as good as the smallest number.
    log_weights = np.maximum(log_weights - top, math.log(np.finfo(np.float64).tiny))
    if arviz.__version__.startswith("0."):
        smoothed, khat = arviz.psislw(log_weights)
    else:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-log_weights)  # it takes log likelihoods, whose inverses are the weights
    return np.asarray(smoothed), float(khat)


def log_densities(particle: Particle) -> dict[str, Tensor]:
    """Return a draw's log joint density `log_p` and the guide's log density `log_q`."""
    return {"log_p": log_prob_sum(particle.model), "log_q": log_prob_sum(particle.guide)}


def require_whole_data(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if the model subsamples a plate: its densities are noisy then, and weights mean nothing."""
    with torch.no_grad():
        subsamples = program.structure(args, kwargs).subsamples
    if subsamples:
        raise ValueError(
            f"plate {', '.join(map(repr, subsamples))} is subsampled, and importance weights need all the data: "
            "call the model without subsampling"
        )
