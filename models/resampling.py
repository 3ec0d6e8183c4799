"""Data that are drawn anew from others as a fit goes on: images from grey levels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_nf.interface.arguments import check_real_tensor, checked


@checked
def binarize(levels: Tensor) -> Tensor:
    """Draw a binary image from grey levels 0 to 255: each pixel is 1 with probability `level / 255`."""
    return torch.bernoulli(_grey("levels", levels) / 255)


@checked
def dequantize(levels: Tensor) -> Tensor:
    """Draw a continuous image from grey levels 0 to 255: `(level + u) / 256`, u uniform on [0, 1)."""
    return (_grey("levels", levels) + torch.rand_like(levels)) / 256


def _grey(name: str, levels: Tensor) -> Tensor:
    check_real_tensor(name, levels)
    if not bool(((levels >= 0) & (levels <= 255)).all()):
        raise ValueError(
            f"{name} must be grey levels from 0 to 255; got {float(levels.min())} to {float(levels.max())}"
        )
    return levels


class Resampled:
    """Data drawn anew from others, in place: dynamic binarisation, dequantisation.

    A compiled fit reads its data where they are. As a callback of `FlowSVI`, this draws them anew at each evaluation:
    with `eval_every` the steps of an epoch, in each epoch, at no cost to the steps.

    Args:
        source: What to draw from, grey levels for instance.
        draw: Makes new values of the same shape from it: `binarize`, `dequantize`.

    Attributes:
        values: The data as they are now.

    Example:
        >>> import torch
        >>> from pyro_nf.models import Resampled, binarize
        >>> images = Resampled(torch.full((1000, 4), 51.0), binarize)
        >>> before = images.values.clone()
        >>> images()  # FlowSVI(..., callbacks=[images]).run(images.values, ...)
        >>> bool((images.values != before).any())
        True
    """

    @checked
    def __init__(self, source: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        self.source, self.draw = check_real_tensor("source", source), draw
        self.values = draw(source)

    def __call__(self, evaluation: Any = None) -> None:
        """Draw the values anew."""
        self.values.copy_(self.draw(self.source))
