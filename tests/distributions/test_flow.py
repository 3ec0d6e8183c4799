import pyro.distributions as dist
import pytest
import torch

from pyro_nf.distributions import FlowDistribution, ScoredDraw
from pyro_nf.flows import ElementwiseAffine, Flow, stacks


def scramble(flow: Flow, scale: float) -> Flow:
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return flow


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape), 1.0).to_event(1)


@pytest.mark.parametrize("name", stacks.names())
def test_joint_score_equals_score_of_any_point(name, float64):
    q = FlowDistribution(normal(4), scramble(stacks.make(name, 4, depth=2), scale=0.3))
    y, log_prob = q.rsample_and_log_prob((7,))
    assert torch.allclose(q.log_prob(y.clone()), log_prob, atol=1e-8)
    assert q.log_prob(torch.randn(2, 3, 4)).shape == (2, 3)


@pytest.mark.parametrize("name", stacks.names())
def test_outside_points_score_and_follow_an_update(name):
    flow = stacks.make(name, 3, depth=2)
    q = FlowDistribution(normal(3), flow)
    value = torch.tensor([30.0, -20.0, 5.0])
    before = q.log_prob(value)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.isfinite(before)
    assert q.log_prob(value) != before


def test_shapes_with_context_and_expand():
    flow = stacks.make("realnvp", 2, depth=2, context_dim=3)
    q = FlowDistribution(normal(2), flow, torch.randn(5, 3))
    assert (q.batch_shape, q.event_shape) == ((5,), (2,))
    assert q.sample((4,)).shape == (4, 5, 2)
    expanded = q.expand((6, 5))
    draws = expanded.rsample()
    assert draws.shape == (6, 5, 2)
    assert expanded.log_prob(draws).shape == (6, 5)
    assert (draws[0] != draws[1]).all()


def test_density_of_an_affine_flow_is_the_normal_density(float64):
    q = FlowDistribution(normal(3), ElementwiseAffine(3, loc=2.0, scale=0.5))
    value = torch.randn(10, 3)
    assert torch.allclose(q.log_prob(value), dist.Normal(2.0, 0.5).expand((3,)).to_event(1).log_prob(value))


def test_misfits_are_named():
    flow = stacks.make("planar", 3, depth=1)
    with pytest.raises(ValueError, match=r"base must have the flow's event shape \(3,\)"):
        FlowDistribution(dist.Normal(torch.zeros(3), 1.0), flow)
    with pytest.raises(ValueError, match="context_dim=0; got a context of width 2"):
        FlowDistribution(normal(3), flow, torch.zeros(4, 2))


def test_scored_draw_scores_its_draw_without_an_inverse_and_others_with(monkeypatch):
    q = FlowDistribution(normal(3), stacks.make("iaf", 3, depth=1))
    scored = ScoredDraw(q)
    value = scored.rsample()
    expected = q.log_prob(value)
    monkeypatch.setattr(FlowDistribution, "log_prob", lambda *_: pytest.fail("inverted"))
    assert torch.allclose(scored.log_prob(value), expected)
    monkeypatch.undo()
    assert torch.allclose(scored.log_prob(value.clone()), expected)
    assert scored.expand((5,)).rsample().shape == (5, 3)


@pytest.mark.parametrize("name", stacks.names())
def test_the_score_that_comes_with_a_draw_is_the_densitys_gradient(name, float64):
    q = FlowDistribution(normal(4), scramble(stacks.make(name, 4, depth=2), scale=0.3))
    y, log_prob, score = q.rsample_and_score((7,))
    assert torch.allclose(q.log_prob(y.detach()), log_prob, atol=1e-8)
    wanted = torch.func.grad(lambda y: q.log_prob(y).sum())(y.detach())
    assert torch.allclose(score, wanted, rtol=1e-5, atol=1e-5)
    assert not score.requires_grad
