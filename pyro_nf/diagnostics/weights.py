"""Importance weights of a guide's draws: densities, summaries, Pareto smoothing."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from torch import Tensor

from pyro_nf.diagnostics.arviz_versions import psislw
from pyro_nf.interface.renamed import renamed_attribute
from pyro_nf.programs.program import BoundProgram, TracePair
from pyro_nf.programs.traces import guide_log_prob, log_prob_sum

Floats = npt.NDArray[np.float64]

# Up to here a tail is taken at its word: near 1 its mass has no end, which flat weights would not bear out.
_MAX_KHAT = 0.9
# Draws that an importance-weighted bound averages.
_GROUP = 100

# Log weights that differ by less than this are equal, up to the rounding of float32 densities.
_FLAT = 1e-3


@dataclass(frozen=True, kw_only=True)
class WeightSummary:
    """Figures of the importance weights `w = p(x, z) / q(z)` of sets of S draws.

    Attributes:
        khat: Pareto shape of the weights' tail, the median over fresh sets of draws. Below `khat_threshold` the
            weights have a variance that matters, and reweighting corrects the guide.
        khat_threshold: `min(1 - 1 / log10 S, 0.7)`.
        ess: Effective sample size of a set, `(sum w)^2 / sum w^2`, the median over the sets.
        ess_fraction: `ess / S`: 1 for a perfect guide.
        elbo: Mean of `log w` in nats.
        elbo_mcse: Its Monte Carlo standard error.
        inner_elbo: ELBO of the guide cut off where the model has no density: the mean of the finite `log w`, and the
            logarithm of their share. The ELBO itself where all draws have a density.
        iwelbo: Mean of `log (w_1 + ... + w_100) / 100`, the importance-weighted bound, in nats: between the ELBO and
            the log evidence, nearer to this the less the error of `log_evidence` can hide.
        iwelbo_mcse: Its Monte Carlo standard error.
        log_evidence: `log mean w` over all draws, an estimate of `log p(x)`, in nats.
        log_evidence_se: Its standard error: the root of the sum of squares of `sd(w) / (mean(w) sqrt(n))`, and of the
            largest weight's share over `1 - khat`, which is what a Pareto tail holds beyond the largest of n weights.
        gap: `log_evidence - elbo` in nats: the divergence KL(q || p) from guide to posterior, as far as the guide's
            draws show it; infinite where the model's density is zero at some of them.
        gap_se: Its standard error, made as that of `log_evidence`: the two terms' errors cancel for the most part.
        max_weight: Largest normalised weight in a set, the median over the sets.
        num_samples: S.
        frac_zero_density: Share of the draws with density zero under the model.
    """

    khat: float
    khat_threshold: float
    ess: float
    ess_fraction: float
    elbo: float
    elbo_mcse: float
    inner_elbo: float
    iwelbo: float
    iwelbo_mcse: float
    log_evidence: float
    log_evidence_se: float
    gap: float
    gap_se: float
    max_weight: float
    num_samples: int
    frac_zero_density: float

    outside = renamed_attribute("outside", "frac_zero_density")


def summarize(log_weights: Floats) -> WeightSummary:
    """Summarize log weights `(num_sets, num_samples)`.

    Raises:
        ValueError: If weights are NaN or infinite, or those of a set all zero.
    """
    num_samples = log_weights.shape[-1]
    outside = np.isneginf(log_weights)
    broken = int((~np.isfinite(log_weights) & ~outside).sum())
    if broken:
        raise ValueError(f"{broken} draws have a NaN or infinite weight: the guide or the model is broken there")
    if outside.all(-1).any():
        raise ValueError("no draw of the guide has a finite weight: it lies outside the model's support")
    total = log_weights.size
    normalised = log_weights - logsumexp(log_weights, -1, keepdims=True)
    ess = float(np.median(np.exp(-logsumexp(2 * normalised, -1))))
    log_mean = float(logsumexp(log_weights)) - math.log(total)
    khat = float(np.median([pareto_smooth(row)[1] for row in log_weights]))
    # Of n weights with a Pareto tail, what lies beyond the largest holds its share / (1 - k), on average.
    unseen = math.exp(log_weights.max() - log_mean) / total / (1 - min(max(khat, 0.0), _MAX_KHAT))
    relative = np.exp(log_weights - log_mean)
    bounds = logsumexp(log_weights.flat[: total // _GROUP * _GROUP].reshape(-1, _GROUP), -1) - math.log(_GROUP)
    return WeightSummary(
        khat=khat,
        khat_threshold=min(1 - 1 / math.log10(num_samples), 0.7),
        ess=ess,
        ess_fraction=ess / num_samples,
        elbo=float(log_weights.mean()),
        elbo_mcse=_mcse(log_weights),
        inner_elbo=float(log_weights[~outside].mean()) + math.log(1 - outside.mean()),
        iwelbo=float(bounds.mean()),
        iwelbo_mcse=_mcse(bounds),
        log_evidence=log_mean,
        log_evidence_se=math.hypot(_mcse(relative), unseen),
        gap=log_mean - float(log_weights.mean()),
        gap_se=math.hypot(_mcse(relative - log_weights), unseen),
        max_weight=float(np.median(np.exp(normalised.max(-1)))),
        num_samples=num_samples,
        frac_zero_density=float(outside.mean()),
    )


def _mcse(values: Floats) -> float:
    """Standard error of the mean; infinite where the mean is."""
    return float(values.std() / math.sqrt(values.size)) if np.isfinite(values).all() else math.inf


def pareto_smooth(log_weights: Floats) -> tuple[Floats, float]:
    """Return Pareto-smoothed, normalised log weights `(num_samples,)`, and k-hat: ArviZ's `psislw`, 0.x or 1.x.

    Where the largest weights are equal there is no tail: k-hat is minus infinity.
    """
    num_tail = math.ceil(min(len(log_weights) / 5, 3 * math.sqrt(len(log_weights))))  # Vehtari et al. (2024), section 2
    top, cutoff = log_weights.max(), np.sort(log_weights)[-num_tail]
    if top - cutoff < _FLAT:
        return log_weights - logsumexp(log_weights), -math.inf
    # A weight of zero, whose logarithm ArviZ cannot take, is as good as the smallest number.
    log_weights = np.maximum(log_weights - top, math.log(np.finfo(np.float64).tiny))
    return psislw(log_weights)


def log_densities(particle: TracePair) -> dict[str, Tensor]:
    """Return a draw's log joint density `log_p`, minus infinity where it is not finite, and the guide's `log_q`."""
    log_p = log_prob_sum(particle.model)
    return {"log_p": torch.where(log_p.isfinite(), log_p, -math.inf), "log_q": guide_log_prob(particle.guide)}


def require_whole_data(program: BoundProgram) -> None:
    """Raise a `ValueError` if the model subsamples a plate: its densities are noisy then, and weights mean nothing."""
    with torch.no_grad():
        subsamples = program.spec.subsamples
    if subsamples:
        raise ValueError(
            f"plate {', '.join(map(repr, subsamples))} is subsampled, and importance weights need all the data: "
            "call the model without subsampling"
        )
    if random := program.own_randomness():
        raise ValueError(f"{random}, and importance weights need a density that is the same at each run")
