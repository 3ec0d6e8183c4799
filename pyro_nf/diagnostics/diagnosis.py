"""Can this posterior be trusted? Several figures of fresh draws, and a verdict in words."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.improper import FlatDirections, flat_directions
from pyro_nf.diagnostics.moments import Moments
from pyro_nf.diagnostics.progress import Progress, counted
from pyro_nf.diagnostics.regions import search
from pyro_nf.diagnostics.stein import stein_residual
from pyro_nf.diagnostics.verdict import Evidence, Gradients, Verdict, decide
from pyro_nf.diagnostics.weights import WeightSummary, log_densities, require_whole_data, summarize
from pyro_nf.interface.arguments import check_whole_number, unpacked
from pyro_nf.interface.renamed import renamed_attribute
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.coordinates import LogDensity, coordinate_names, coordinates, model_log_density
from pyro_nf.programs.matching import require_weights
from pyro_nf.programs.program import BoundProgram, Program, TracePair
from pyro_nf.programs.traces import in_words

# Climbs need the whole Hessian.
_MAX_DIM = 500
# Draws that tell how wide a guide is along an improper direction: to 1%.
_NUM_WIDTH = 10_000
# Draws with a gradient, and numbers that their coordinates may take together.
_NUM_SCORES, _PER_COORDINATE, _MAX_NUMBERS = 1000, 10, 2**24


@dataclass(frozen=True, kw_only=True)
class Diagnosis(WeightSummary):
    r"""How far a guide's draws can be trusted: what their weights say (`WeightSummary`), and other figures.

    What was not looked at is NaN, and `notes` says why. "Posterior sd" is of a coordinate: a latent on the real line.

    Attributes:
        mean_shift: By how many posterior sds the weights move the mean of the coordinate that they move most.
        sd_ratio: The guide's sd over the weighted one, of the coordinate where it is furthest from 1.
        stein_residual: How many sds off the guide's center lies by the gradients g of the log density,
            `sqrt(E[g]' cov(g)^-1 E[g])`, which is zero if `q = p`.
        stein_noise: The residual that Monte Carlo error alone would give.
        missed_mass: Evidence of the largest region that `num_starts` L-BFGS runs found and the guide has too few draws
            in, over the evidence where they are; 0 if none. Of a mode it is the inner half that counts: 1/6 if the
            guide has three quarters of the posterior and leaves out the rest.
        num_starts: L-BFGS runs.
        verdict: `Verdict.RIGHT`, `RIGHT_AFTER_CORRECTION` or `NOT_RIGHT`; they equal the strings "right", "right after
            correction" and "not right".
        reasons: What speaks against "right", a few sentences for each cause: what was found, and what to do.
        notes: What else to know, a sentence each: what was not looked at, or speaks against the guide only at first
            sight.
    """

    mean_shift: float = math.nan
    sd_ratio: float = math.nan
    stein_residual: float = math.nan
    stein_noise: float = math.nan
    missed_mass: float = math.nan
    num_starts: int = 0
    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    left_out = renamed_attribute("left_out", "missed_mass")

    @property
    def reliable(self) -> bool:
        """Whether the guide's own draws can be used as they are: whether the verdict is "right"."""
        return self.verdict is Verdict.RIGHT

    def __str__(self) -> str:
        """A few lines for people."""
        errors = (
            f": the guide's own means are off by at most {abs(self.mean_shift):.2f} posterior sd, its sds by at most "
            f"{100 * abs(self.sd_ratio - 1):.1f}%"
            if self.reliable and not math.isnan(self.mean_shift)
            else ""
        )
        return " ".join(
            (
                f"ELBO {self.elbo:.3f} +- {self.elbo_mcse:.3f}, log evidence {self.log_evidence:.3f} +- "
                f"{self.log_evidence_se:.3f}, k-hat {self.khat:.2f} (below {self.khat_threshold:.2f} is good), "
                f"ESS {100 * self.ess_fraction:.1f}%. Verdict: {self.verdict}{errors}.",
                *self.reasons,
                *(f"Note: {note}" for note in self.notes),
            )
        )


@one_at_a_time
@takes_model_arguments
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    num_sets: int = 5,
    num_starts: int = 8,
    progress: bool = True,
    **kwargs: Any,
) -> Diagnosis:
    """Judge a guide by fresh draws: their importance weights, the gradients there, and L-BFGS runs from elsewhere.

    Draws are run in parts and reduced at once: only their weights are kept, so a million draws take no more memory
    than a thousand. A single k-hat scatters by a tenth or two, so the one reported is the median over `num_sets` sets.

    The verdict is

    - *right* if the guide's own draws can be used: by the weights each coordinate's mean is within 0.1 posterior sd and
      each sd within 10%, and the divergence KL(q || p) is below 0.1 nats, all by more than their Monte Carlo errors;
      and none of the draws is outside the model's support, and the gradients do not pull the center by more than
      0.5 sd;
    - *right after correction* if they cannot, but the weights can correct them, as `corrected_posterior` does: k-hat is
      below its threshold, or the weights are nearly flat (a divergence below 0.05 nats, and k-hat below 1; below 0.01
      nats a long tail has next to no weight, whatever k-hat, and `notes` says so), and at least 100 draws are
      effective;
    - *not right* if weights cannot help, or if one of `num_starts` L-BFGS runs (from uniform points in the cube from
      -2 to 2 on the real line and their opposites) finds a region with over 1% of the evidence and over twice what the
      guide has there. The weights, which are of the guide's own draws, cannot show it; nor can L-BFGS runs show what
      none of them finds.

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled; or all in one `Arguments`.
        num_samples: Draws in a set.
        num_sets: Sets.
        num_starts: L-BFGS runs, for up to 500 coordinates; 0 for none.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a plate is subsampled, a number is no whole number, too small or may be meant for the model, or
            the guide does not match the model or has no density.

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
        >>> print(diagnose(model, AutoFlow(model)).verdict)  # the guide starts as just this normal
        right
    """
    num_samples = check_whole_number("num_samples", num_samples, least=100)
    num_sets = check_whole_number("num_sets", num_sets)
    num_starts = check_whole_number("num_starts", num_starts, least=0)
    args, kwargs = unpacked(args, kwargs)
    shown = Progress("diagnose", progress)
    program = Program(model, guide).bind(*args, **kwargs)
    require_weights(program)
    require_whole_data(program)
    names, obstacle = find_names(program.spec.traces)

    def extract(particle: TracePair) -> dict[str, Tensor]:
        return log_densities(particle) | ({"point": coordinates(particle.model)} if names else {})

    density = Density(model_log_density(program.model, enumeration=program.spec.enumeration), program.num_numbers)
    improper = _improper(program, density, len(names)) if names else None
    moments, sets, run = Moments(), [], program.repeated(extract)
    with shown.part("weights of draws", num_sets * num_samples) as advance:
        for _ in range(num_sets):
            parts = []
            for draws in counted(program.chunks(num_samples), advance):
                found = run(draws)
                log_weights = found["log_p"].double() - found["log_q"].double()
                if improper:
                    log_weights = log_weights + improper.reference(found["point"]).double()
                parts.append(log_weights.cpu())
                if names:
                    moments.add(log_weights, found["point"])
            sets.append(torch.cat(parts).numpy())
    weights = summarize(np.stack(sets))
    evidence = Evidence(
        weights=weights,
        improper=improper.describe(names) if improper else "",
        without_density=in_words(program.without_density(2 * num_samples)) if weights.frac_zero_density else "",
    )
    if not names:
        return judge(replace(evidence, notes=(obstacle,)))
    if improper:
        density = Density(improper.made_proper(density.log_density), program.num_numbers)
    points, scores = _scores(program, density.log_density, len(names), shown)
    evidence = replace(evidence, names=names, misfit=moments.compare())
    if len(points) < 2:
        return judge(replace(evidence, notes=("No draw has a finite gradient of the log density.",)))
    evidence = replace(evidence, gradients=_gradients(points, scores, names))
    if len(names) > _MAX_DIM:
        note = f"Climbs are made in up to {_MAX_DIM} coordinates; there are {len(names)} here."
        return judge(replace(evidence, notes=(note,)))
    if num_starts:
        evidence = replace(evidence, search=search(density, points, weights.log_evidence, num_starts, shown))
    return judge(evidence)


def _improper(program: BoundProgram, density: Density, dim: int) -> FlatDirections | None:
    """Find the directions along which the posterior is improper, in so many coordinates as L-BFGS runs are made in."""
    if dim > _MAX_DIM:
        return None

    def extract(particle: TracePair) -> dict[str, Tensor]:
        return {"point": coordinates(particle.model)}

    with torch.random.fork_rng():
        points = program.vmap_in_chunks(extract, 2 * dim + 10)["point"]
        found = flat_directions(density.gradients, points)
        if not found:
            return None
        return found.as_wide_as(program.vmap_in_chunks(extract, _NUM_WIDTH)["point"])


def judge(evidence: Evidence) -> Diagnosis:
    """Put the figures and the verdict on them together."""
    decision = decide(evidence)
    return Diagnosis(
        **vars(evidence.weights),
        **_figures(evidence),
        verdict=decision.verdict,
        reasons=tuple(" ".join(filter(None, (reason, decision.correction))) for reason in decision.reasons),
        notes=decision.notes,
    )


def find_names(particle: TracePair) -> tuple[list[str], str]:
    """Return a name for each coordinate, or none and a sentence on why there are no coordinates."""
    try:
        coordinates(particle.model)
        return coordinate_names(particle.model), ""
    except ValueError as error:
        return [], f"Means, sds and gradients were not looked at: {error}."


def _figures(evidence: Evidence) -> dict[str, Any]:
    """Return what was looked at besides the weights, as attributes of a `Diagnosis`."""
    figures: dict[str, Any] = {}
    if evidence.misfit is not None:
        shift, log_ratio = evidence.misfit.shift, evidence.misfit.log_ratio
        figures["mean_shift"] = float(shift[shift.abs().argmax()])
        figures["sd_ratio"] = math.exp(float(log_ratio[log_ratio.abs().argmax()]))
    if evidence.gradients is not None:
        figures["stein_residual"], figures["stein_noise"] = evidence.gradients.residual
    if evidence.search is not None:
        region = evidence.search.missed
        figures["missed_mass"] = 0.0 if region is None else region.evidence
        figures["num_starts"] = evidence.search.num_starts
    return figures


def _scores(
    program: BoundProgram,
    log_density: LogDensity,
    dim: int,
    shown: Progress,
) -> tuple[Tensor, Tensor]:
    """Return draws with a finite gradient of the log density, `(n, dim)`, and the gradients there."""

    def extract(particle: TracePair) -> dict[str, Tensor]:
        point = coordinates(particle.model)
        score, value = torch.func.grad_and_value(log_density)(point)
        return {"point": point, "score": score + 0.0 * value}  # none where there is no density

    number = max(_NUM_SCORES, _PER_COORDINATE * dim if dim <= _MAX_DIM else 0)
    number = min(number, max(_MAX_NUMBERS // dim, 2))
    found = shown.map("gradients at draws", program, extract, number)
    finite = found["score"].isfinite().all(-1) & found["point"].isfinite().all(-1)
    return found["point"][finite], found["score"][finite]


def _gradients(points: Tensor, scores: Tensor, names: list[str]) -> Gradients:
    """Summarise draws of the guide and the gradients there, `(n, dim)` each."""
    sds = points.double().std(0).tolist()
    return Gradients(
        residual=stein_residual(scores),
        widest=max(zip(names, sds, strict=True), key=lambda pair: pair[1]),
    )
