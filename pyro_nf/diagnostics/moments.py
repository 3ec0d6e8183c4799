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
            self._plain = self._weighted = torch.zeros(3, points.shape[1], dtype=points.dtype, device=points.device)
        points = points - self._origin
        powers = torch.stack([torch.ones_like(points), points, points.square()])
        self._plain = self._plain + powers.sum(1)
        # Weights are relative to the largest so far: what came before is scaled down when a larger one comes.
        top = max(self._top, float(log_weights.max()))
        if top > -math.inf:
            weights = (log_weights - top).exp()
            self._weighted = self._weighted * math.exp(self._top - top) + (weights[:, None] * powers).sum(1)
            self._top = top

    def compare(self) -> tuple[Tensor, Tensor]:
        """Return how far the weighted means lie from the plain ones, in weighted sds, and plain sds over weighted ones.

        Returns:
            `(dim,)` and `(dim,)`.
        """
        plain, weighted = (sums[1:] / sums[0] for sums in (self._plain, self._weighted))
        (mean, sd), (weighted_mean, weighted_sd) = (
            (first, (second - first.square()).clamp(min=0).sqrt()) for first, second in (plain, weighted)
        )
        return (weighted_mean - mean) / weighted_sd, sd / weighted_sd
