"""The outer layer of a guide, trained in the units of what is known of the posterior already."""

from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows import Flow, LowerTriangularAffine, Paced, Triangular
from pyro_nf.flows.numerics import multiply, solve_triangular
from pyro_nf.networks import freeze

# Up to how many coordinates a curve is fitted, and with all products of two: there are dim^3 / 6 of these.
_CURVED_DIM, _BENT_DIM = 100, 32


class Framed(Flow):
    r"""`y = origin + F c(t(x))`: t is a `LowerTriangularAffine`, the frame (origin, F, c) is fixed.

    A step of an optimiser moves t by so much of the frame's unit: with the frame at the posterior's location and scale,
    one learning rate serves posteriors of any unit and any correlation. The curve c is a `Triangular`, up to 100
    coordinates. At first the frame is the identity. The entries of t below its diagonal, of which a coordinate has up
    to dim - 1, are trained in units of 1 / dim, unless it is `FlowSVI` that trains them.

    Args:
        dim: Number of coordinates.
        **options: `loc` and `scale`, initial values of t.
    """

    origin: Tensor
    frame: Tensor
    curved: Tensor

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__((dim,))
        self.paced = Paced(LowerTriangularAffine(dim, **options), {"params.tril": 1 / dim})
        like: Any = self.affine.params.loc
        self.register_buffer("origin", torch.zeros_like(like))
        self.register_buffer("frame", torch.eye(dim, dtype=like.dtype, device=like.device))
        self.curve: Triangular | None = None
        if dim <= _CURVED_DIM:
            self.curve = Triangular(dim, bends=dim <= _BENT_DIM).to(like)
            freeze(self.curve)
        self.register_buffer("curved", torch.tensor(False))
        self._is_curved = False

    @property
    def affine(self) -> Any:
        """The `LowerTriangularAffine` t."""
        return self.paced.flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `origin + F c(t(x))` and the sum of the log-determinants."""
        total = self.frame.diagonal().log().sum()
        for part in self._parts():
            x, log_det = part.forward_and_log_det(x)
            total = total + log_det
        return self.origin + multiply(self.frame, x), total

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for `x`, and return minus the sum of the log-determinants."""
        x, total = solve_triangular(self.frame, y - self.origin, upper=False), -self.frame.diagonal().log().sum()
        for part in reversed(self._parts()):
            x, log_det = part.inverse_and_log_det(x)
            total = total + log_det
        return x, total

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply every part in turn, and push the score along."""
        total = self.frame.diagonal().log().sum()
        for part in self._parts():
            x, log_det, score = part.forward_with_score(x, score)
            total = total + log_det
        return self.origin + multiply(self.frame, x), total, solve_triangular(self.frame.mT, score, upper=True)

    @torch.no_grad()
    def assign(self, loc: Tensor, scale_tril: Tensor, curve: Triangular | None = None) -> None:
        """Become `y = loc + scale_tril c(x)`, and make that the frame; c is the identity if there is no curve."""
        self.origin.copy_(loc)
        self.frame.copy_(scale_tril)
        self.affine.assign(torch.zeros_like(loc), torch.eye(len(loc), dtype=loc.dtype, device=loc.device))
        if self.curve is not None and curve is not None:
            self.curve.load_state_dict(curve.state_dict())
        self._is_curved = curve is not None
        self.curved.fill_(self._is_curved)

    @torch.no_grad()
    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """Return location and lower triangular matrix of the whole but for the curve, `y = loc + scale_tril x`."""
        eye = torch.eye(len(self.origin), dtype=self.origin.dtype, device=self.origin.device)
        loc, columns = self.paced(torch.zeros_like(self.origin)), self.paced(eye)
        return self.origin + multiply(self.frame, loc), self.frame @ (columns - loc).mT

    def reframe(self) -> None:
        """Make what this is, a curve apart, the frame."""
        self.assign(*self.as_matrix())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_curved = bool(self.curved)

    def _parts(self) -> list[Flow]:
        return [self.paced] if self.curve is None or not self._is_curved else [self.paced, self.curve]
