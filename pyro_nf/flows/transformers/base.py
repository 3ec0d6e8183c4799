"""What a transformer is."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Transformer(Protocol):
    """What couplings and autoregressive flows ask of a transformer.

    Shapes:
        `x, y: (*batch, dim)`; `params: (*batch, dim, num_params)`; log-derivatives: `(*batch, dim)`.
    """

    num_params: int

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y` and `log dy/dx`, elementwise."""
        ...

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` and `log dx/dy`, elementwise."""
        ...
