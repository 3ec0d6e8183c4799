"""The motorcycle data: accelerations whose mean and noise both change with time, and a model of both."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# fmt: off
_TIMES = (
    2.4, 2.6, 3.2, 3.6, 4.0, 6.2, 6.6, 6.8, 7.8, 8.2, 8.8, 8.8, 9.6, 10.0, 10.2, 10.6, 11.0, 11.4, 13.2, 13.6, 13.8,
    14.6, 14.6, 14.6, 14.6, 14.6, 14.6, 14.8, 15.4, 15.4, 15.4, 15.4, 15.6, 15.6, 15.8, 15.8, 16.0, 16.0, 16.2, 16.2,
    16.2, 16.4, 16.4, 16.6, 16.8, 16.8, 16.8, 17.6, 17.6, 17.6, 17.6, 17.8, 17.8, 18.6, 18.6, 19.2, 19.4, 19.4, 19.6,
    20.2, 20.4, 21.2, 21.4, 21.8, 22.0, 23.2, 23.4, 24.0, 24.2, 24.2, 24.6, 25.0, 25.0, 25.4, 25.4, 25.6, 26.0, 26.2,
    26.2, 26.4, 27.0, 27.2, 27.2, 27.2, 27.6, 28.2, 28.4, 28.4, 28.6, 29.4, 30.2, 31.0, 31.2, 32.0, 32.0, 32.8, 33.4,
    33.8, 34.4, 34.8, 35.2, 35.2, 35.4, 35.6, 35.6, 36.2, 36.2, 38.0, 38.0, 39.2, 39.4, 40.0, 40.4, 41.6, 41.6, 42.4,
    42.8, 42.8, 43.0, 44.0, 44.4, 45.0, 46.6, 47.8, 47.8, 48.8, 50.6, 52.0, 53.2, 55.0, 55.0, 55.4, 57.6,
)
_ACCELERATIONS = (
    0.0, -1.3, -2.7, 0.0, -2.7, -2.7, -2.7, -1.3, -2.7, -2.7, -1.3, -2.7, -2.7, -2.7, -5.4, -2.7, -5.4, 0.0, -2.7,
    -2.7, 0.0, -13.3, -5.4, -5.4, -9.3, -16.0, -22.8, -2.7, -22.8, -32.1, -53.5, -54.9, -40.2, -21.5, -21.5, -50.8,
    -42.9, -26.8, -21.5, -50.8, -61.7, -5.4, -80.4, -59.0, -71.0, -91.1, -77.7, -37.5, -85.6, -123.1, -101.9, -99.1,
    -104.4, -112.5, -50.8, -123.1, -85.6, -72.3, -127.2, -123.1, -117.9, -134.0, -101.9, -108.4, -123.1, -123.1,
    -128.5, -112.5, -95.1, -81.8, -53.5, -64.4, -57.6, -72.3, -44.3, -26.8, -5.4, -107.1, -21.5, -65.6, -16.0, -45.6,
    -24.2, 9.5, 4.0, 12.0, -21.5, 37.5, 46.9, -17.4, 36.2, 75.0, 8.1, 54.9, 48.2, 46.9, 16.0, 45.6, 1.3, 75.0, -16.0,
    -54.9, 69.6, 34.8, 32.1, -37.5, 22.8, 46.9, 10.7, 5.4, -1.3, -21.5, -13.3, 30.8, -10.7, 29.4, 0.0, -10.7, 14.7,
    -1.3, 0.0, 10.7, 10.7, -26.8, -14.7, -13.3, 0.0, 10.7, -14.7, -2.7, 10.7, -2.7, 10.7,
)
# fmt: on
# The box on which the basis lives, in half-widths of the data: wider ones need more functions, narrower ones bend the
# process at its ends.
_BOX = 1.5


def data(**options: Any) -> tuple[Tensor, Tensor]:
    """Return time after impact and acceleration of the head, each standardised, `(133,)` and `(133,)`.

    Args:
        **options: `dtype` and `device` of the tensors.

    References:
        Silverman (1985), "Some aspects of the spline smoothing approach to non-parametric regression curve fitting",
        section 6.
    """
    columns = torch.tensor([_TIMES, _ACCELERATIONS], **options)
    time, acceleration = (columns - columns.mean(1, keepdim=True)) / columns.std(1, keepdim=True)
    return time, acceleration


def heteroscedastic_gp(
    time: Tensor, acceleration: Tensor | None = None, num_mean: int = 40, num_noise: int = 20
) -> Tensor:
    r"""Two Gaussian processes: `y_i ~ N(m + f(t_i), exp(s + g(t_i)))`.

    f and g have squared-exponential kernels, `amplitude^2 exp(-(t - t')^2 / (2 length_scale^2))`, each written as a sum
    of the basis functions of `hilbert_process`. m, s ~ N(0, 1); of each process `length_scale ~ HalfNormal(1)`,
    `amplitude ~ HalfNormal(0.5)` and weights ~ N(0, 1). Sites are `mean_*` for m and f, `noise_*` for s and g.

    Args:
        time: `(size,)`.
        acceleration: y, `(size,)`; `None` to draw it.
        num_mean: Basis functions of f.
        num_noise: Basis functions of g.

    References:
        Riutort-Mayol, Bürkner, Andersen, Solin, Vehtari (2023), "Practical Hilbert space approximate Bayesian Gaussian
        processes for probabilistic programming", arXiv:2004.11408; Vehtari (2021), "Gaussian process demonstration with
        Stan", who models these data so.
    """
    mean = _process("mean", time, num_mean)
    log_scale = _process("noise", time, num_noise)
    with pyro.plate("data", len(time)):
        result: Tensor = pyro.sample("acceleration", dist.Normal(mean, log_scale.exp()), obs=acceleration)
    return result


def hilbert_process(time: Tensor, length_scale: Tensor, amplitude: Tensor, weights: Tensor) -> Tensor:
    r"""Return `f(t) = sum_j sqrt(S(w_j)) phi_j(t) weights_j`, nearly a Gaussian process if the weights are N(0, 1).

    On a box `|t - c| <= L`, `phi_j(t) = sin(w_j (t - c + L)) / sqrt(L)`, `w_j = pi j / (2 L)`, and S is the spectral
    density of the squared-exponential kernel, `amplitude^2 sqrt(2 pi) length_scale exp(-(length_scale w)^2 / 2)`.

    Args:
        time: `(size,)`; c is the middle of it and L is 1.5 times half its range.
        length_scale: `(*batch,)`, positive.
        amplitude: `(*batch,)`, positive.
        weights: `(*batch, num_functions)`.

    Returns:
        `(*batch, size)`.

    References:
        Solin, Särkkä (2020), "Hilbert space methods for reduced-rank Gaussian process regression", arXiv:1401.5508,
        equation 20.
    """
    low, high = time.amin(), time.amax()
    half_width = _BOX * (high - low) / 2
    order = torch.arange(1, weights.shape[-1] + 1, dtype=time.dtype, device=time.device)
    frequency = math.pi * order / (2 * half_width)
    basis = torch.sin((time[:, None] - (low + high) / 2 + half_width) * frequency) / half_width.sqrt()
    # The root of S from its logarithm: exp alone underflows at high frequencies, where a root has no gradient.
    log_density = (
        math.log(2 * math.pi) / 2 + length_scale.log()[..., None] - (length_scale[..., None] * frequency) ** 2 / 2
    )
    roots = amplitude[..., None] * (log_density / 2).exp()
    result: Tensor = (roots * weights) @ basis.T
    return result


def _process(name: str, time: Tensor, num_functions: int) -> Tensor:
    """Draw a process and its offset; return their sum at the times, `(size,)`."""
    offset = pyro.sample(f"{name}_offset", dist.Normal(time.new_zeros(()), 1.0))
    length_scale = pyro.sample(f"{name}_length_scale", dist.HalfNormal(time.new_ones(())))
    amplitude = pyro.sample(f"{name}_amplitude", dist.HalfNormal(time.new_tensor(0.5)))
    weights = pyro.sample(f"{name}_weights", dist.Normal(time.new_zeros(num_functions), 1.0).to_event(1))
    result: Tensor = offset + hilbert_process(time, length_scale, amplitude, weights)
    return result
