"""The outer layer: an affine map in fixed coordinates, which may be followed by a transport map."""

import copy

import pytest
import torch

from pyro_nf.flows import QuadraticTriangularMap, WhitenedAffine
from pyro_nf.guides import AutoFlow
from pyro_nf.models import eight_schools
from pyro_nf.testing import check_flow

pytestmark = pytest.mark.usefixtures("float64")


def whitened(dim=4, mapped=True):
    torch.manual_seed(0)
    transport_map = QuadraticTriangularMap(dim)
    with torch.no_grad():
        for param in transport_map.parameters():
            param.normal_(std=0.1)
    transport_map.set_order(torch.randperm(dim))
    flow = WhitenedAffine(dim)
    scale_tril = torch.eye(dim) + torch.randn(dim, dim).tril(-1)
    flow.assign(torch.randn(dim), scale_tril, transport_map if mapped else None)
    return flow


@pytest.mark.parametrize("mapped", [False, True])
def test_it_is_a_flow_with_any_whitening(mapped):
    check_flow(whitened(mapped=mapped), identity=False, factory=lambda: WhitenedAffine(4))


def test_the_whitening_is_fixed_and_the_affine_layer_trained():
    flow = whitened()
    assert [name for name, _ in flow.named_parameters()] == [
        f"paced.flow.params.{name}" for name in ("loc", "log_scale", "tril")
    ]
    assert {name.split(".")[0] for name, _ in flow.named_buffers()} >= {"origin", "scale", "transport_map", "mapped"}


def test_a_transport_map_is_saved_loaded_and_dropped():
    flow, other, x = whitened(), WhitenedAffine(4), torch.randn(5, 4)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    assert torch.equal(copy.deepcopy(flow)(x), flow(x))
    loc, matrix = flow.as_matrix()
    assert not torch.allclose(flow(x), loc + x @ matrix.mT)
    flow.whiten()
    assert torch.allclose(flow(x), loc + x @ matrix.mT)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))


def test_many_coordinates_have_no_transport_map():
    assert WhitenedAffine(101).transport_map is None
    assert not WhitenedAffine(33).transport_map.quadratic
    assert WhitenedAffine(32).transport_map.quadratic


def test_a_guide_with_a_transport_map_scores_its_draws():
    guide = AutoFlow(eight_schools.noncentered)
    data = eight_schools.data(dtype=torch.float64)
    guide(*data)
    guide.affine.assign(torch.zeros(10), torch.eye(10), whitened(10).transport_map)
    draws = guide.sample_posterior(50, *data)
    posterior = guide.get_posterior()
    points, log_q = posterior.rsample_and_log_prob((50,))
    assert torch.allclose(posterior.log_prob(points), log_q)
    assert bool(guide.log_prob(draws, *data).isfinite().all())
