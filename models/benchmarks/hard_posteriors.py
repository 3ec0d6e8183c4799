"""Posteriors that are known to be difficult, with what is known of them exactly."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import brentq
from torch import Tensor

from pyro_nf.interface.arguments import Positive, Size, checked, did_you_mean
from pyro_nf.models.benchmarks import fertility, motorcycle

# The rotations are drawn from this seed; RandomState is frozen, the same numbers in every version of NumPy.
_SEED = 0
# The wells' density is below 1e-100 beyond; the trapezoidal rule on so many points is exact to rounding.
_WELL_END, _WELL_POINTS = 6.0, 4001
# Of quadrature over the funnel's v: standard deviations on each side, and points.
_FUNNEL_END, _FUNNEL_POINTS = 10.0, 2001


class HardPosterior(NamedTuple):
    """A posterior, `model(*args)`, and its exact figures, `None` where they are not known.

    Attributes:
        name: One of `names()`.
        model: The Pyro model.
        args: The model's arguments.
        log_evidence: Log of the integral of the model's density, in nats.
        mean: Of each latent, `{site: (*shape)}`.
        sd: Of each latent, `{site: (*shape)}`.
        width: Distance between the 5% and the 95% quantile, for sites whose sd draws cannot tell: their fourth moment
            is too large.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    log_evidence: float | None = None
    mean: Mapping[str, Tensor] | None = None
    sd: Mapping[str, Tensor] | None = None
    width: Mapping[str, float] = {}


class DoubleWell(NamedTuple):
    """Figures of one coordinate of `many_wells`, by quadrature.

    Attributes:
        log_integral: Log of the integral of `exp(h(x))`.
        right_mass: P(x > 0), the mass of the well on the right.
        mean: E x.
        sd: Standard deviation of x.
    """

    log_integral: float
    right_mass: float
    mean: float
    sd: float


def funnel(scale: Tensor, num_leaves: int = 9) -> None:
    r"""Neal's funnel: `v ~ N(0, scale)`, `x_i ~ N(0, exp(v / 2))`.

    Within two standard deviations of v, the scale of x goes from 1/20 to 20. Mean 0; the sd of x is `exp(scale^2 / 4)`.

    Args:
        scale: Standard deviation of v, `()`; Neal's is 3.
        num_leaves: Number of x.

    References:
        Neal (2003), "Slice sampling", section 8.
    """
    v = pyro.sample("v", dist.Normal(torch.zeros_like(scale), scale))
    with pyro.plate("leaf", num_leaves):
        pyro.sample("x", dist.Normal(torch.zeros_like(v), (v / 2).exp()))


def banana(scale: Tensor, bend: Tensor) -> None:
    r"""Twisted normal: `x1 ~ N(0, scale)`, `x2 ~ N(-bend (x1^2 - scale^2), 1)`.

    Mean 0; the sd of x2 is `sqrt(1 + 2 bend^2 scale^4)`.

    Args:
        scale: Standard deviation of x1, `()`; 10 in the reference.
        bend: `()`; 0.03 in the reference is moderately and 0.1 strongly twisted.

    References:
        Haario, Saksman, Tamminen (1999), "Adaptive proposal distribution for random walk Metropolis algorithm",
        section 3, in two dimensions.
    """
    x1 = pyro.sample("x1", dist.Normal(torch.zeros_like(scale), scale))
    pyro.sample("x2", dist.Normal(-bend * (x1**2 - scale**2), torch.ones_like(scale)))


def many_wells(coefficients: Tensor, num_wells: int = 16) -> None:
    r"""Two modes in every other coordinate: the density is `prod_i exp(h(x_i) - v_i^2 / 2)`.

    `h(x) = c1 x + c2 x^2 - c4 x^4`. There are `2^num_wells` modes, all of them at once the product of the wells' two.

    Args:
        coefficients: c1, c2, c4, `(3,)`; 0.5, 6, 1 in the reference.
        num_wells: Number of x, and of v.

    References:
        Midgley, Stimper, Simm, Schölkopf, Hernández-Lobato (2023), "Flow annealed importance sampling bootstrap",
        arXiv:2208.01893, section 4.2, "ManyWell".
    """
    tilt, curvature, quartic = coefficients
    flat = dist.Normal(torch.zeros_like(tilt), 1.0).mask(False)  # density 1 on the real line
    with pyro.plate("well", num_wells):
        x = pyro.sample("x", flat)
        v = pyro.sample("v", flat)
        pyro.factor("energy", tilt * x + curvature * x**2 - quartic * x**4 - v**2 / 2)


def normal(scale_tril: Tensor) -> None:
    """`z ~ N(0, L L')`, with a correlation so strong that no scale for each coordinate fits it.

    Args:
        scale_tril: L, `(dim, dim)`.
    """
    pyro.sample("z", dist.MultivariateNormal(scale_tril.new_zeros(len(scale_tril)), scale_tril=scale_tril))


@checked
def double_well(tilt: float = 0.5, curvature: float = 6.0, quartic: float = 1.0) -> DoubleWell:
    """Return the figures of the density proportional to `exp(tilt x + curvature x^2 - quartic x^4)`.

    Args:
        tilt: c1 of `many_wells`.
        curvature: c2.
        quartic: c4, positive.
    """
    x, step = np.linspace(-_WELL_END, _WELL_END, _WELL_POINTS, retstep=True)
    density = np.exp(tilt * x + curvature * x**2 - quartic * x**4)
    integral = density.sum() * step
    share = density * step / integral
    mean = (share * x).sum()
    right = share[x > 0].sum() + share[x == 0].sum() / 2
    sd = np.sqrt((share * (x - mean) ** 2).sum())
    return DoubleWell(float(np.log(integral)), float(right), float(mean), float(sd))


@checked
def scale_tril_of_condition(dim: Size, condition: Positive = 1e8, **options: Any) -> Tensor:
    r"""Return the Cholesky factor of a covariance `Q diag(variances) Q'` with a random rotation Q, always the same.

    The variances go from `condition^(-1/2)` to `condition^(1/2)` in equal ratios.

    Args:
        dim: Number of coordinates.
        condition: Largest over smallest variance.
        **options: `dtype` and `device`; float32 cannot hold it.
    """
    gaussian = np.random.RandomState(_SEED).standard_normal((dim, dim))
    rotation = torch.linalg.qr(torch.as_tensor(gaussian)).Q
    half = math.log(condition) / 2
    root = rotation * (torch.linspace(-half, half, dim, dtype=torch.float64) / 2).exp()
    # R of the QR of a root of the covariance is its Cholesky factor, up to signs, and rounds less than Cholesky's.
    upper = torch.linalg.qr(root.mT).R
    result: Tensor = (upper * upper.diagonal().sign()[:, None]).mT.to(**options)
    return result


def names() -> list[str]:
    """Return the names that `load` knows."""
    return sorted(_MAKERS)


@checked
def load(name: str, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> HardPosterior:
    """Return one of the posteriors.

    `"funnel"` (10 coordinates), `"banana"` (2), `"many_wells"` (32), `"normal_100"` and `"normal_1000"` (condition
    number 1e8), `"fertility"` (408, of the module `fertility`; needs statsmodels), `"motorcycle"` (66, of the module
    `motorcycle`). The last two have no exact figures.

    Args:
        name: One of `names()`.
        dtype: Of the arguments and figures.
        device: Of the arguments and figures.

    Raises:
        ValueError: If there is no such name; the nearest one is offered.
        ImportError: If a package that has the data is not installed.

    Example:
        >>> from pyro_nf.models.benchmarks import hard_posteriors
        >>> posterior = hard_posteriors.load("many_wells")
        >>> round(posterior.log_evidence, 3)
        164.696
    """
    if name not in _MAKERS:
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}{did_you_mean(name, _MAKERS)}")
    return _MAKERS[name](name, {"dtype": dtype, "device": device})


def _funnel(name: str, options: dict[str, Any]) -> HardPosterior:
    scale, num_leaves = torch.tensor(3.0, **options), 9
    zero = torch.zeros_like(scale)
    mean = {"v": zero, "x": zero.expand(num_leaves)}
    sd = {"v": scale, "x": (scale**2 / 4).exp().expand(num_leaves)}
    return HardPosterior(name, funnel, (scale, num_leaves), 0.0, mean, sd, {"x": _funnel_width(float(scale))})


def _funnel_width(scale: float) -> float:
    """Twice the 95% quantile of x, whose distribution function is the mean of Phi(x exp(-v / 2)) over v."""
    v = torch.linspace(-_FUNNEL_END, _FUNNEL_END, _FUNNEL_POINTS, dtype=torch.float64) * scale
    share = torch.softmax(-((v / scale) ** 2) / 2, 0)
    return 2 * float(brentq(lambda x: float(share @ torch.special.ndtr(x * (-v / 2).exp())) - 0.95, 0.0, 1e3))


def _banana(name: str, options: dict[str, Any]) -> HardPosterior:
    scale, bend = torch.tensor(10.0, **options), torch.tensor(0.03, **options)
    zero = torch.zeros_like(scale)
    sd = {"x1": scale, "x2": (1 + 2 * bend**2 * scale**4).sqrt()}
    return HardPosterior(name, banana, (scale, bend), 0.0, {"x1": zero, "x2": zero}, sd)


def _many_wells(name: str, options: dict[str, Any]) -> HardPosterior:
    well, num_wells = double_well(), 16
    coefficients = torch.tensor([0.5, 6.0, 1.0], **options)
    each = torch.ones(num_wells, **options)
    log_evidence = num_wells * (well.log_integral + math.log(2 * math.pi) / 2)
    mean, sd = {"x": well.mean * each, "v": 0 * each}, {"x": well.sd * each, "v": each}
    return HardPosterior(name, many_wells, (coefficients, num_wells), log_evidence, mean, sd)


def _normal(dim: int, name: str, options: dict[str, Any]) -> HardPosterior:
    scale_tril = scale_tril_of_condition(dim, **options)
    sd = scale_tril.norm(dim=1)
    return HardPosterior(name, normal, (scale_tril,), 0.0, {"z": torch.zeros_like(sd)}, {"z": sd})


def _fertility(name: str, options: dict[str, Any]) -> HardPosterior:
    return HardPosterior(name, fertility.varying_coefficients, tuple(fertility.load_fertility(**options)))


def _motorcycle(name: str, options: dict[str, Any]) -> HardPosterior:
    return HardPosterior(name, motorcycle.heteroscedastic_gp, motorcycle.data(**options))


_MAKERS: dict[str, Callable[[str, dict[str, Any]], HardPosterior]] = {
    "banana": _banana,
    "fertility": _fertility,
    "funnel": _funnel,
    "many_wells": _many_wells,
    "motorcycle": _motorcycle,
    "normal_100": partial(_normal, 100),
    "normal_1000": partial(_normal, 1000),
}
