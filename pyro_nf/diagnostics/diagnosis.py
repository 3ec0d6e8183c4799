"""Can this posterior be trusted? Several figures of fresh draws, and a verdict in words."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nf.coordinates import LogDensity, coordinate_names, coordinates, model_log_density
from pyro_nf.density import Density
from pyro_nf.diagnostics.moments import Moments
from pyro_nf.diagnostics.regions import num_scattered, regions
from pyro_nf.diagnostics.stein import SteinResidual, stein_residual
from pyro_nf.diagnostics.weights import WeightSummary, log_densities, require_whole_data, summarise
from pyro_nf.modes import find_modes, starting_points
from pyro_nf.tracing import Particle, Program
from pyro_nf.waits import one_at_a_time

# Fewer effective draws than this cannot carry a posterior summary.
_MIN_ESS = 100.0
# Weights as flat as this leave next to nothing to a tail, whatever its shape: k-hat does not count then.
_FLAT_ESS, _FLAT_WEIGHT = 0.9, 0.01
# Misfits that matter, in posterior standard deviations: of one coordinate's mean and (in logs) sd, and of the centre.
_MEAN, _SD, _CENTRE = 0.2, 0.2, 0.5
# Climbs need the whole Hessian.
_MAX_DIM = 500
# So many modes of little evidence, each found by a climb of its own, are a sign of many more.
_MANY_MODES = 4
# Draws with a gradient, and numbers that their coordinates may take together.
_NUM_SCORES, _PER_COORDINATE, _MAX_NUMBERS = 1000, 10, 2**24


@dataclass(frozen=True, kw_only=True)
class Diagnosis(WeightSummary):
    r"""How far a guide's draws can be trusted: what their weights say (`WeightSummary`), and other figures.

    What was not looked at is NaN, and `notes` says why.

    Attributes:
        mean_shift: By how many posterior sds the weights move the mean of the coordinate (latents on the real line)
            that they move most.
        sd_ratio: The guide's sd over the weighted one, of the coordinate where it is furthest from 1.
        stein_residual: How many sds off the guide's centre lies by the gradients g of the log density,
            `sqrt(E[g]' cov(g)^-1 E[g])`, which is zero if `q = p`.
        stein_noise: The residual that Monte Carlo error alone would give.
        left_out: Evidence of the largest region that `num_starts` climbs found and the guide has too few draws in,
            over the evidence where they are; 0 if none. Of a mode it is the inner half that counts: 1/6 if the guide
            has three quarters of the posterior and leaves out the rest.
        num_starts: Climbs.
        reliable: Whether nothing speaks against the guide.
        reasons: What does, a sentence each, with what to try.
        notes: What else to know: what was not looked at, or speaks against the guide only at first sight.
    """

    mean_shift: float = math.nan
    sd_ratio: float = math.nan
    stein_residual: float = math.nan
    stein_noise: float = math.nan
    left_out: float = math.nan
    num_starts: int = 0
    reliable: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        verdict = "reliable" if self.reliable else "NOT reliable: " + "; ".join(self.reasons)
        notes = f" (Note: {'; '.join(self.notes)})" if self.notes else ""
        return (
            f"ELBO {self.elbo:.3f} +- {self.elbo_mcse:.3f}, log evidence {self.log_evidence:.3f} +- "
            f"{self.log_evidence_se:.3f}, k-hat {self.khat:.2f} (below {self.khat_threshold:.2f} is good), "
            f"ESS {100 * self.ess_fraction:.1f}%: {verdict}{notes}"
        )


@one_at_a_time
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    num_sets: int = 5,
    num_starts: int = 8,
    **kwargs: Any,
) -> Diagnosis:
    """Judge a guide by fresh draws: their importance weights, the gradients there, and climbs from elsewhere.

    Draws are run in parts and reduced at once: only their weights are kept, so a million draws take no more memory
    than a thousand. A single k-hat scatters by a tenth or two, so the one reported is the median over `num_sets` sets.

    A guide is not reliable if

    - k-hat is not below its threshold, unless the weights are flat: then the tail that k-hat sees is long in shape and
      has next to no weight, and `notes` says so;
    - there are fewer than 100 effective draws, or draws outside the model's support;
    - the weights move a mean by more than 0.2 sd, or a sd by more than a fifth, or the gradients pull the centre by
      more than 0.5 sd, beyond their Monte Carlo errors;
    - one of `num_starts` climbs (L-BFGS, from uniform points in the cube from -2 to 2 on the real line and their
      opposites) finds a region with over 1% of the evidence and over twice what the guide has there. The weights,
      which are of the guide's own draws, cannot show it; nor can climbs show what none of them finds.

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled.
        num_samples: Draws in a set.
        num_sets: Sets.
        num_starts: Climbs, for up to 500 coordinates; 0 for none.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a plate is subsampled, or a number is too small.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), "Yes, but did it work?", arXiv:1802.02538; Vehtari, Simpson, Gelman,
        Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72), section 3; Burda, Grosse,
        Salakhutdinov (2015), arXiv:1509.00519, equation 8 (`iwelbo`).

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
    if num_samples < 100 or num_sets < 1 or num_starts < 0:
        raise ValueError(
            "num_samples must be at least 100, num_sets at least 1, and num_starts not negative; "
            f"got {num_samples}, {num_sets} and {num_starts}"
        )
    program = Program(model, guide)
    require_whole_data(program, args, kwargs)
    names, obstacle = _coordinate_names(program.structure(args, kwargs).particle)

    def extract(particle: Particle) -> dict[str, Tensor]:
        return log_densities(particle) | ({"point": coordinates(particle.model)} if names else {})

    moments, sets = Moments(), []
    for _ in range(num_sets):
        parts = []
        for draws in program.chunks(num_samples, args, kwargs):
            with torch.no_grad():
                found = program.map(extract, draws, args, kwargs)
            log_weights = found["log_p"].double() - found["log_q"].double()
            parts.append(log_weights.cpu())
            if names:
                moments.add(log_weights, found["point"])
        sets.append(torch.cat(parts).numpy())
    diagnosis = judge(summarise(np.stack(sets)))
    if not names:
        return dataclasses.replace(diagnosis, notes=(*diagnosis.notes, obstacle))
    diagnosis = _with_moments(diagnosis, *moments.compare(), names, num_sets)
    log_density = model_log_density(model, args, kwargs)
    points, scores = _scores(program, log_density, len(names), args, kwargs)
    diagnosis = _with_gradients(diagnosis, stein_residual(scores))
    density = Density(log_density, program.num_numbers(args, kwargs))
    return _with_starts(diagnosis, density, points, num_starts)


def judge(weights: WeightSummary) -> Diagnosis:
    """Judge by the weights alone, as `diagnose` does."""
    reasons, notes = [], []
    if not weights.khat < weights.khat_threshold:
        above = f"k-hat {weights.khat:.2f} is not below {weights.khat_threshold:.2f}"
        if weights.ess_fraction > _FLAT_ESS and weights.max_weight < _FLAT_WEIGHT:
            notes.append(
                f"{above}, but the weights are flat (ESS {100 * weights.ess_fraction:.1f}%, the largest is "
                f"{weights.max_weight:.1g} of all): their tail is long in shape and next to nothing in weight"
            )
        else:
            reasons.append(
                f"{above}: the guide misses part of the posterior's tails; "
                'use a richer flow, base="student_t" or more particles, or fit longer'
            )
    if weights.ess < _MIN_ESS:
        reasons.append(
            f"only {weights.ess:.0f} effective draws of {weights.num_samples}: few draws carry nearly all the weight"
        )
    if weights.outside > 0:
        reasons.append(f"{100 * weights.outside:.2g}% of the draws have density zero under the model")
    return Diagnosis(**vars(weights), reliable=not reasons, reasons=tuple(reasons), notes=tuple(notes))


def _coordinate_names(particle: Particle) -> tuple[list[str], str]:
    """Return a name for each coordinate, or none and the reason why there are no coordinates."""
    try:
        coordinates(particle.model)
        return coordinate_names(particle.model), ""
    except ValueError as error:
        return [], f"neither means, gradients nor other starts were looked at: {error}"


def _scores(
    program: Program, log_density: LogDensity, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return draws with a finite gradient of the log density, `(n, dim)`, and the gradients there."""

    def extract(particle: Particle) -> dict[str, Tensor]:
        point = coordinates(particle.model)
        return {"point": point, "score": torch.func.grad(log_density)(point)}

    number = max(_NUM_SCORES, _PER_COORDINATE * dim if dim <= _MAX_DIM else 0)
    found = program.map_in_chunks(extract, min(number, max(_MAX_NUMBERS // dim, 2)), args, kwargs)
    finite = found["score"].isfinite().all(-1) & found["point"].isfinite().all(-1)
    return found["point"][finite], found["score"][finite]


def _with_moments(
    diagnosis: Diagnosis, shifts: Tensor, ratios: Tensor, kurtosis: Tensor, names: list[str], num_sets: int
) -> Diagnosis:
    ess = max(diagnosis.ess * num_sets, 1.0)
    worst, widest = int(shifts.abs().argmax()), int(ratios.log().abs().argmax())
    shift, ratio = float(shifts[worst]), float(ratios[widest])
    # Monte Carlo errors of weighted means, in sds, and of the logarithms of weighted sds.
    mean_error, sd_error = ess**-0.5, ((kurtosis - 1).clamp(min=0) / (4 * ess)).sqrt()
    reasons = []
    if abs(shift) > _MEAN + 3 * mean_error:
        reasons.append(
            f"by the weights the guide's mean of {names[worst]} is {abs(shift):.2f} posterior sd too "
            f"{'low' if shift > 0 else 'high'}; fit longer or use a richer flow, or take corrected_posterior"
        )
    beyond = ratios.log().abs() - 3 * sd_error
    if bool((beyond > _SD).any()):
        sure = int(beyond.argmax())
        reasons.append(
            f"by the weights the guide's sd of {names[sure]} is {float(ratios[sure]):.2f} times the posterior's; "
            "fit longer or use a richer flow, or take corrected_posterior"
        )
    return _with_reasons(dataclasses.replace(diagnosis, mean_shift=shift, sd_ratio=ratio), reasons)


def _with_gradients(diagnosis: Diagnosis, residual: SteinResidual) -> Diagnosis:
    reasons = []
    if residual.size > _CENTRE + 3 * residual.noise:
        reasons.append(
            f"the gradients pull the guide's centre by {residual.size:.2f} sd: fit longer, or use a richer flow"
        )
    diagnosis = dataclasses.replace(diagnosis, stein_residual=residual.size, stein_noise=residual.noise)
    return _with_reasons(diagnosis, reasons)


def _with_starts(diagnosis: Diagnosis, density: Density, points: Tensor, num_starts: int) -> Diagnosis:
    dim = points.shape[1]
    if dim > _MAX_DIM and num_starts:
        note = f"other starts were not looked at: {dim} coordinates are more than {_MAX_DIM}"
        return dataclasses.replace(diagnosis, notes=(*diagnosis.notes, note))
    if not num_starts:
        return diagnosis
    modes = find_modes(density, starting_points(num_starts, points[0]))
    found = [region for region in regions(density, modes, points, diagnosis.log_evidence) if region.left_out]
    reasons = []
    scattered = num_scattered(modes, points, diagnosis.log_evidence)
    if scattered >= max(_MANY_MODES, num_starts / 2):
        reasons.append(
            f"{num_starts} other starts ended in {scattered} different modes where the guide has no draws: each has "
            "little of the evidence, but there may be very many; the log evidence may be too low"
        )
    if found:
        worst = max(found, key=lambda region: region.evidence)
        reasons.append(
            f"{num_starts} other starts found a region with {worst.evidence:.2g} times the evidence of all that the "
            f"guide covers, where it has {100 * worst.draws:.2g}% of its draws: fit with num_starts and "
            'base="mixture"; the log evidence is too low'
        )
    left_out = max([region.evidence for region in found], default=0.0)
    return _with_reasons(dataclasses.replace(diagnosis, left_out=left_out, num_starts=num_starts), reasons)


def _with_reasons(diagnosis: Diagnosis, reasons: list[str]) -> Diagnosis:
    every = (*diagnosis.reasons, *reasons)
    return dataclasses.replace(diagnosis, reasons=every, reliable=not every)
