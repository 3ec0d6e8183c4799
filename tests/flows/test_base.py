"""The contract's own parts: Sequential, Inverse, condition, and what they refuse."""

import pickle

import pyro.distributions as dist
import pytest
import torch

from pyro_nf.flows import (
    Autoregressive,
    ElementwiseAffine,
    Flow,
    Inverse,
    LowerTriangularAffine,
    Permutation,
    Planar,
    Radial,
    Sequential,
)


def randomized(flow: Flow, scale: float = 1.0) -> Flow:
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn_like(p))
    return flow


def test_sequential_applies_flows_in_order() -> None:
    flow = Sequential(ElementwiseAffine(2, loc=1.0), ElementwiseAffine(2, scale=3.0))
    y, log_det = flow.forward_and_log_det(torch.ones(2))
    torch.testing.assert_close(y, torch.full((2,), 6.0))
    torch.testing.assert_close(log_det, torch.tensor(9.0).log())
    x, back = flow.inverse_and_log_det(y)
    torch.testing.assert_close(x, torch.ones(2))
    torch.testing.assert_close(back, -log_det)


def test_sequential_hands_the_context_to_those_that_take_it() -> None:
    torch.manual_seed(0)
    flow = randomized(Sequential(Planar(2, context_dim=3), Permutation([1, 0]), Radial(2)))
    assert flow.context_dim == 3
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    y, _ = flow.forward_and_log_det(x, context)
    assert not torch.equal(y, flow.forward_and_log_det(x, -context)[0])


@pytest.mark.parametrize(
    ("flows", "message"),
    [
        ((), "Sequential takes at least one flow; got none"),
        ((Planar(2), Planar(3)), r"one event_shape.*Planar\(2,\).*Planar\(3,\)"),
        ((Planar(2, context_dim=1), Planar(2, context_dim=2)), "context_dim=1.*context_dim=2"),
    ],
)
def test_sequential_refuses(flows: tuple[Flow, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequential(*flows)


@pytest.mark.parametrize("make", [Planar, Radial, ElementwiseAffine, LowerTriangularAffine, Autoregressive])
def test_sizes_must_be_positive(make: type[Flow]) -> None:
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        make(0)
    with pytest.raises(ValueError, match="context_dim must be a whole number of at least 0; got -1"):
        make(2, context_dim=-1)


def test_inverse_swaps_directions_and_keeps_the_parameters() -> None:
    torch.manual_seed(0)
    flow = randomized(Planar(3))
    inverse = Inverse(flow)
    y = torch.randn(5, 3)
    for got, wanted in zip(inverse.forward_and_log_det(y), flow.inverse_and_log_det(y), strict=True):
        torch.testing.assert_close(got, wanted)
    x = inverse(y)
    torch.testing.assert_close(inverse.log_abs_det_jacobian(x, y), -flow.log_abs_det_jacobian(y, x))
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in flow.parameters()]


def test_inverse_of_autoregressive_is_trained_through_its_score() -> None:
    # In Pyro, `iaf.inv` has no parameters at all, and a guide made of it trains nothing.
    torch.manual_seed(0)
    flow = Inverse(Autoregressive(2))
    data = torch.randn(256, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + 3
    law = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow])
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = -law.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_condition_binds_the_context() -> None:
    torch.manual_seed(0)
    flow = randomized(Planar(2, context_dim=3))
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    bound = flow.condition(context)
    assert bound.context_dim == 0
    torch.testing.assert_close(bound(x), flow.forward_and_log_det(x, context)[0])
    assert pickle.loads(pickle.dumps(bound))(x).shape == (4, 2)


def test_condition_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"Planar with context_dim=3 takes a context of that width; got \(4, 2\)"):
        Planar(2, context_dim=3).condition(torch.zeros(4, 2))


@pytest.mark.parametrize("call", ["__call__", "inv", "log_abs_det_jacobian"])
def test_transform_refuses_other_shapes(call: str) -> None:
    flow, x = Planar(3), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"Planar takes points of shape \(\*batch, 3\); got \(5, 2\)"):
        {
            "__call__": lambda: flow(x),
            "inv": lambda: flow.inv(x),
            "log_abs_det_jacobian": lambda: flow.log_abs_det_jacobian(x, x),
        }[call]()


def test_check_inputs_names_the_context() -> None:
    with pytest.raises(ValueError, match="Planar has context_dim=2; got no context"):
        Planar(3, context_dim=2)(torch.zeros(3))
    with pytest.raises(ValueError, match="Planar has context_dim=2; got a context of width 4"):
        Planar(3, context_dim=2).check_inputs(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="Planar has context_dim=0; got a context of width 4"):
        Planar(3).check_inputs(torch.zeros(3), torch.zeros(4))


def test_transform_interface() -> None:
    flow = Sequential(Planar(3), Radial(3))
    assert flow.bijective
    assert flow.event_dim == 1
    assert flow.with_cache(1) is flow
    assert flow.inv.inv is flow
    assert flow.forward_shape((7, 3)) == flow.inverse_shape((7, 3)) == (7, 3)


def test_functional_call_sees_the_parameters_it_is_given() -> None:
    flow = ElementwiseAffine(2)
    given = {"params.loc": torch.ones(2), "params.log_scale": torch.zeros(2)}
    torch.testing.assert_close(torch.func.functional_call(flow, given, torch.zeros(2)), torch.ones(2))
