"""Second stage: a triangular map of the normal, for the posterior's skewness and the scales that follow others."""

from dataclasses import dataclass

from pyro_nf.approximations.approximation import Approximation
from pyro_nf.approximations.transport import nearest_triangular
from pyro_nf.inference.staged.stage import Fitted, Problem


@dataclass(frozen=True)
class TransportMap:
    """Natural gradients to the nearest map of second order, up to 100 coordinates."""

    name: str = "map"
    max_gap: float = 0.002

    def num_points(self, num_particles: int) -> int:
        """Thirty steps of 256 draws, and those that set the order of the coordinates."""
        return 30 * 256 + 2048

    def applies(self, so_far: Approximation) -> bool:
        """Where there is a map, of a base that has nothing to fit itself."""
        has_map = getattr(so_far.affine, "transport_map", None) is not None
        return has_map and not any(True for _ in so_far.base.parameters())

    def fit(self, problem: Problem, so_far: Approximation) -> Fitted:
        """Fit the map of the normal that is known so far."""
        found = so_far.copy()
        loc, scale_tril = found.affine.as_matrix()
        quadratic = found.affine.transport_map.quadratic
        transport_map, elbos = nearest_triangular(problem.density, loc, scale_tril, quadratic, problem.report)
        found.affine.assign(loc, scale_tril, transport_map)
        return Fitted(found, elbos)
