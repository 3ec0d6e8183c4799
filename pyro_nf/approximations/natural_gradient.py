"""What the natural-gradient steps of the nearest normal and of the nearest transport map share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """Steps at a full rate, and then steps whose rates fall, so that what they reach averages.

    Attributes:
        num_steps: Steps at the full rate.
        num_averaged: Steps whose rates fall as 1 over their number.
        rate: The full rate.
    """

    num_steps: int
    num_averaged: int
    rate: float = 0.5

    @property
    def total(self) -> int:
        """Number of all steps."""
        return self.num_steps + self.num_averaged

    def __getitem__(self, step: int) -> float:
        return self.rate if step < self.num_steps else 1 / (step - self.num_steps + 1 / self.rate)


def antithetic_normals(num_pairs: int, like: Tensor) -> Tensor:
    """Return standard normal draws, `(2 * num_pairs, dim)`, the second half the negative of the first.

    Args:
        num_pairs: How many pairs.
        like: A point, `(dim,)`.
    """
    noise = torch.randn(num_pairs, len(like), dtype=like.dtype, device=like.device)
    return torch.cat([noise, -noise])


def normal_log_prob(noise: Tensor, scale_tril: Tensor) -> Tensor:
    """Return `log N(m + L w; m, L L')` at standard normal draws w, `(*batch, dim)` to `(*batch,)`."""
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - scale_tril.diagonal().log().sum()


def cut(residual: Tensor, values: Tensor, longest: float) -> Tensor:
    """Shorten residuals, `(num_points, dim)`, to a root mean square; to 0 where they or values are not finite."""
    length = residual.square().mean(-1, keepdim=True).sqrt()
    usable = length.isfinite() & values.isfinite()[:, None]
    return torch.where(usable, residual * (longest / length).clamp(max=1), 0.0)
