"""Coupling flows: masks, and what they refuse."""

import pytest
import torch

from pyro_nf.flows import Affine, Coupling


def test_mask_says_what_is_transformed() -> None:
    torch.manual_seed(0)
    flow = Coupling(4, [True, False, False, True])
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(10, 4)
    moved = (flow(x) != x).any(0)
    assert moved.tolist() == [True, False, False, True]


def test_all_coordinates_may_be_transformed() -> None:
    flow = Coupling(3, [True] * 3, context_dim=2)
    assert flow.forward_and_log_det(torch.zeros(5, 3), torch.zeros(5, 2))[0].shape == (5, 3)


@pytest.mark.parametrize("mask", [[True], [False, False], [True, False, True], []])
def test_mask_must_fit(mask: list[bool]) -> None:
    with pytest.raises(ValueError, match="mask must hold dim=2 booleans, one of them true; got"):
        Coupling(2, mask)


def test_bound_limits_one_layer() -> None:
    flow = Coupling(2, transformer=Affine(bound=0.1))
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(100.0)
    assert float(flow.forward_and_log_det(torch.randn(50, 2))[1].abs().max().detach()) <= 0.1
