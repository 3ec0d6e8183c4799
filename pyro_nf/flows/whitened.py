"""The outer layer of a guide, trained in the units of what is known of the posterior already."""

from typing import Any

import torch
from torch import Tensor

from pyro_nf.flows.affine import LowerTriangularAffine
from pyro_nf.flows.base import Flow
from pyro_nf.flows.numerics import multiply, solve_triangular
from pyro_nf.flows.paced import Paced
from pyro_nf.flows.triangular import QuadraticTriangularMap
from pyro_nf.interface.arguments import Size, checked
from pyro_nf.networks import Switch, freeze

# Up to how many coordinates there is a transport map, and with all products of two: there are dim^3 / 6 of these.
_MAPPED_DIM, _QUADRATIC_DIM = 100, 32


class WhitenedAffine(Flow):
    r"""`y = origin + F c(t(x))`: t is a `LowerTriangularAffine`, trained; the whitening (origin, F, c) is fixed.

    A step of an optimizer moves t by so much of the whitening's unit: where origin and F are the posterior's location
    and scale, one learning rate serves posteriors of any unit and any correlation. The transport map c is a
    `QuadraticTriangularMap`, up to 100 coordinates, or the identity. At first all of it is the identity. The entries of
    t below its diagonal, of which a coordinate has up to dim - 1, are trained in units of 1 / dim, unless it is
    `FlowSVI` that trains them.

    Args:
        dim: Number of coordinates.
        **options: `loc` and `scale`, initial values of t.

    Raises:
        ValueError: If `dim` is no whole number of at least 1.
    """

    origin: Tensor
    scale: Tensor

    @checked
    def __init__(self, dim: Size, **options: Any) -> None:
        super().__init__((dim,))
        self.paced = Paced(LowerTriangularAffine(dim, **options), {"params.tril": 1 / dim})
        like: Any = self.affine.params.loc
        self.register_buffer("origin", torch.zeros_like(like))
        self.register_buffer("scale", torch.eye(dim, dtype=like.dtype, device=like.device))
        self.transport_map: QuadraticTriangularMap | None = None
        if dim <= _MAPPED_DIM:
            self.transport_map = QuadraticTriangularMap(dim, quadratic=dim <= _QUADRATIC_DIM).to(like)
            freeze(self.transport_map)
        self.mapped = Switch()

    @property
    def affine(self) -> Any:
        """The `LowerTriangularAffine` t."""
        return self.paced.flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `origin + F c(t(x))` and the sum of the log-determinants."""
        total = self.scale.diagonal().log().sum()
        for part in self._parts():
            x, log_det = part.forward_and_log_det(x)
            total = total + log_det
        return self.origin + multiply(self.scale, x), total

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for `x`, and return minus the sum of the log-determinants."""
        x, total = solve_triangular(self.scale, y - self.origin, upper=False), -self.scale.diagonal().log().sum()
        for part in reversed(self._parts()):
            x, log_det = part.inverse_and_log_det(x)
            total = total + log_det
        return x, total

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply every part in turn, and push the score along."""
        total = self.scale.diagonal().log().sum()
        for part in self._parts():
            x, log_det, score = part.forward_with_score(x, score)
            total = total + log_det
        return self.origin + multiply(self.scale, x), total, solve_triangular(self.scale.mT, score, upper=True)

    @torch.no_grad()
    def assign(self, loc: Tensor, scale_tril: Tensor, transport_map: QuadraticTriangularMap | None = None) -> None:
        """Become `y = loc + scale_tril c(x)`, and make that the whitening; c is the identity if no map is given."""
        self.origin.copy_(loc)
        self.scale.copy_(scale_tril)
        self.affine.assign(torch.zeros_like(loc), torch.eye(len(loc), dtype=loc.dtype, device=loc.device))
        if self.transport_map is not None and transport_map is not None:
            self.transport_map.load_state_dict(transport_map.state_dict())
        self.mapped.set(transport_map is not None)

    @torch.no_grad()
    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """Return location and lower triangular matrix of the whole without its map, `y = loc + scale_tril x`."""
        eye = torch.eye(len(self.origin), dtype=self.origin.dtype, device=self.origin.device)
        loc, columns = self.paced(torch.zeros_like(self.origin)), self.paced(eye)
        return self.origin + multiply(self.scale, loc), self.scale @ (columns - loc).mT

    def whiten(self) -> None:
        """Make what this is, the transport map apart, the whitening."""
        self.assign(*self.as_matrix())

    def _parts(self) -> list[Flow]:
        return [self.paced, self.transport_map] if self.transport_map is not None and self.mapped else [self.paced]
