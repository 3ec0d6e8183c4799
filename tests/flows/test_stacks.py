"""Named stacks: names, masks, and points of any shape and size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_nf.flows import Flow, Inverse, stacks
from pyro_nf.flows.coupling import Coupling
from pyro_nf.testing import check_flow

named = pytest.mark.parametrize("name", stacks.names())


@pytest.mark.parametrize(("name", "near"), [("realNVP", "realnvp"), ("plannar", "planar"), ("imaf", "maf")])
def test_unknown_name_offers_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"flow must be one of bnaf, .*; got '{name}'; did you mean .*'{near}'"):
        stacks.make(name, 3)


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"flow must be one of .*; got 'xyz'$"):
        stacks.make("xyz", 3)


@named
def test_options_reach_the_stack(name: str) -> None:
    flow = stacks.make(name, 3, depth=3, context_dim=2)
    layers = (flow.flow if isinstance(flow, Inverse) else flow).flows
    assert len(layers) - (name == "nice") in (3, 6, 9)  # one to three flows a step; NICE ends with a diagonal
    assert flow.context_dim == 2
    assert flow.event_shape == (3,)


@pytest.mark.parametrize("name", ["nice", "realnvp"])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 33])
def test_alternate_masks_touch_every_coordinate_in_two_layers(name: str, dim: int) -> None:
    flow = stacks.make(name, dim, depth=6)
    masks = [set(layer.transformed.tolist()) for layer in flow.flows if isinstance(layer, Coupling)]
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert first | second == set(range(dim))
        assert dim == 1 or not first & second
    if dim > 3:
        assert len({frozenset(mask) for mask in masks[::2]}) > 1


def test_masks_are_the_same_for_everyone_and_draw_nothing() -> None:
    before = torch.get_rng_state()
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        masks.append([layer.transformed.tolist() for layer in stacks.make("realnvp", 9).flows])
    torch.set_rng_state(before)
    assert masks[0] == masks[1]


@named
def test_state_depends_on_the_seed_alone(name: str) -> None:
    def build() -> Flow:
        torch.manual_seed(3)
        return stacks.make(name, 4, depth=2)

    for one, other in zip(build().state_dict().values(), build().state_dict().values(), strict=True):
        assert torch.equal(one, other)


@named
@settings(max_examples=15, deadline=None)
@given(
    dim=st.integers(1, 4),
    batch=st.lists(st.integers(0, 3), max_size=3),
    magnitude=st.floats(-6.0, 6.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_size(name: str, dim: int, batch: list[int], magnitude: float, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = stacks.make(name, dim, depth=2).double()
        with torch.no_grad():
            for p in flow.parameters():
                p.copy_(0.5 * torch.randn_like(p))
        x = 10**magnitude * torch.randn(*batch, dim, dtype=torch.float64)
    y, log_det = flow.forward_and_log_det(x)
    back, back_log_det = flow.inverse_and_log_det(y)
    assert y.shape == back.shape == x.shape
    assert log_det.shape == back_log_det.shape == tuple(batch)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-7, atol=1e-7)


def test_symmetric_convolution() -> None:
    check_flow(stacks.make("convolution", 4, depth=2, kind="symmetric"))


def test_convex_combination_of_linear_iaf() -> None:
    check_flow(stacks.make("linear_iaf", 4, num_matrices=3, context_dim=2), triangular="lower")
