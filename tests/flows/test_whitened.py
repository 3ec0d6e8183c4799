"""The outer layer: an affine map in a fixed frame, which may be curved."""

import copy

import pytest
import torch

from pyro_nf.flows import QuadraticTriangularMap
from pyro_nf.guides import AutoFlow
from pyro_nf.guides.framed import Framed
from pyro_nf.models import eight_schools
from pyro_nf.testing import check_flow

pytestmark = pytest.mark.usefixtures("float64")


def framed(dim=4, curved=True):
    torch.manual_seed(0)
    curve = QuadraticTriangularMap(dim)
    with torch.no_grad():
        for param in curve.parameters():
            param.normal_(std=0.1)
    curve.set_order(torch.randperm(dim))
    flow = Framed(dim)
    flow.assign(torch.randn(dim), torch.eye(dim) + torch.randn(dim, dim).tril(-1), curve if curved else None)
    return flow


@pytest.mark.parametrize("curved", [False, True])
def test_it_is_a_flow_with_any_frame(curved):
    check_flow(framed(curved=curved), identity=False, factory=lambda: Framed(4))


def test_the_frame_is_fixed_and_the_affine_layer_trained():
    flow = framed()
    assert [name for name, _ in flow.named_parameters()] == [
        f"paced.flow.params.{name}" for name in ("loc", "log_scale", "tril")
    ]
    assert {name.split(".")[0] for name, _ in flow.named_buffers()} >= {"origin", "frame", "curve", "curved"}


def test_a_curve_is_saved_loaded_and_dropped():
    flow, other, x = framed(), Framed(4), torch.randn(5, 4)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    assert torch.equal(copy.deepcopy(flow)(x), flow(x))
    loc, matrix = flow.as_matrix()
    assert not torch.allclose(flow(x), loc + x @ matrix.mT)
    flow.reframe()
    assert torch.allclose(flow(x), loc + x @ matrix.mT)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))


def test_many_coordinates_have_no_curve():
    assert Framed(101).curve is None
    assert not hasattr(Framed(33).curve.params, "quadratic")


def test_a_curved_guide_scores_its_draws():
    guide = AutoFlow(eight_schools.noncentered)
    data = eight_schools.data(dtype=torch.float64)
    density = guide.density(*data)
    guide.fit_normal(density, 2)
    guide.fit_curve(density)
    draws = guide.sample_posterior(50, *data)
    assert guide.flow.flows[-1].curved
    posterior = guide.get_posterior()
    points, log_q = posterior.rsample_and_log_prob((50,))
    assert torch.allclose(posterior.log_prob(points), log_q)
    assert bool(guide.log_prob(draws, *data).isfinite().all())
