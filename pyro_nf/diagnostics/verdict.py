"""What the figures of a guide's draws add up to: one of three verdicts, and a sentence for each cause."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from pyro_nf.diagnostics.moments import Misfit
from pyro_nf.diagnostics.regions import Region, Search
from pyro_nf.diagnostics.stein import SteinResidual
from pyro_nf.diagnostics.weights import WeightSummary

# A guide's own draws are right if each mean is off by less than this, in posterior standard deviations, and each
# standard deviation by less than this, in logarithms: about what 100 exact draws would leave.
_MEAN, _SD = 0.1, 0.1
# And if the divergence is less than this, in nats: the total variation is then below sqrt(0.1 / 2) = 0.22.
_GAP = 0.1
# Where no mean was looked at, a divergence of KL bounds a normal's mean to sqrt(2 KL) standard deviations.
_GAP_ALONE = _MEAN**2 / 2
# What counts as shown lies so many Monte Carlo errors below its limit; what counts as found, so many above.
_SHOWN, _FOUND = 1.0, 3.0
# With a larger kurtosis than this a standard deviation is that of a few draws.
_HEAVY = 30.0
# The guide's center, in the unit of the gradients' scatter; and what part of its square weights must show as nats.
_CENTER, _EXPLAINED = 0.5, 1 / 8
# Fewer effective draws than this cannot carry a posterior summary.
_MIN_ESS = 100.0
# A tail of weights is negligible, whatever its shape, if the divergence is less than this, in nats, and so is what may
# lie beyond the largest weight: the total variation is then below sqrt(0.01 / 2) = 0.07.
_NO_TAIL_GAP, _NO_TAIL_SE = 0.01, 0.003
# It is small enough for weights to be used if they have a mean at all (k-hat below 1), and the divergence is below
# this. k-hat scatters by so much from one set of draws to the next; it counts against "right" that far below its
# threshold, so that chance alone does not lead from "right" to "not right".
_SHORT_TAIL_GAP, _KHAT_SCATTER = 0.05, 0.1
# With more of the draws effective than this, a high k-hat is of the far tails alone.
_TAILS_ESS = 0.5
# k-hat's threshold with draws without end, and how many a user may be asked for.
_MOST_KHAT, _MOST_DRAWS = 0.7, 1e6
# So many modes of little evidence, each found by an L-BFGS run of its own, are a sign of many more.
_MANY_MODES = 4
# No posterior in sensible units is as wide on the real line.
_IMPROPER_SD = 1e6


class Verdict(str, Enum):
    """What a guide's draws are good for.

    - `RIGHT`: use them as they are. Each coordinate's mean is within 0.1 posterior standard deviations and each
      standard deviation within 10%, the divergence is below 0.1 nats, and nothing else speaks against the guide; all
      of this by more than its Monte Carlo error.
    - `RIGHT_AFTER_CORRECTION`: they are further off than that, and importance weights can correct them: take the draws
      of `corrected_posterior`.
    - `NOT_RIGHT`: neither the draws nor their weights can be used.
    """

    RIGHT = "right"
    RIGHT_AFTER_CORRECTION = "right after correction"
    NOT_RIGHT = "not right"

    def __str__(self) -> str:
        """The words."""
        return self.value


class Gradients(NamedTuple):
    """What the gradients of the log density at the guide's draws say.

    Attributes:
        residual: Stein's residual.
        widest: The coordinate with the guide's largest standard deviation, and this.
    """

    residual: SteinResidual
    widest: tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was found out about a guide. What was not looked at is `None`.

    Attributes:
        weights: Figures of the weights.
        names: A name for each coordinate.
        misfit: How the weights move the coordinates' means and standard deviations.
        gradients: What the gradients say.
        search: What L-BFGS runs from elsewhere found.
        improper: Along which directions the posterior is improper, in a sentence; "" if along none. All other figures
            are then of the posterior along the other directions.
        without_density: Why draws have no density, where some have none.
        notes: What else to know.
        option: The argument by which a user asks for more draws.
    """

    weights: WeightSummary
    names: Sequence[str] = ()
    misfit: Misfit | None = None
    gradients: Gradients | None = None
    search: Search | None = None
    improper: str = ""
    without_density: str = ""
    notes: tuple[str, ...] = ()
    option: str = "num_samples"


class Decision(NamedTuple):
    """A verdict in words.

    Attributes:
        verdict: The verdict.
        reasons: What speaks against "right", a sentence or two for each cause.
        correction: What importance weights can do about it; empty unless the verdict is "right after correction".
        notes: What else to know, a sentence each.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    correction: str = ""
    notes: tuple[str, ...] = ()


def decide(evidence: Evidence) -> Decision:
    """Return the verdict on a guide."""
    if evidence.improper:
        rest = decide(replace(evidence, improper=""))
        return Decision(
            Verdict.NOT_RIGHT,
            (f"{evidence.improper} Along all other directions the guide is {rest.verdict}.", *rest.reasons),
            notes=rest.notes,
        )
    notes = (*evidence.notes, *_notes(evidence))
    obstacle = _obstacle(evidence)
    if obstacle:
        lost = (f"Of the guide's own draws, {_lost(evidence)}.",) if evidence.weights.frac_zero_density > 0 else ()
        return Decision(Verdict.NOT_RIGHT, (obstacle, *lost), notes=notes)
    errors = [*_errors(evidence)]
    if not errors:
        return Decision(Verdict.RIGHT, notes=notes)
    correction = (
        "Importance weights can correct them: means by corrected_posterior are right to about "
        f"{mean_error(evidence.weights):.1g} posterior sd."
    )
    reasons = (f"The guide's own draws are off: {_joined(errors)}.",)
    return Decision(Verdict.RIGHT_AFTER_CORRECTION, reasons, correction, notes)


def mean_error(weights: WeightSummary) -> float:
    """Return about the error of a weighted mean, in posterior standard deviations: of sampling and of unseen tails."""
    return math.hypot(weights.ess**-0.5, weights.log_evidence_se)


def _obstacle(evidence: Evidence) -> str:
    """Return why weights cannot correct the guide, the deepest cause alone, for the others follow from it; or ""."""
    search, weights = evidence.search, evidence.weights
    if search is not None and search.missed is not None:
        return _missed(search, search.missed)
    if search is not None and search.num_scattered >= max(_MANY_MODES, search.num_starts / 2):
        return (
            f"Climbs from {search.num_starts} other starts ended in {search.num_scattered} different modes where the "
            "guide has no draws. Each holds little of the evidence, but there may be very many more, and the log "
            "evidence may be too low. Break the symmetry in the model that makes them, if there is one, or use a "
            "sampler made for many modes, such as parallel tempering."
        )
    if _has_long_tail(weights) or weights.ess < _MIN_ESS:
        return _weights_fail(evidence)
    if _is_pulled(evidence) and not _is_pull_in_weights(evidence):
        size = evidence.gradients.residual.size if evidence.gradients else math.nan
        return (
            f"The gradients of the log density pull the guide's center by {size:.2f} sd, and its importance weights do "
            "not show why, so they cannot correct it. Fit longer, or use a more flexible guide."
        )
    return ""


def _missed(search: Search, region: Region) -> str:
    found = (
        f"Climbs from {search.num_starts} other starts found a region with {region.evidence:.2g} times the evidence of "
        f"all that the guide covers, but only {100 * region.draws:.2g}% of the guide's draws are there, so the log "
        "evidence is too low and the draws miss this part. "
    )
    mixture = f'fit again with FlowSVI(num_starts={search.num_starts}) and AutoFlow(base="mixture")'
    if search.copied:
        return (
            f"{found}Another mode holds as much, as with components whose labels can be swapped: if that is the cause, "
            f"order the components in the model; otherwise {mixture}."
        )
    return f"{found}{mixture[0].upper()}{mixture[1:]}."


def _weights_fail(evidence: Evidence) -> str:
    """Say why the weights cannot be used, and what helps: more draws, where the number of draws is all that lacks."""
    weights = evidence.weights
    figures, enough = [], 1.5 * _MIN_ESS / weights.ess_fraction
    if _has_long_tail(weights):
        figures.append(f"k-hat {weights.khat:.2f} is not below {weights.khat_threshold:.2f}")
        # The threshold 1 - 1 / log10 S is above k-hat from here on.
        enough = max(enough, 10 ** (1 / (1 - weights.khat))) if weights.khat < _MOST_KHAT else math.inf
    if weights.ess < _MIN_ESS:
        figures.append(f"only {weights.ess:,.0f} of {weights.num_samples:,} draws are effective")
    why = f"({', '.join(figures)})"
    if enough < _MOST_DRAWS:
        digits = 10 ** max(math.floor(math.log10(enough)) - 1, 0)
        return (
            f"There are too few draws to judge the guide or to correct it by {why}: "
            f"take {evidence.option}={math.ceil(enough / digits) * digits:_} or more."
        )
    seen = [clause for clause in _misfits(evidence, -_FOUND) if "nan" not in clause]
    hint = f". As far as the weights show, {_joined(seen)}" if seen else ""
    return (
        f"Importance weights cannot correct the guide {why}: the posterior has mass where the guide has too few draws"
        f"{hint}. {_advice(evidence)}"
    )


def _advice(evidence: Evidence) -> str:
    """What to do about weights that cannot be used, by their cause."""
    gradients, search = evidence.gradients, evidence.search
    if gradients is not None and gradients.widest[1] > _IMPROPER_SD:
        name, sd = gradients.widest
        return (
            f"The guide's sd of {name} is {sd:.2g} on the real line: the posterior may be improper there. Check that a "
            "prior or data hold it, and that its unit is sensible."
        )
    if search is not None and search.num_modes > 1:
        return (
            f"The posterior has several modes ({search.num_modes} were found): fit with "
            f'FlowSVI(num_starts={search.num_starts}) and AutoFlow(base="mixture"), or, if they are copies of one mode '
            "under other labels, order the components in the model."
        )
    if evidence.weights.ess_fraction > _TAILS_ESS:
        return 'Only far tails are missing: use AutoFlow(base="student_t"), or try corrected_posterior(proposal_df=10).'
    return "Use a more flexible guide or another parametrization, or fit longer."


def _errors(evidence: Evidence) -> Iterator[str]:
    """Yield how the guide's own draws are off, beyond what a right guide may be, as clauses about "it"."""
    weights, off = evidence.weights, [*_misfits(evidence, _SHOWN)]
    yield from off
    if _is_pulled(evidence) and evidence.gradients is not None:
        yield f"the gradients pull its center by {evidence.gradients.residual.size:.2f} sd"
    if weights.frac_zero_density > 0:
        yield f"of its draws, {_lost(evidence)}"
    elif not _is_small(weights, _GAP_ALONE if evidence.misfit is None else _GAP):
        inner = "" if off or evidence.misfit is None else ", though each mean and sd by itself is right"
        yield f"it is {_with_error(weights.gap, weights.gap_se)} nats from the posterior in all{inner}"
    near = weights.khat > weights.khat_threshold - _KHAT_SCATTER and weights.gap > _NO_TAIL_GAP
    if near or (weights.khat > weights.khat_threshold and not _has_no_tail(weights)):
        yield f"its tails may be too light (k-hat {weights.khat:.2f} is not well below {weights.khat_threshold:.2f})"


def _lost(evidence: Evidence) -> str:
    """Say which part of the draws has no density, and why."""
    cause = evidence.without_density.removeprefix("draws have no density: ")
    why = f" ({cause})" if cause else ""
    return f"{100 * evidence.weights.frac_zero_density:.2g}% have no density under the model{why}"


def _misfits(evidence: Evidence, errors: float) -> Iterator[str]:
    """Yield clauses on the worst standard deviation and mean, among those off when so many errors are added."""
    misfit, names = evidence.misfit, evidence.names
    if misfit is None:
        return
    # The sd of heavy tails is that of a few draws: only what is found counts.
    found = misfit.log_ratio.abs() - _FOUND * ((misfit.kurtosis - 1).clamp(min=0) / (4 * misfit.ess)).sqrt() > _SD
    wide = _off(misfit.log_ratio, misfit.log_ratio_se, _SD, errors) & (found | ~_is_heavy(misfit))
    shifted = _off(misfit.shift, misfit.shift_se, _MEAN, errors)
    for off, values, clause in ((wide, misfit.log_ratio, _sd_clause), (shifted, misfit.shift, _mean_clause)):
        if bool(off.any()):
            worst, others = int((values.abs() * off).argmax()), int(off.sum()) - 1
            yield clause(names[worst], worst, misfit) + (f" ({others} more off by less)" if others else "")


def _off(values: Tensor, standard_errors: Tensor, limit: float, errors: float) -> Tensor:
    return ~(values.abs() + errors * standard_errors < limit)


def _sd_clause(name: str, index: int, misfit: Misfit) -> str:
    ratio, error = math.exp(float(misfit.log_ratio[index])), float(misfit.log_ratio_se[index])
    if not 0.1 < ratio < 2:
        return f"its sd of {name} is {ratio:.2g} times the posterior's"
    percent = _with_error(100 * abs(ratio - 1), 100 * ratio * error, digits=0, least=2.0)
    return f"its sd of {name} is {percent}% too {'small' if ratio < 1 else 'large'}"


def _mean_clause(name: str, index: int, misfit: Misfit) -> str:
    shift, error = float(misfit.shift[index]), float(misfit.shift_se[index])
    return f"its mean of {name} is {_with_error(abs(shift), error)} posterior sd too {'low' if shift > 0 else 'high'}"


def _notes(evidence: Evidence) -> Iterator[str]:
    """Yield what speaks against the guide only at first sight, and what was not looked at."""
    weights, misfit = evidence.weights, evidence.misfit
    if not weights.khat < weights.khat_threshold and _has_no_tail(weights):
        yield (
            f"k-hat {weights.khat:.2f} is not below {weights.khat_threshold:.2f}, but the weights are flat (the "
            f"divergence is {_with_error(weights.gap, weights.gap_se, 3, 5e-4)} nats): their tail is long in shape and "
            "next to nothing in weight. Means and sds do not see what is farther out."
        )
    if misfit is not None:
        unknown = _is_heavy(misfit) & _off(misfit.log_ratio, misfit.log_ratio_se, _SD, _SHOWN)
        if bool(unknown.any()):
            name = evidence.names[int(unknown.nonzero()[0])]
            yield (
                f"The tails of {name} are so heavy that a few draws make its sd, which no sample of this size can "
                "check; look at quantiles instead."
            )
    if evidence.search is None:
        yield "No L-BFGS runs from other starts were made: a mode in which the guide has no draws would not be noticed."


def _has_long_tail(weights: WeightSummary) -> bool:
    """Whether the weights have a tail that they cannot be used with."""
    if weights.khat < weights.khat_threshold or _has_no_tail(weights):
        return False
    return not (weights.khat < 1 and max(weights.gap, weights.gap_se) < _SHORT_TAIL_GAP)


def _has_no_tail(weights: WeightSummary) -> bool:
    """Whether a tail is negligible whatever its shape: the weights are flat."""
    return weights.gap < _NO_TAIL_GAP and weights.gap_se < _NO_TAIL_SE


def _is_small(weights: WeightSummary, limit: float) -> bool:
    """Whether the divergence is shown to be less than so many nats."""
    return weights.gap + _SHOWN * weights.gap_se < limit


def _is_heavy(misfit: Misfit) -> Tensor:
    return misfit.kurtosis > _HEAVY


def _is_pulled(evidence: Evidence) -> bool:
    gradients = evidence.gradients
    return gradients is not None and gradients.residual.size > _CENTER + _FOUND * gradients.residual.noise


def _is_pull_in_weights(evidence: Evidence) -> bool:
    """Whether the divergence that weights show is at least a quarter of a shifted normal's."""
    weights, gradients = evidence.weights, evidence.gradients
    return gradients is None or weights.gap + _SHOWN * weights.gap_se > _EXPLAINED * gradients.residual.size**2


def _with_error(value: float, error: float, digits: int = 2, least: float = 0.02) -> str:
    """A figure, with its Monte Carlo error where this matters."""
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if error > least else "")


def _joined(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
