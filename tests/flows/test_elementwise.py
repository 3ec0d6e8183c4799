"""Gates: their formulas, and S-Log where alpha or x is nearly zero."""

import math

import pytest
import torch

from pyro_nf.flows.elementwise import LeakyReLU, PReLU, SLog


def slog(*raw: float) -> SLog:
    flow = SLog(len(raw)).double()
    with torch.no_grad():
        flow.params.alpha.copy_(torch.tensor(raw, dtype=torch.float64))
    return flow


def test_prelu_is_torchs() -> None:
    flow = PReLU(1).double()
    torch.nn.init.constant_(flow.params.log_alpha, -1.0)
    x = torch.tensor([[-2.0], [-0.5], [0.0], [3.0]], dtype=torch.float64)
    y, log_det = flow.forward_and_log_det(x)
    log_alpha = -1 / (1 + 1 / 30)  # the soft bound
    alpha = torch.tensor(log_alpha, dtype=torch.float64).exp()
    torch.testing.assert_close(y, torch.nn.functional.prelu(x, alpha))
    torch.testing.assert_close(log_det, torch.tensor([log_alpha, log_alpha, 0, 0], dtype=torch.float64))


def test_log_det_sums_over_coordinates() -> None:
    log_det = LeakyReLU(3, alpha=0.5).forward_and_log_det(torch.tensor([-1.0, 2.0, -3.0]))[1]
    torch.testing.assert_close(log_det, torch.tensor(2 * math.log(0.5)))


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 1.0, 40.0])
def test_leaky_is_torchs(alpha: float) -> None:
    x = torch.linspace(-3, 3, 7)[:, None]
    flow = LeakyReLU(1, alpha)
    torch.testing.assert_close(flow(x), torch.nn.functional.leaky_relu(x, alpha))
    torch.testing.assert_close(flow.inv(flow(x)), x)
    assert not list(flow.parameters())


@pytest.mark.parametrize("alpha", [0.0, -0.1, math.inf, math.nan])
def test_leaky_slope_must_be_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be a .*finite number; got"):
        LeakyReLU(2, alpha)


def test_the_density_of_a_rectified_normal_sums_to_one() -> None:
    # The density jumps at 0, so each side has a grid of its own.
    flow, base, total = LeakyReLU(1, 0.2), torch.distributions.Normal(0.0, 1.0), torch.tensor(0.0)
    for end in (-10.0, 10.0):
        y = torch.linspace(0, end, 20001)[1:, None]
        x, log_det = flow.inverse_and_log_det(y)
        total += (base.log_prob(x[:, 0]) + log_det).exp().sum() * abs(end) / 20000
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=0, atol=1e-3)


def test_slog_is_the_formula_of_the_paper() -> None:
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)[:, None]
    for raw, alpha in ((1.0, 0.5), (0.25, 0.2), (1000.0, 1000 / 1001)):
        y, log_det = slog(raw).forward_and_log_det(x)
        torch.testing.assert_close(y, x.sign() / alpha * torch.log(alpha * x.abs() + 1))
        torch.testing.assert_close(log_det, -torch.log(alpha * x.abs() + 1)[:, 0])
        back, back_log_det = slog(raw).inverse_and_log_det(y)
        torch.testing.assert_close(back, y.sign() / alpha * (torch.exp(alpha * y.abs()) - 1))
        torch.testing.assert_close(back_log_det, -log_det)


def test_a_negative_alpha_is_the_inverse_gate() -> None:
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    assert torch.equal(slog(-0.7)(x), slog(0.7).inv(x))


@pytest.mark.parametrize("raw", [s * a for s in (1, -1) for a in (0.0, 1e-300, 1e-12, 1e-7, 6e-6, 7e-6, 1e-4, 0.1)])
def test_slog_and_its_gradients_are_exact_near_alpha_zero(raw: float) -> None:
    # The first terms of the series in alpha, which hold to far beyond the place where the formula changes.
    flow, x = slog(raw), torch.tensor([[0.0], [1e-3], [-1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    a, r = raw / (1 + abs(raw)), x.detach().abs()
    y, log_det = flow.forward_and_log_det(x)
    to_x, to_raw = torch.autograd.grad(y[:, 0].sum(), [x, flow.params.alpha], retain_graph=True)
    third, fourth = (1 / 3, 1 / 4) if a > 0 else (1 / 6, 1 / 24)
    series = r - a * r**2 / 2 + third * a**2 * r**3 - fourth * a**3 * r**4
    torch.testing.assert_close(y, x.sign() * series, rtol=0, atol=1e-15 + 20 * a**4)
    series_to_a = -(r**2) / 2 + 2 * third * a * r**3 - 3 * fourth * a**2 * r**4
    to_a = to_raw[0] * (1 + abs(raw)) ** 2  # through the soft bound
    torch.testing.assert_close(to_a, (x.sign() * series_to_a).sum().detach(), rtol=0, atol=1e-9 + 200 * abs(a) ** 3)
    torch.testing.assert_close(to_x[:, 0].log(), log_det, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(log_det.sum(), flow.params.alpha)
    assert bool(slope.isfinite())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slog_stays_finite_as_far_as_exp_does(sign: float) -> None:
    flow = slog(sign * 1e9).float()
    x = torch.tensor([[-80.0], [0.0], [80.0]], requires_grad=True)
    for method in (flow.forward_and_log_det, flow.inverse_and_log_det):
        y, log_det = method(x)
        gradients = torch.autograd.grad(y.sum() + log_det.sum(), [x, flow.params.alpha])
        assert all(bool(t.isfinite().all()) for t in (y, log_det, *gradients))


def test_slog_has_its_slope_at_any_distance() -> None:
    x = torch.logspace(0, 300, 31, dtype=torch.float64)[:, None].requires_grad_()
    y, log_det = slog(1.0).forward_and_log_det(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope[:, 0].log(), log_det, rtol=1e-13, atol=0)


def test_a_sharper_gate_lies_between_two_scalings() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    alpha, k = 0.5, 8.0
    sharp = x.sign() * torch.log1p(k * alpha * x.abs()) / (k * alpha)
    torch.testing.assert_close(slog(1.0)(k * x) / k, sharp)
