"""Radial flows beyond conformance."""

import torch

from pyro_nf.flows import Radial


def test_far_points_do_not_overflow() -> None:
    torch.manual_seed(0)
    flow = Radial(3)
    with torch.no_grad():
        flow.params.raw_g.fill_(3.0)
    y, log_det = flow.forward_and_log_det(torch.full((3,), 1e18))
    torch.testing.assert_close(y, torch.full((3,), 1e18))
    torch.testing.assert_close(log_det, torch.zeros(()))


def test_centre_stays_and_is_stretched_by_g() -> None:
    flow = Radial(3).double()
    with torch.no_grad():
        flow.params.raw_g.fill_(2.0)
    centre = flow.params.x0.detach()
    jacobian = torch.autograd.functional.jacobian(flow, centre)
    g = torch.nn.functional.softplus(torch.tensor(2.0, dtype=torch.float64) + torch.expm1(torch.ones(())).log())
    torch.testing.assert_close(flow(centre).detach(), centre)
    torch.testing.assert_close(jacobian, g * torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
