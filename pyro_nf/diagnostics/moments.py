"""Where the importance weights move a guide's means and standard deviations: sums over draws, in one pass."""

import math

import torch
from torch import Tensor


class Moments:
    """Running sums of draws and of weighted draws; the memory does not grow with the draws."""

    def __init__(self) -> None:
        self._top = -math.inf
        self._origin: Tensor | None = None

    def add(self, log_weights: Tensor, points: Tensor) -> None:
        """Take in draws, `(n, dim)`, and their log weights, `(n,)`."""
        points = points.double()
        if self._origin is None:
            self._origin = points.mean(0)
            self._plain = self._weighted = torch.zeros(5, points.shape[1], dtype=points.dtype, device=points.device)
        points = points - self._origin
        powers = torch.stack([points**power for power in range(5)])
        self._plain = self._plain + powers.sum(1)
        # Weights are relative to the largest so far: what came before is scaled down when a larger one comes.
        top = max(self._top, float(log_weights.max()))
        if top > -math.inf:
            weights = (log_weights - top).exp()
            self._weighted = self._weighted * math.exp(self._top - top) + (weights[:, None] * powers).sum(1)
            self._top = top

    def compare(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compare plain and weighted moments.

        Returns:
            How far the weighted means lie from the plain ones, in weighted sds; the plain sds over the weighted ones;
            and the weighted kurtosis, on which the Monte Carlo error of a sd depends: `(dim,)` each.
        """
        (mean, sd, _), (weighted_mean, weighted_sd, kurtosis) = map(_summary, (self._plain, self._weighted))
        return (weighted_mean - mean) / weighted_sd, sd / weighted_sd, kurtosis


def _summary(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sd and kurtosis from the sums of powers."""
    mean, second, third, fourth = sums[1:] / sums[0]
    variance = (second - mean.square()).clamp(min=0)
    central = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
    return mean, variance.sqrt(), central / variance.square()
