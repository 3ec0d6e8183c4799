"""The linear predictor that the models share."""

import pyro
import pyro.distributions as dist
from torch import Tensor


def linear_predictor(y: Tensor, x: Tensor | None, scale: float, name: str = "") -> Tensor:
    """Sample `intercept ~ N(0, scale)`, and `slope_j ~ N(0, scale)` where there are columns.

    Args:
        y: What is observed: gives dtype and device.
        x: Columns, `(n, p)`; `None` for none.
        scale: Of the priors.
        name: Goes before both sites' names.

    Returns:
        `intercept + x @ slope`, `(n,)`; a scalar without columns.
    """
    intercept: Tensor = pyro.sample(f"{name}intercept", dist.Normal(y.new_tensor(0.0), scale))
    if x is None:
        return intercept
    slope = pyro.sample(f"{name}slope", dist.Normal(x.new_zeros(x.shape[-1]), scale).to_event(1))
    predictor: Tensor = intercept + x @ slope
    return predictor
