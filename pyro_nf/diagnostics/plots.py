"""Pictures of a fit and of how good it is; they need matplotlib (`pip install "pyro-nf[plot]"`)."""

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from torch import Tensor

from pyro_nf.diagnostics.calibration import Calibration, entry_label
from pyro_nf.diagnostics.weights import Floats, pareto_smooth, summarize
from pyro_nf.interface.arguments import check_has

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Latents that a legend can name.
_MAX_NAMES = 8


def plot_elbo(result: Any) -> "Axes":
    """Plot the ELBO of each step of a fit, its evaluations, where it reached a plateau, and what was kept.

    Args:
        result: What `FlowSVI.run` returned.

    Returns:
        The axes; `plot_elbo(result).figure.savefig("elbo.pdf")`.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.diagnostics import plot_elbo
        >>> from pyro_nf.guides import AutoFlow
        >>> from pyro_nf.inference import FlowSVI
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.5, 0.3))
        >>> result = FlowSVI(model, AutoFlow(model), max_steps=300, compile=False, seed=0, progress=False).run()
        >>> plot_elbo(result).get_ylabel()
        'ELBO (nats)'
    """
    check_has("result", result, ("history", "evaluations"), "what FlowSVI.run returned")
    from matplotlib import pyplot as plt

    _, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    history = result.history.detach().cpu().numpy()
    steps, elbos, errors = map(np.array, zip(*result.evaluations, strict=True))
    axis.plot(np.arange(1, len(history) + 1), history, color="0.75", linewidth=0.6, label="each step")
    axis.errorbar(steps, elbos, 2 * errors, color="C0", marker=".", capsize=2, label=r"evaluation $\pm$ 2 errors")
    if result.plateau_step is not None:
        axis.axvline(result.plateau_step, color="C2", linestyle="--", label=f"plateau, step {result.plateau_step}")
    axis.axvline(result.best_step, color="C1", linestyle=":", label=f"best, step {result.best_step}")
    axis.axhline(
        result.elbo, color="C1", linewidth=0.8, label=rf"kept: {result.elbo:.2f} $\pm$ {result.elbo_mcse:.2f} nats"
    )
    # The first steps are far below: the scale is that of the later ones.
    later = np.concatenate([history[len(history) // 10 :], elbos[len(elbos) // 10 :]])
    low, high = np.quantile(later[np.isfinite(later)], [0.005, 0.995])
    margin = 0.1 * max(high - low, abs(result.elbo) * 1e-6)
    axis.set(
        xlabel="step",
        ylabel="ELBO (nats)",
        xlim=(0, result.steps),
        ylim=(low - margin, max(high, result.elbo) + margin),
        title="converged" if result.converged else "NOT converged",
    )
    axis.legend(loc="lower right", fontsize="small")
    return axis


def plot_weights(data: Any) -> "Axes":
    r"""Plot the tail of the importance weights `w = p(x, z) / q(z)` beside the Pareto distribution fitted to it.

    Both axes are logarithmic: a Pareto tail of shape k comes near a line, the steeper the heavier. The weights' tail
    lies on the fitted one, or k-hat says nothing.

    Args:
        data: What `to_arviz` returned, or log weights, `(num_samples,)`.

    Returns:
        The axes.

    Raises:
        ValueError: If there are none, or weights are NaN or infinite.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from pyro_nf.diagnostics import plot_weights
        >>> plot_weights(0.5 * np.random.default_rng(0).exponential(size=4000)).get_ylabel()
        'weight / mean weight'
    """
    from matplotlib import pyplot as plt

    log_weights = _log_weights(data)
    if not len(log_weights):
        raise ValueError("data must hold at least one draw; got none")
    found, order = summarize(log_weights[None]), np.argsort(-log_weights)
    smoothed, khat = pareto_smooth(log_weights)
    # Smoothing moves the tail alone, and normalises: what it did to the median is its constant.
    middle = order[len(order) // 2]
    smoothed = smoothed + log_weights[middle] - smoothed[middle]
    num_tail = int((np.abs(smoothed - log_weights) > 1e-6)[order].nonzero()[0].max(initial=-1)) + 1
    mean = np.logaddexp.reduce(log_weights) - np.log(len(log_weights))
    share = np.arange(1, len(order) + 1) / len(order)
    _, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.loglog(share, np.exp(log_weights[order] - mean), ".", color="C0", markersize=4, label="weights of the draws")
    if num_tail:
        fitted = np.sort(smoothed[order[:num_tail]])[::-1]
        comparison = "below" if khat < found.khat_threshold else "NOT below"
        axis.loglog(
            share[:num_tail],
            np.exp(fitted - mean),
            color="C1",
            label=rf"fitted Pareto tail, $\hat k$ = {khat:.2f}, {comparison} {found.khat_threshold:.2f}",
        )
        axis.axvline(share[num_tail - 1], color="0.6", linestyle=":", label=f"the tail: {num_tail} largest weights")
    axis.set(
        xlabel="share of the draws with such a weight or a larger one",
        ylabel="weight / mean weight",
        ylim=(np.exp(log_weights[order[9 * len(order) // 10]] - mean) / 2, None),  # the smallest weigh nothing
        title=f"{len(order):,} draws, {found.ess:,.0f} effective",
    )
    axis.legend(loc="lower left", fontsize="small")
    return axis


def plot_coverage(calibration: Calibration) -> "Axes":
    """Plot how often a guide's central intervals hold the truth beside how often they should.

    The grey band holds, at each level, the share of a right guide with 95% probability (binomial). Below the diagonal a
    posterior is too narrow, above it too wide.

    Args:
        calibration: What `calibrate` returned.

    Returns:
        The axes.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.diagnostics import calibrate, plot_coverage
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def fit(simulated):
        ...     return lambda: pyro.sample("mu", dist.Normal(0.0, 1.0))
        >>> found = calibrate(model, fit, torch.tensor(0.0), num_simulations=20, seed=0)
        >>> plot_coverage(found).get_title()
        '20 simulations: calibrated'
    """
    check_has("calibration", calibration, ("levels", "ranks"), "what calibrate returned")
    from matplotlib import pyplot as plt

    _, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    levels, num = calibration.levels, len(next(iter(calibration.ranks.values())))
    low, high = stats.binom.interval(0.95, num, levels)
    axis.fill_between(levels, low / num, high / num, color="0.85", label="95% band of a right guide")
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    lines = [
        (entry_label(name, index), each.T[index[::-1]])
        for name, each in calibration.coverage.items()
        for index in np.ndindex(*each.shape[1:])
    ]
    for i, (name, coverage) in enumerate(lines):
        label = name if i < _MAX_NAMES else f"{len(lines) - _MAX_NAMES} more" if i == _MAX_NAMES else None
        axis.plot(levels, coverage, marker=".", color=f"C{i}" if i < _MAX_NAMES else "0.6", linewidth=1, label=label)
    axis.set(
        xlabel="level of the central interval",
        ylabel="share of simulations whose truth it holds",
        title=f"{num} simulations: {'' if calibration.calibrated else 'NOT '}calibrated",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axis.legend(loc="upper left", fontsize="small")
    return axis


def _log_weights(data: Any) -> Floats:
    if isinstance(data, (np.ndarray, Tensor)):
        return np.asarray(data, dtype=np.float64).reshape(-1)
    check_has("data", data, ("get", "groups"), "what to_arviz returns, or log weights")
    stats = data["sample_stats"]
    return np.ravel(stats["log_p"] - stats["log_q"])
