"""Planar flows beyond conformance: corners of the parameter space."""

import pytest
import torch

from pyro_nf.flows import Planar


def planar(u: list[float], w: list[float], b: float) -> Planar:
    flow = Planar(2).double()
    with torch.no_grad():
        flow.params.u.copy_(torch.tensor(u))
        flow.params.w.copy_(torch.tensor(w))
        flow.params.b.fill_(b)
    return flow


@pytest.mark.parametrize(
    ("u", "w", "b"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),  # no direction at all
        ([1.0, 2.0], [0.0, 0.0], 1.0),
        ([1.0, 2.0], [1e-160, 0.0], 1.0),  # ||w||^2 underflows
        ([-50.0, 0.0], [20.0, 0.0], 0.0),  # as good as singular on the line w'x + b = 0
        ([1e3, 1e3], [1e3, -1e3], 0.0),
        ([300.0, 0.0], [300.0, 0.0], -1e4),  # saturated
    ],
)
def test_extreme_parameters_stay_finite_and_invertible(u: list[float], w: list[float], b: float) -> None:
    torch.manual_seed(0)
    flow = planar(u, w, b)
    x = torch.cat([torch.randn(20, 2, dtype=torch.float64), 1e4 * torch.randn(20, 2, dtype=torch.float64)])
    y, log_det = flow.forward_and_log_det(x)
    back, back_log_det = flow.inverse_and_log_det(y.detach())
    again, _ = flow.forward_and_log_det(back.detach())
    torch.testing.assert_close(again, y, rtol=1e-9, atol=1e-9)
    (log_det.sum() + back.sum() + back_log_det.sum()).backward()
    assert all(bool(t.isfinite().all()) for t in (y, log_det, back, *(p.grad for p in flow.parameters())))


def test_constraint_of_the_paper_holds() -> None:
    # w'u_hat > -1, equation 25 of appendix A.1: monotone along w for any u.
    torch.manual_seed(0)
    for _ in range(20):
        flow = planar((5 * torch.randn(2)).tolist(), (5 * torch.randn(2)).tolist(), 0.3)
        line = torch.linspace(-3, 3, 301, dtype=torch.float64)[:, None] * flow.params.w.detach()
        along = (flow(line).detach() @ flow.params.w.detach()).diff()
        assert bool((along >= 0).all())
