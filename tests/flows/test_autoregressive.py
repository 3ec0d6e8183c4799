"""Autoregressive flows: order, transformers, and what they refuse."""

import pytest
import torch

from pyro_nf.flows import Affine, Autoregressive, Gated
from pyro_nf.flows.transformers import Transformer
from pyro_nf.testing import check_flow


@pytest.mark.parametrize(("reverse", "triangular"), [(False, "lower"), (True, "upper")])
def test_jacobian_is_triangular_in_the_stated_order(reverse: bool, triangular: str) -> None:
    torch.manual_seed(0)
    check_flow(Autoregressive(4, reverse=reverse, context_dim=2), triangular=triangular)


def test_every_coordinate_depends_on_all_before() -> None:
    torch.manual_seed(0)
    flow = Autoregressive(5, hidden_dims=(4, 4)).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(5, dtype=torch.float64))
    assert bool((jacobian[tuple(torch.tril_indices(5, 5))] != 0).all())


def test_hidden_dims_must_hold_every_degree() -> None:
    with pytest.raises(ValueError, match="hidden_dims must hold at least one width, each >= 4 for dim=5"):
        Autoregressive(5, hidden_dims=(8, 3))


@pytest.mark.parametrize("transformer", [Affine(), Gated()])
def test_scales_are_bounded_and_far_from_closed(transformer: Transformer) -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    for extreme in (-1e6, 1e6):
        params = torch.full((7, 3, 2), extreme, dtype=torch.float64)
        params[..., 0] = 1.0
        y, log_det = transformer.forward(x, params)
        assert float(log_det.abs().max()) <= 5.0
        torch.testing.assert_close(transformer.inverse(y, params)[0], x)


def test_gated_is_the_update_of_the_paper_up_to_its_first_gates() -> None:
    # Equations 12-14 of Kingma et al. (2016), with s not yet bounded to any effect.
    x, shift, s = torch.tensor([2.0]), torch.tensor(3.0), torch.tensor(1e-3)
    y, _ = Gated(forget_bias=2.0, bound=1e6).forward(x, torch.stack([shift, s])[None])
    gate, first = torch.sigmoid(s + 2), torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(y, gate * x / first + (1 - gate) / (1 - first) * shift)
    # A step of the network's outputs moves a shift as far as without a gate.
    torch.testing.assert_close(Gated().forward(x, torch.stack([shift, 0 * s])[None])[0], x + shift)
