"""The affine layer of a guide, trained in the units of what is known of the posterior already."""

from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows import LowerTriangularAffine
from pyro_nf.flows.numerics import multiply, solve_triangular


class FramedAffine(LowerTriangularAffine):
    r"""`y = origin + F t(x)`, where t is a `LowerTriangularAffine` and the frame (origin, F) is fixed.

    A step of an optimiser moves t by so much of the frame's unit: with the frame at the posterior's location and scale,
    one learning rate serves posteriors of any unit and any correlation. At first the frame is the identity.

    Args:
        dim: Number of coordinates.
        **options: `loc` and `scale`, initial values of t.
    """

    origin: Tensor
    frame: Tensor

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        like: Any = self.params.loc
        self.register_buffer("origin", torch.zeros_like(like))
        self.register_buffer("frame", torch.eye(dim, dtype=like.dtype, device=like.device))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `origin + F t(x)` and the sum of the log-determinants."""
        inner, log_det = super().forward_and_log_det(x, context)
        return self.origin + multiply(self.frame, inner), log_det + self.frame.diagonal().log().sum()

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for `x`, and return minus the sum of the log-determinants."""
        inner = solve_triangular(self.frame, y - self.origin, upper=False)
        x, log_det = super().inverse_and_log_det(inner, context)
        return x, log_det - self.frame.diagonal().log().sum()

    @torch.no_grad()
    def assign(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become `y = loc + scale_tril x`, and make that the frame."""
        self.origin.copy_(loc)
        self.frame.copy_(scale_tril)
        super().assign(torch.zeros_like(loc), torch.eye(len(loc), dtype=loc.dtype, device=loc.device))

    @torch.no_grad()
    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """Return location and lower triangular matrix of the whole, `y = loc + scale_tril x`."""
        eye = torch.eye(len(self.origin), dtype=self.origin.dtype, device=self.origin.device)
        loc = self.forward_and_log_det(torch.zeros_like(self.origin))[0]
        return loc, (self.forward_and_log_det(eye)[0] - loc).mT

    def reframe(self) -> None:
        """Make what this is the frame."""
        self.assign(*self.as_matrix())
