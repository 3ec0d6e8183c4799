"""Stein's residual: the pull of the log density's gradient on a guide, which at the posterior is none."""

from typing import NamedTuple

import torch
from torch import Tensor


class SteinResidual(NamedTuple):
    """How far off a guide's centre lies, in standard deviations, as the gradients see it.

    Attributes:
        size: Root of an unbiased estimate of the squared residual (0 where that is negative).
        noise: What size Monte Carlo error alone would give it, about.
    """

    size: float
    noise: float


def stein_residual(scores: Tensor) -> SteinResidual:
    r"""Return the size of `E_q[grad log p]`, which is zero if `q = p`, in the unit of the gradients' own scatter.

    With g the gradients, `sqrt(E[g]' cov(g)^-1 E[g])`: for a normal posterior, and a guide that is off by d, it is the
    Mahalanobis distance `sqrt(d' S^-1 d)`, whatever the coordinates; n times its square is Hotelling's T^2. With fewer
    than ten draws for each coordinate, the covariance is taken as diagonal.

    Args:
        scores: Gradients of the model's log density at draws of the guide, on the real line, `(n, dim)`.

    References:
        Gorham, Mackey (2015), "Measuring sample quality with Stein's method", arXiv:1506.03039, equation 2.
    """
    scores = scores.double()
    num_draws, dim = scores.shape
    mean = scores.mean(0)
    if num_draws >= 10 * dim:
        # In the basis of the gradients' singular vectors, those of rounding's size left out.
        _, sizes, basis = torch.linalg.svd(scores - mean, full_matrices=False)
        kept = sizes > 1e-7 * sizes[0]
        whitened = (basis @ mean)[kept] / (sizes[kept] / num_draws**0.5)
    else:
        scatter = scores.std(0)
        whitened = torch.where(scatter > 0, mean / scatter, 0.0)
    square = float(whitened.square().sum()) - len(whitened) / num_draws
    return SteinResidual(max(square, 0.0) ** 0.5, (len(whitened) / num_draws) ** 0.5)
