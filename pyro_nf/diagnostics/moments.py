"""Where the importance weights move a guide's means and standard deviations: sums over draws, in one pass."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Misfit(NamedTuple):
    """How a guide's own draws differ from its weighted ones, coordinate by coordinate, `(dim,)` each.

    The standard errors are those of the differences: draws and weighted draws are the same draws, so that weights that
    are nearly equal leave nearly no error.

    Attributes:
        shift: How far the weighted mean lies above the plain one, in weighted standard deviations.
        shift_se: Its Monte Carlo standard error.
        log_ratio: Logarithm of the plain standard deviation over the weighted one.
        log_ratio_se: Its Monte Carlo standard error.
        kurtosis: Of the weighted draws: 3 for a normal.
        ess: Effective number of draws.
    """

    shift: Tensor
    shift_se: Tensor
    log_ratio: Tensor
    log_ratio_se: Tensor
    kurtosis: Tensor
    ess: float


class Moments:
    """Running sums of draws and of weighted draws; the memory does not grow with the draws."""

    def __init__(self) -> None:
        self._top = -math.inf
        self._origin: Tensor | None = None

    def add(self, log_weights: Tensor, points: Tensor) -> None:
        """Take in draws, `(n, dim)`, and their log weights, `(n,)`."""
        points, log_weights = points.double(), log_weights.double().to(points.device)
        if self._origin is None:
            # In units of the first draws' scatter, so that fourth powers neither overflow nor cancel.
            self._origin, scatter = points.mean(0), points.std(0, correction=0)
            self._unit = torch.where(scatter > 0, scatter, 1.0)
            # By the power of the weight, then by that of the coordinate.
            self._sums = points.new_zeros(3, 5, points.shape[1])
        points = (points - self._origin) / self._unit
        powers = torch.stack([points**power for power in range(5)])
        # Weights are relative to the largest so far: what came before is scaled down when a larger one comes.
        top = max(self._top, float(log_weights.max()))
        if top == -math.inf:
            self._sums[0] += powers.sum(1)
            return
        weights = (log_weights - top).exp()
        orders = torch.arange(3, dtype=points.dtype, device=points.device)
        scale = math.exp(self._top - top) ** orders
        self._sums = self._sums * scale[:, None, None] + torch.einsum("on,pnd->opd", weights ** orders[:, None], powers)
        self._top = top

    def compare(self) -> Misfit:
        """Compare plain and weighted moments."""
        mean, sd, _ = _summary(self._sums[0])
        weighted_mean, weighted_sd, kurtosis = _summary(self._sums[1])
        # By how much one draw moves each of the two estimates, as polynomials in the draw.
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        first = torch.stack([-weighted_mean, one, zero]) / weighted_sd
        second = torch.stack([-mean, one, zero]) / weighted_sd
        shift_se = self._standard_error(first, second)
        halves = [
            torch.stack([centre**2 / spread**2 - 1, -2 * centre / spread**2, 1 / spread**2]) / 2
            for centre, spread in ((weighted_mean, weighted_sd), (mean, sd))
        ]
        log_ratio = (sd / weighted_sd).log()
        shift = (weighted_mean - mean) / weighted_sd
        ess = float(self._sums[1, 0, 0] ** 2 / self._sums[2, 0, 0])
        return Misfit(shift, shift_se, log_ratio, self._standard_error(*halves), kurtosis, ess)

    def _standard_error(self, weighted: Tensor, plain: Tensor) -> Tensor:
        """Return that of `mean(w a(x) - b(x))` for two polynomials of mean zero, and weights w of mean 1.

        Args:
            weighted: Coefficients of a, `(3, dim)`.
            plain: Coefficients of b, `(3, dim)`.
        """
        number, total = self._sums[0, 0], self._sums[1, 0]
        means = [self._sums[order] * number ** (order - 1) / total**order for order in range(3)]
        square = _mean_product(plain, plain, means[0]) - 2 * _mean_product(weighted, plain, means[1])
        return ((square + _mean_product(weighted, weighted, means[2])).clamp(min=0) / number).sqrt()


def _mean_product(first: Tensor, second: Tensor, means: Tensor) -> Tensor:
    """Return the mean of the product of two polynomials, given the means of the powers."""
    return sum(
        (first[i] * second[j] * means[i + j] for i in range(3) for j in range(3)), start=torch.zeros_like(means[0])
    )


def _summary(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sd and kurtosis from the sums of powers."""
    mean, second, third, fourth = sums[1:] / sums[0]
    variance = (second - mean.square()).clamp(min=0)
    central = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
    return mean, variance.sqrt(), central / variance.square()
