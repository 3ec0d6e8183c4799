"""Simulation-based calibration: does a way of fitting recover what a model itself has drawn?"""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pyro
import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from scipy import stats
from torch import Tensor

from pyro_nf.diagnostics.progress import Progress
from pyro_nf.diagnostics.simulation import Unconditioned, drawn_data, is_factor, prior
from pyro_nf.diagnostics.weights import Floats, require_whole_data
from pyro_nf.interface.arguments import check_whole_number, unpacked
from pyro_nf.interface.waits import one_at_a_time
from pyro_nf.programs.calls import takes_model_arguments
from pyro_nf.programs.matching import require_match
from pyro_nf.programs.program import Program, TracePair
from pyro_nf.programs.sites import is_data, is_latent

Ints = npt.NDArray[np.int64]
RankTable = dict[str, Ints]

# Central intervals whose coverage is counted.
_LEVELS = np.arange(1, 20) / 20
# The chance that a right guide is called wrong, over all p-values together.
_ALPHA = 0.01
# Reasons that `print` shows.
_MAX_REASONS = 5
# Seeds that a generator of torch takes.
_MAX_SEED = 2**64 - 1
# Fewer simulations can show nothing.
_MIN_SIMULATIONS = 20


@dataclass(frozen=True)
class Calibration:
    r"""How the true latents of simulated data rank among a guide's draws, `n` simulations that did not fail.

    Attributes:
        ranks: Draws below the truth, `{site: (n, *shape)}`, from 0 to `num_samples`; uniform for an exact posterior.
        probabilities: Share of the draws below the truth, `{site: (n, *shape)}`: VSBC's p, symmetric about 1/2 for a
            guide without bias.
        uniformity: p-values of a chi-squared test that ranks are uniform, `{site: shape}` (SBC).
        symmetry: p-values of the Kolmogorov-Smirnov distance between p and 1 - p, `{site: shape}` (VSBC).
        levels: Of central intervals, 0.05 to 0.95, `(19,)`.
        coverage: Share of the simulations whose truth lies in the guide's interval, `{site: (19, *shape)}`.
        coverage_se: The binomial error of that share for an exact posterior, `(19,)`.
        num_samples: Draws of the guide.
        failures: What went wrong, `{number of the simulation, from 0: sentence}`.
        calibrated: Whether nothing speaks against the guide.
        reasons: What does, a sentence each.
    """

    ranks: RankTable = field(repr=False)
    probabilities: dict[str, Floats] = field(repr=False)
    uniformity: dict[str, Floats]
    symmetry: dict[str, Floats]
    levels: Floats = field(repr=False)
    coverage: dict[str, Floats] = field(repr=False)
    coverage_se: Floats = field(repr=False)
    num_samples: int
    failures: dict[int, str]
    calibrated: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        num = len(next(iter(self.ranks.values())))
        lines = [f"{num} simulations, {self.num_samples} draws of the guide each"]
        if self.failures:
            first, sentence = next(iter(self.failures.items()))
            numbers = ", ".join(map(str, self.failures))
            lines[0] += f"; {len(self.failures)} more failed ({numbers}; number {first} by {sentence})"
        covered = np.concatenate([each[_level(0.9)].reshape(-1) for each in self.coverage.values()])
        lines.append(
            f"90% intervals hold the truth in {100 * covered.min():.0f}% to {100 * covered.max():.0f}% "
            f"(+- {100 * self.coverage_se[_level(0.9)]:.0f}%) of the simulations, over {len(covered)} latents"
        )
        if self.calibrated:
            lines.append("calibrated: ranks are uniform and not off to a side, as far as so many simulations show")
        else:
            rest = len(self.reasons) - _MAX_REASONS
            lines += ["NOT calibrated:", *(f"  {reason}" for reason in self.reasons[:_MAX_REASONS])]
            lines += [f"  and {rest} more"] if rest > 0 else []
        return "\n".join(lines)


@one_at_a_time
@takes_model_arguments
def calibrate(
    model: Callable[..., Any],
    fit: Callable[[Callable[[], Any]], Callable[..., Any]],
    *args: Any,
    num_simulations: int = 100,
    num_samples: int = 1000,
    num_workers: int = 1,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Fit to data that the model has drawn, many times, and rank the latents behind them among the guide's draws.

    Averaged over the model's own data, an exact posterior holds the truth at each of its quantiles as often as it says:
    ranks are uniform. A posterior too narrow has too many ranks at both ends, one that is biased at one end. k-hat
    judges the fit to the data at hand; this judges the way of fitting, over all data that the model thinks possible.

    Ctrl-C ends it: the simulations done by then are judged, with a warning, if there are 20 or more; else it is raised.

    Args:
        model: The Pyro model, with proper priors, observed sites, and no `pyro.factor`.
        fit: Takes a model without arguments, conditioned on simulated data, and returns a fitted guide for it. It makes
            its guide anew on each call.
        *args: The model's arguments, whose data only give the shapes; or all in one `Arguments`.
        num_simulations: Simulations, at least 20.
        num_samples: Draws of the guide in each, at least 100.
        num_workers: Processes that share the simulations, each on one thread. What `fit` and the model refer to is sent
            to them by cloudpickle: they may come from a notebook.
        seed: Makes the result reproducible, with any number of workers, and leaves the global random state as it was.
            `None` draws from the global state.
        progress: Whether to show a bar, on stderr, if it takes longer than about two seconds.
        **kwargs: The model's keyword arguments.

    Returns:
        Ranks, tests and a verdict to `print`. A simulation that fails is counted there and named.

    Raises:
        ValueError: If a number is too small, a plate is subsampled, the model cannot be simulated, an option may be
            meant for the model, or `fit` fails in all simulations.
        KeyboardInterrupt: If Ctrl-C comes before 20 simulations are done.

    Warns:
        UserWarning: If Ctrl-C ends it.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), "Validating Bayesian inference algorithms with
        simulation-based calibration", arXiv:1804.06788, algorithm 1; Yao, Vehtari, Simpson, Gelman (2018), "Yes, but
        did it work?", arXiv:1802.02538, section 3.2; Butler (1969), "A test for symmetry using the sample distribution
        function", Annals of Mathematical Statistics 40(6).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import calibrate
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def fit(simulated):  # the prior: as wide as it should be, on average
        ...     return lambda: pyro.sample("mu", dist.Normal(0.0, 1.0))
        >>> print(calibrate(model, fit, torch.tensor(0.0), num_simulations=20, seed=0))  # doctest: +ELLIPSIS
        20 simulations, 1000 draws of the guide each
        90% intervals hold the truth in ... of the simulations, over 1 latents
        calibrated: ranks are uniform and not off to a side, as far as so many simulations show
    """
    num_simulations = check_whole_number("num_simulations", num_simulations, _MIN_SIMULATIONS)
    num_samples = check_whole_number("num_samples", num_samples, 100)
    num_workers = check_whole_number("num_workers", num_workers)
    seed = None if seed is None else check_whole_number("seed", seed, 0, _MAX_SEED)
    shown = Progress("calibrate", progress)
    args, kwargs = unpacked(args, kwargs)
    bound = partial(model, *args, **kwargs)
    _check_simulable(bound)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (num_simulations,), generator=generator).tolist()
    tasks = [joblib.delayed(_simulate)(bound, fit, num_samples, each) for each in seeds]
    outcomes = _until_interrupted(tasks, num_workers, shown)
    failures = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, str)}
    succeeded = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if not succeeded:
        raise ValueError(f"fit failed in all {len(outcomes)} simulations, in the first by {failures[0]}")
    return _judge({name: np.stack([each[name] for each in succeeded]) for name in succeeded[0]}, num_samples, failures)


def _until_interrupted(tasks: list[Any], num_workers: int, shown: Progress) -> list[RankTable | str]:
    """Return the simulations' outcomes, in their order: of all, or of those done before Ctrl-C if they suffice."""
    outcomes: list[RankTable | str] = []
    running = joblib.Parallel(n_jobs=num_workers, backend="loky", return_as="generator")(tasks)
    with closing(running), _noted_interrupt() as interrupts:
        try:
            for outcome in shown.over("simulations", running, len(tasks)):
                if interrupts:  # which `fit` has taken for its own, as FlowSVI does: this one is not fitted to its end
                    break
                outcomes.append(outcome)
        except KeyboardInterrupt:
            interrupts.append(True)
    if interrupts:
        if len(outcomes) < _MIN_SIMULATIONS:
            raise KeyboardInterrupt
        warnings.warn(f"interrupted: {len(outcomes)} of {len(tasks)} simulations are judged", stacklevel=4)
    return outcomes


@contextmanager
def _noted_interrupt() -> Iterator[list[bool]]:
    """Yield a list that Ctrl-C puts something into, before what it does else."""
    noted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    # Other threads get no signals, and a process in the background ignores this one.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(True)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _check_simulable(model: Callable[[], Any]) -> None:
    program = Program(model, prior(model)).bind()
    try:
        with _on_its_own():
            require_whole_data(program)
    except NotImplementedError as error:
        raise ValueError(
            f"model must have a sampler for each site, such as improper priors lack; got {error!r}"
        ) from error
    sites = program.spec.traces.model.nodes
    factors = [name for name, site in sites.items() if is_data(site) and is_factor(site)]
    if factors:
        raise ValueError(f"model must not have a pyro.factor, which nothing can be drawn from; got {factors[0]!r}")
    if not any(map(is_data, sites.values())):
        raise ValueError("model must have observed sites, to draw data for; it has none")


def _simulate(
    model: Callable[[], Any],
    fit: Callable[[Callable[[], Any]], Callable[..., Any]],
    num_samples: int,
    seed: int,
) -> RankTable | str:
    """Return the ranks of one simulation, or what went wrong."""
    with _on_its_own():
        pyro.set_rng_seed(seed)
        try:
            return _ranks(model, fit, num_samples)
        except Exception as error:  # whatever the user's `fit` raises: counted and named, not lost
            return f"{type(error).__name__}: {error}"


@contextmanager
def _on_its_own() -> Iterator[None]:
    """Have one thread and an empty parameter store, and leave these and the random state as they were."""
    threads, state = torch.get_num_threads(), get_rng_state()
    torch.set_num_threads(1)
    try:
        with pyro.get_param_store().scope():
            yield
    finally:
        torch.set_num_threads(threads)
        set_rng_state(state)


def _ranks(
    model: Callable[[], Any],
    fit: Callable[[Callable[[], Any]], Callable[..., Any]],
    num_samples: int,
) -> RankTable:
    with torch.no_grad(), Unconditioned():
        trace = poutine.trace(model).get_trace()
    data = drawn_data(trace)
    truth = {name: site["value"] for name, site in trace.nodes.items() if is_latent(site) and name not in data}

    def simulated() -> Any:
        return poutine.condition(model, data=data)()

    def latents(particle: TracePair) -> dict[str, Tensor]:
        return {name: particle.model.nodes[name]["value"] for name in truth}

    guide = fit(simulated)
    if not callable(guide):
        raise ValueError(f"fit must return a guide; got a {type(guide).__name__}")
    program = Program(simulated, guide).bind()
    require_match(program)
    draws = program.vmap_in_chunks(latents, num_samples)
    return {name: _rank(name, value, draws[name]) for name, value in truth.items()}


def _rank(name: str, truth: Tensor, draws: Tensor) -> Ints:
    if not bool(draws.isfinite().all()):
        raise ValueError(f"the guide's draws of {name!r} are not finite")
    ties = (draws == truth).sum(0)
    # A truth between equal draws stands at a random place among them.
    rank = (draws < truth).sum(0) + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()
    result: Ints = rank.cpu().numpy()
    return result


def _judge(ranks: RankTable, num_samples: int, failures: dict[int, str]) -> Calibration:
    num = len(next(iter(ranks.values())))
    probabilities = {name: each / num_samples for name, each in ranks.items()}
    uniformity = {name: _each(_uniformity, each, num_samples) for name, each in ranks.items()}
    symmetry = {name: _each(_symmetry, each) for name, each in probabilities.items()}
    # How far from the middle of its num_samples + 1 places a rank is, as the level of a central interval.
    depth = {name: np.abs(2 * (each + 0.5) / (num_samples + 1) - 1) for name, each in ranks.items()}
    coverage = {name: np.stack([(each <= level).mean(0) for level in _LEVELS]) for name, each in depth.items()}
    coverage_se = np.sqrt(_LEVELS * (1 - _LEVELS) / num)
    threshold = _ALPHA / (2 * sum(each.size for each in uniformity.values()))
    reasons = []
    for name, p_values in uniformity.items():
        covered, below = (each.reshape(len(each), -1).T for each in (coverage[name], probabilities[name]))
        for place, index in enumerate(np.ndindex(p_values.shape)):
            if p_values[index] < threshold:
                shape = _shape((covered[place] - _LEVELS) / coverage_se)
                reasons.append(f"{entry_label(name, index)}: {shape} (ranks not uniform, p = {p_values[index]:.1g})")
            if symmetry[name][index] < threshold:
                side = "low" if below[place].mean() > 0.5 else "high"
                reasons.append(f"{entry_label(name, index)}: draws too {side} (VSBC, p = {symmetry[name][index]:.1g})")
    return Calibration(
        ranks=ranks,
        probabilities=probabilities,
        uniformity=uniformity,
        symmetry=symmetry,
        levels=_LEVELS,
        coverage=coverage,
        coverage_se=coverage_se,
        num_samples=num_samples,
        failures=failures,
        calibrated=not reasons,
        reasons=tuple(reasons),
    )


def _each(test: Callable[..., float], values: npt.NDArray[Any], *args: Any) -> Floats:
    """Apply a test along the first dimension, to each entry of a site."""
    return np.asarray(np.apply_along_axis(test, 0, values, *args), dtype=np.float64)


def _uniformity(ranks: Ints, num_samples: int) -> float:
    """The p-value of a chi-squared test, in 4 to 20 bins, of ten simulations each if there are enough."""
    num_bins = min(20, max(4, len(ranks) // 10))
    places = np.bincount(np.arange(num_samples + 1) * num_bins // (num_samples + 1))
    counts = np.bincount(ranks * num_bins // (num_samples + 1), minlength=num_bins)
    return float(stats.chisquare(counts, places * len(ranks) / (num_samples + 1)).pvalue)


def _symmetry(probabilities: Floats) -> float:
    r"""The p-value of the Kolmogorov-Smirnov distance D between p and 1 - p.

    The two are one sample, mirrored, so that the tables for two independent ones reject too often. `n D` is how far
    from zero a walk gets whose steps are the sides of 1/2 on which the p lie, the outermost p first: the steps of n
    fair coins, if p is symmetric (Butler 1969).
    """
    num = len(probabilities)
    height = round(num * stats.ks_2samp(probabilities, 1 - probabilities).statistic)
    if height == 0:
        return 1.0
    inside = np.zeros(2 * height + 1)  # chances of a walk that has not yet been at +-height, by where it is
    inside[height] = 1.0
    for _ in range(num):
        inside[1:-1] = (inside[:-2] + inside[2:]) / 2
    return max(0.0, float(1 - inside[1:-1].sum()))


def _shape(z: Floats) -> str:
    """Say in words how coverage departs from its levels, in standard errors."""
    worst = z[np.abs(z).argmax()]
    if abs(worst) < 3:
        return "posterior of another shape"
    return "posterior too narrow" if worst < 0 else "posterior too wide"


def _level(level: float) -> int:
    return int(np.abs(_LEVELS - level).argmin())


def entry_label(name: str, index: tuple[int, ...]) -> str:
    """Name an entry of a site: `theta[0, 1]`."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name
