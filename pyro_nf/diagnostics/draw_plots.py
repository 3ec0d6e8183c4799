"""Pictures of draws: posteriors over each other, and a guide's flow layer by layer; they need matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from pyro_nf.diagnostics.calibration import entry_label
from pyro_nf.diagnostics.weights import Floats
from pyro_nf.flows import Flow, Paced, Sequential, unpaced
from pyro_nf.interface.arguments import check_has, check_whole_number, checked

Array = npt.NDArray[Any]

# Points of a scatter plot: more hide each other.
_MAX_POINTS = 1000
# Shares of each tail that lie outside of a pair plot.
_OUTSIDE = 0.005
# Panels of a row.
_MAX_COLUMNS = 6


@checked
def plot_pairs(draws: Mapping[str, Any], var_names: Sequence[str] | None = None) -> Array:
    """Plot draws of several posteriors over each other: each pair of latents, and each latent alone.

    Axes end where 0.5% of the last posterior's draws lie beyond: give the one to compare with last.

    Args:
        draws: `{legend: draws}`: what `to_arviz` or `guide.sample_posterior` returned, or any
            `{site: (num_samples, *shape)}`.
        var_names: Sites, such as `"theta"`, or entries of them, `"theta[0]"`; all if left out.

    Returns:
        The axes, `(num_entries, num_entries)`.

    Raises:
        ValueError: If there are no draws, or a name is not among them.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import torch
        >>> from pyro_nf.diagnostics import plot_pairs
        >>> draws = {"mu": torch.randn(500), "theta": torch.randn(500, 2)}
        >>> plot_pairs({"guide": draws, "reference": draws}, var_names=["mu", "theta[1]"]).shape
        (2, 2)
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    if not draws:
        raise ValueError("draws must hold at least one posterior; got none")
    columns = {legend: _columns(legend, each, var_names) for legend, each in draws.items()}
    names = list(next(iter(columns.values())))
    num = len(names)
    figure, axes = plt.subplots(num, num, figsize=(2.2 * num + 1, 2.2 * num), squeeze=False, layout="constrained")
    limits = {name: _limits(values) for name, values in list(columns.values())[-1].items()}
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axis = axes[i, j]
            if j > i:
                axis.set_axis_off()
                continue
            for color, each in enumerate(columns.values()):
                if i == j:
                    grid = np.linspace(*limits[row], 200)
                    axis.plot(grid, stats.gaussian_kde(each[row])(grid), color=f"C{color}")
                else:
                    step = -(-len(each[row]) // _MAX_POINTS)
                    points = each[column][::step], each[row][::step]
                    axis.scatter(*points, s=6, color=f"C{color}", alpha=0.4, linewidths=0, rasterized=True)
                    axis.set_ylim(limits[row])
            axis.set_xlim(limits[column])
            axis.set_xlabel(column if i == num - 1 else "")
            axis.set_ylabel(row if j == 0 and i else "")
            axis.tick_params(labelbottom=i == num - 1, labelleft=j == 0 and i > 0, left=j < i)
            if i == j:
                axis.set_ylim(bottom=0)
                axis.spines[["left", "right", "top"]].set_visible(False)
    handles = [Line2D([], [], color=f"C{i}", marker="o", label=legend) for i, legend in enumerate(columns)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return axes


def plot_flow(guide: Any, num_samples: int = 2000) -> Array:
    """Plot how a two-dimensional guide's flow deforms its base: the base, then what each layer makes of it.

    Coordinates are those on the real line. Colours tell where in the base a draw comes from.

    Args:
        guide: An `AutoFlow` over two coordinates that has been called, or fitted.
        num_samples: Draws.

    Returns:
        The axes, `(num_panels,)`.

    Raises:
        ValueError: If the guide has another dimension, or `num_samples` is not positive.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_nf.diagnostics import plot_flow
        >>> from pyro_nf.guides import AutoFlow
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x**2, 0.5))
        >>> guide = AutoFlow(model)
        >>> _ = guide()
        >>> len(plot_flow(guide)) - 1  # layers, the affine one among them
        9
    """
    from matplotlib import pyplot as plt

    num_samples = check_whole_number("num_samples", num_samples)
    check_has("guide", guide, ("get_base_dist", "get_transform"), "a fitted AutoFlow over two coordinates")
    base = guide.get_base_dist()
    if tuple(base.event_shape) != (2,):
        raise ValueError(f"guide must be over two coordinates; got one over {tuple(base.event_shape)}")
    with torch.no_grad(), unpaced(guide):  # whose layers are maps by themselves
        points = base.sample((num_samples,))
        panels = [("base", points)]
        for number, layer in enumerate(_layers(guide.flow), 1):
            points = layer.forward_and_log_det(points)[0]
            panels.append((f"{number}: {type(layer).__name__}", points))
    angle = torch.atan2(panels[0][1][:, 1], panels[0][1][:, 0]).cpu().numpy()
    num_rows = -(-len(panels) // _MAX_COLUMNS)
    num_columns = -(-len(panels) // num_rows)
    size = (2.4 * num_columns, 2.6 * num_rows)
    _, grid = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    axes: Array = grid.ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, values) in zip(axes, panels, strict=False):
        x, y = values.cpu().numpy().T
        axis.scatter(x, y, c=angle, cmap="hsv", s=3, alpha=0.7, linewidths=0, rasterized=True)
        axis.set_title(title, fontsize="small")
        axis.set(xlim=_limits(x), ylim=_limits(y))
    axes[0].set(xlabel="coordinate 1", ylabel="coordinate 2")
    return axes[: len(panels)]


def _columns(legend: str, draws: Any, var_names: Sequence[str] | None) -> dict[str, Floats]:
    """Return the entries asked for, `{"theta[0]": (num_samples,)}`."""
    check_has(f"draws[{legend!r}]", draws, ("items", "values"), "a dictionary of draws, or what to_arviz returns")
    if "posterior" in draws:  # of to_arviz
        dataset = draws["posterior"]
        draws = {name: dataset[name].values.reshape(-1, *dataset[name].shape[2:]) for name in dataset.data_vars}
    entries = {
        entry_label(name, index): (name, np.asarray(value)[(slice(None), *index)])
        for name, value in draws.items()
        for index in np.ndindex(*value.shape[1:])
    }
    if var_names is None:
        var_names = list(draws)
    result: dict[str, Floats] = {}
    for asked in var_names:
        found = {label: values for label, (name, values) in entries.items() if asked in (label, name)}
        if not found:
            raise ValueError(f"var_names must be sites or entries of {legend!r}, {', '.join(draws)}; got {asked!r}")
        if not all(len(values) for values in found.values()):
            raise ValueError(f"draws must hold at least one draw; {legend!r} has none of {asked!r}")
        result |= found
    return result


def _limits(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [_OUTSIDE, 1 - _OUTSIDE])
    margin = 0.05 * (high - low)
    return float(low - margin), float(high + margin)


def _layers(flow: Flow) -> Iterator[Flow]:
    if isinstance(flow, Sequential):
        for each in flow._parts():
            yield from _layers(each)
    elif isinstance(flow, Paced):
        yield from _layers(flow.flow)
    else:
        yield flow
