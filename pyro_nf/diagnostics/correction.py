"""Draws of the posterior itself, made from a guide's draws and their importance weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_nf.compiler.functorch import standard_gamma
from pyro_nf.diagnostics.diagnosis import find_names
from pyro_nf.diagnostics.moments import Moments
from pyro_nf.diagnostics.progress import Progress
from pyro_nf.diagnostics.verdict import Evidence, Verdict, decide, mean_error
from pyro_nf.diagnostics.weights import Floats, log_densities, pareto_smooth, require_whole_data, summarize
from pyro_nf.interface.arguments import check_choice, check_number, check_whole_number, unpacked
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.coordinates import coordinates
from pyro_nf.programs.matching import require_weights
from pyro_nf.programs.program import BoundProgram, Program, Randomness, TracePair
from pyro_nf.programs.sites import is_deterministic, is_latent

Method = Literal["resample", "psis", "imh"]

# Fewer weights than this show no tail.
_LEAST = 100


@dataclass(frozen=True)
class CorrectedPosterior:
    """Draws of the posterior, as far as a guide's weights can correct them.

    Attributes:
        draws: `{site: (num_samples, *shape)}` of the latent sites, as `Predictive(model, draws)` takes them.
        deterministic: `{site: (num_samples, *shape)}` of the deterministic sites at the same draws and the arguments
            given here; not for `Predictive`, which would keep them as they are for other arguments.
        log_weights: Their normalised log weights, `(num_samples,)`: all equal unless `method` is "psis".
        method: How they were made.
        khat: Pareto shape of the proposals' weights.
        ess: Effective number of the proposals.
        acceptance_rate: Share of the proposals that the chain moved to; NaN unless `method` is "imh".
        mean_error: About the error of a mean of these draws, in posterior standard deviations: of sampling, and of
            tails that no draw shows.
        notes: What else to know, a sentence each: how far off the guide's own draws are, and what was not looked at.
    """

    draws: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_weights: Tensor
    method: str
    khat: float
    ess: float
    acceptance_rate: float
    mean_error: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        chain = f", {100 * self.acceptance_rate:.0f}% accepted" if self.method == "imh" else ""
        figures = f"{len(self.log_weights)} draws by {self.method}: k-hat {self.khat:.2f}, ESS {self.ess:.0f}{chain}"
        error = f"Their means have an error of about {self.mean_error:.1g} posterior sd."
        return " ".join((f"{figures}.", error, *(f"Note: {note}" for note in self.notes)))


@one_at_a_time
@takes_model_arguments
def corrected_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    method: Method = "resample",
    num_samples: int = 4000,
    num_proposals: int | None = None,
    proposal_df: float | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> CorrectedPosterior:
    r"""Correct a guide's draws by their importance weights `w = p(x, z) / q(z)`.

    - `"resample"`: some of many draws, each as often as its Pareto-smoothed weight says (systematic resampling):
      equally weighted draws, for whatever comes next.
    - `"psis"`: the draws as they are, with Pareto-smoothed weights: for means and other expectations, the least noise.
    - `"imh"`: an independence Metropolis chain that accepts the guide's next draw with probability
      `min(1, w' / w)`, thinned to `num_samples`; it starts at a resampled draw. Unsmoothed, so exact in the long run.

    Guides whose `diagnose` says "right" or "right after correction" are accepted, for the same figures of the weights
    decide. But no L-BFGS runs from other starts are made here, so that a mode in which the guide has no draws is
    missing in the corrected draws too, and nothing but a note says so: `diagnose` first.

    `Predictive(model, corrected.draws)(new_data)` predicts; draws by "psis" have weights, which it does not know of.

    Args:
        model: The Pyro model.
        guide: Its fitted guide: ours, Pyro's or hand-written.
        *args: The model's arguments: all the data, nothing subsampled; or all in one `Arguments`.
        method: "resample", "psis" or "imh".
        num_samples: Draws to return.
        num_proposals: Draws of the guide, at least 100; by default ten times `num_samples` and at least 1000, and
            `num_samples` for "psis", where the two are the same.
        proposal_df: Propose from the guide with the normals that it is made of replaced by Student-t's of so many
            degrees of freedom (10, say): a guide with too light tails then has weights that are bounded, for a few
            percent of the effective draws. For guides that are a bijection of normals, one for each coordinate.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.
        **kwargs: The model's keyword arguments.

    Raises:
        ValueError: If weights cannot help, because k-hat is not below its threshold (and the weights are not nearly
            flat) or there are fewer than 100 effective draws; if an option is out of range or may be meant for the
            model, a plate is subsampled, the guide does not match the model or has no density, or `proposal_df` is
            given for another kind of guide.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72); Tierney (1994), "Markov chains for
        exploring posterior distributions", section 2.3.3.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import corrected_posterior
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.3, 1.2))
        >>> _ = torch.manual_seed(0)
        >>> corrected = corrected_posterior(model, guide)
        >>> abs(float(corrected.draws["z"].mean())) < 0.1
        True
    """
    check_choice("method", method, get_args(Method))
    num_samples = check_whole_number("num_samples", num_samples, least=_LEAST if method == "psis" else 1)
    if num_proposals is None:
        num_proposals = num_samples if method == "psis" else max(10 * num_samples, 10 * _LEAST)
    num_proposals = check_whole_number("num_proposals", num_proposals, least=max(num_samples, _LEAST))
    if method == "psis" and num_samples != num_proposals:
        raise ValueError(f'num_proposals is num_samples for "psis"; got {num_proposals} and {num_samples}')
    args, kwargs = unpacked(args, kwargs)
    program = Program(model, guide).bind(*args, **kwargs)
    require_weights(program)
    require_whole_data(program)
    shown = Progress("corrected_posterior", progress)
    with shown.part("proposals", num_proposals) as advance:
        proposals = _propose(program, num_proposals, proposal_df, advance)
    log_weights, summary = proposals.log_weights, proposals.evidence.weights
    decision = decide(proposals.evidence)
    if decision.verdict is Verdict.NOT_RIGHT:
        raise ValueError(" ".join(decision.reasons))
    smoothed = pareto_smooth(log_weights)[0]
    acceptance_rate = math.nan
    equal = np.full(num_samples, -math.log(num_samples))
    if method == "psis":
        index, result = np.arange(num_samples), smoothed
    elif method == "resample":
        index, result = _systematic(smoothed, num_samples), equal
    else:
        states, acceptance_rate = _chain(log_weights, int(_systematic(smoothed, 1)[0]))
        index, result = states[np.linspace(0, num_proposals - 1, num_samples).round().astype(int)], equal
    draws, deterministic = (
        {name: value[torch.as_tensor(index, device=value.device)] for name, value in sites.items()}
        for sites in (proposals.latent, proposals.deterministic)
    )
    return CorrectedPosterior(
        draws=draws,
        deterministic=deterministic,
        log_weights=torch.as_tensor(result),
        method=method,
        khat=summary.khat,
        ess=summary.ess,
        acceptance_rate=acceptance_rate,
        mean_error=math.hypot(mean_error(summary), 0 if method == "psis" else num_samples**-0.5),
        notes=(*decision.reasons, *decision.notes),
    )


class _Proposals(NamedTuple):
    """Draws of the guide, `{site: (number, *shape)}`, their log weights, `(number,)`, and what these say of it."""

    latent: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_weights: Floats
    evidence: Evidence


def _propose(
    program: BoundProgram,
    number: int,
    df: float | None,
    advance: Callable[[int], object],
) -> _Proposals:
    particle = program.spec.traces
    names, obstacle = find_names(particle)
    groups = {
        "latent": [name for name, site in particle.model.nodes.items() if is_latent(site)],
        "deterministic": [name for name, site in particle.model.nodes.items() if is_deterministic(site)],
    }

    def extract(particle: TracePair) -> dict[str, Tensor]:
        values = {
            f"{group} {name}": torch.as_tensor(particle.model.nodes[name]["value"])
            for group, members in groups.items()
            for name in members
        }
        return values | log_densities(particle) | ({"point": coordinates(particle.model)} if names else {})

    parts, moments, run = [], Moments(), program.repeated(extract)
    for draws, log_ratio in _noise(program, number, df):
        part = run(draws)
        part["log_w"] = part.pop("log_p").double() - part.pop("log_q").double() - log_ratio
        if names:
            moments.add(part["log_w"], part.pop("point"))
        parts.append(part)
        advance(len(draws.noise))
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    log_weights = found["log_w"].cpu().numpy()
    weights = summarize(log_weights[None])
    option = "num_proposals"
    evidence = (
        Evidence(weights=weights, names=names, misfit=moments.compare(), option=option)
        if names
        else Evidence(weights=weights, notes=(obstacle,), option=option)
    )
    latent, deterministic = ({name: found[f"{group} {name}"] for name in groups[group]} for group in groups)
    return _Proposals(latent, deterministic, log_weights, evidence)


def _noise(program: BoundProgram, number: int, df: float | None) -> Iterator[tuple[Randomness, Tensor | float]]:
    """Yield the noise of the proposals, and by how much its log density is above that of the guide's normals."""
    if df is None:
        yield from ((draws, 0.0) for draws in program.chunks(number))
        return
    df = check_number("proposal_df", df, above=0.0)
    _require_bijection(program)
    student, normal = torch.distributions.StudentT(df), torch.distributions.Normal(0.0, 1.0)
    for draws in program.chunks(number):
        # Normals over the root of independent chi-squares over df.
        chi_square = 2 * standard_gamma(torch.full_like(draws.noise, df / 2))
        noise = draws.noise * (df / chi_square).sqrt()
        wide = noise.double()
        yield draws._replace(noise=noise), (student.log_prob(wide) - normal.log_prob(wide)).sum(-1)


def _require_bijection(program: BoundProgram) -> None:
    """Raise a `ValueError` unless the guide's draws are a function of as many normals as there are coordinates."""

    def extract(particle: TracePair) -> dict[str, Tensor]:
        return {"point": coordinates(particle.model)}

    draws = program.draw(10)
    with torch.no_grad():
        first, again = (program.vmap_traces(extract, draws)["point"] for _ in range(2))
    if first.shape != draws.noise.shape or not torch.equal(first, again):
        raise ValueError(
            "proposal_df is for guides that map one normal to each latent coordinate; this one draws "
            f"{draws.noise.shape[1]} normals for {first.shape[1]} coordinates"
            + ("" if torch.equal(first, again) else ", and other variables (its base is wide already)")
        )


def _systematic(log_weights: Floats, number: int) -> np.ndarray:
    """Return indices, each as often as `number` times its weight, rounded up or down at random."""
    edges = np.exp(log_weights).cumsum()
    points = (float(torch.rand(())) + np.arange(number)) / number * edges[-1]
    # In random order, so that any part of the draws is a sample too.
    index: np.ndarray = np.minimum(edges.searchsorted(points), len(edges) - 1)[torch.randperm(number).numpy()]
    return index


def _chain(log_weights: Floats, state: int) -> tuple[np.ndarray, float]:
    """Return the states of an independence Metropolis chain over the proposals, and how often it moved."""
    log_uniform = torch.rand(len(log_weights), dtype=torch.float64).log().numpy()
    states = np.empty(len(log_weights), dtype=np.int64)
    moves = 0
    for proposal, threshold in enumerate(log_uniform):
        if threshold < log_weights[proposal] - log_weights[state]:
            state = proposal
            moves += 1
        states[proposal] = state
    return states, moves / len(states)
