"""The nearest triangular map: exact to first order in skewness, right in any unit, and never lost."""

import math

import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.gaussian import nearest_normal
from pyro_nf.approximations.transport import _metric, _order, nearest_triangular
from pyro_nf.flows import QuadraticTriangularMap

pytestmark = pytest.mark.usefixtures("float64")


def gaps(log_density, dim, log_evidence, quadratic=True):
    """Divergences of the nearest normal, and of the nearest map of one, from 20,000 draws."""
    density = Density(log_density)
    loc, scale_tril, _ = nearest_normal(density, torch.zeros(dim), torch.eye(dim))
    transport_map, _ = nearest_triangular(density, loc, scale_tril, quadratic=quadratic)
    found = []
    with torch.no_grad():
        for flow in (QuadraticTriangularMap(dim), transport_map):
            z = torch.randn(20_000, dim)
            w, log_det = flow.forward_and_log_det(z)
            log_q = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) - log_det - scale_tril.diagonal().log().sum()
            log_p = torch.func.vmap(log_density)(loc + w @ scale_tril.mT)
            found.append(log_evidence - float((log_p - log_q).mean()))
    return found


def test_skewness_of_the_logarithm_of_a_gamma():
    torch.manual_seed(0)
    normal, mapped = gaps(lambda x: (10 * x - x.exp()).sum() - math.lgamma(10.0), 1, 0.0)
    assert normal == pytest.approx(0.0085, abs=0.003)  # some 1 / (12 * 10)
    assert mapped < 0.001  # the family's best has .0005


def test_the_metric_is_the_second_derivative_of_the_divergence_and_diagonal():
    torch.manual_seed(4)
    transport_map, half = QuadraticTriangularMap(3), torch.randn(100_000, 3)
    z = torch.cat([half, -half])
    names, starts = zip(*transport_map.params.named_parameters(), strict=True)
    shapes = [start.shape for start in starts]
    module = torch.nn.Module()
    module.transport_map, module.forward = transport_map, transport_map.forward_and_log_det

    def divergence(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        params = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        params = dict(zip((f"transport_map.params.{name}" for name in names), params, strict=True))
        w, log_det = torch.func.functional_call(module, params, (z,))
        return (0.5 * w.square().sum(-1) - log_det).mean()

    metric = _metric(transport_map)
    wanted = torch.diag(torch.cat([metric[name].flatten() for name in names]))
    found = torch.func.jacrev(torch.func.grad(divergence))(torch.cat([start.detach().flatten() for start in starts]))
    assert torch.allclose(found, wanted, atol=0.05)  # of draws


def test_first_comes_what_the_scales_of_others_follow_also_where_the_normal_is_off():
    torch.manual_seed(5)
    density = Density(lambda x: -0.5 * x.square().sum() + x[2] + 0.1 * x[2] * x[0] ** 2)
    assert int(_order(density, torch.zeros(3), torch.eye(3))[0]) == 2


def test_scales_that_follow_the_last_coordinate_of_a_regression():
    # Given its variance e^v, x of 6 coordinates in any units are normal; v is the log of an inverse gamma.
    torch.manual_seed(1)
    unit = torch.tensor([1e-3, 1.0, 50.0, 2.0, 0.1, 1.0])

    def log_density(z):
        x, v = z[:-1] / unit, z[-1]
        normal = -0.5 * (x.square() * (-v).exp()).sum() - 3 * v - 3 * math.log(2 * math.pi) - unit.log().sum()
        return normal + 20 * math.log(20.0) - math.lgamma(20.0) - 20 * v - 20 * (-v).exp()

    normal, mapped = gaps(log_density, 7, 0.0)
    without_products = gaps(log_density, 7, 0.0, quadratic=False)[1]
    assert normal > 0.05
    assert mapped < 0.005
    assert without_products < 0.005


def test_a_bend():
    torch.manual_seed(2)

    def log_density(z):
        x, y = z
        return -0.5 * (x**2 + ((y - 0.2 * x**2) / 2) ** 2) - math.log(4 * math.pi)

    normal, mapped = gaps(log_density, 2, 0.0)
    assert normal > 0.008
    assert mapped < 0.001


def test_draws_without_a_density_change_nothing():
    torch.manual_seed(3)
    density = Density(lambda x: -0.5 * x.square().sum() + torch.where(x[0] > -2.5, 0.0, math.nan))
    transport_map, _ = nearest_triangular(density, torch.zeros(3), torch.eye(3))
    z = torch.randn(1000, 3)
    assert torch.allclose(transport_map(z), z, atol=0.3)
