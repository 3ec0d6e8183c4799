"""Rational-quadratic spline: formula, box and smoothness."""

import pytest
import torch
from torch import Tensor

from pyro_nf.flows import Coupling
from pyro_nf.flows.transformers import RationalQuadraticSpline

pytestmark = pytest.mark.usefixtures("float64")


def naive(x: float, left: Tensor, low: Tensor, slopes: Tensor) -> float:
    """Equation 4 of Durkan et al. (2019), in the bin that holds x."""
    k = int((x >= left).sum()) - 1
    w, h = left[k + 1] - left[k], low[k + 1] - low[k]
    s, t = h / w, (x - left[k]) / w
    numerator = h * (s * t**2 + slopes[k] * t * (1 - t))
    return float(low[k] + numerator / (s + (slopes[k + 1] + slopes[k] - 2 * s) * t * (1 - t)))


@pytest.mark.parametrize("num_bins", [1, 2, 8])
def test_formula(num_bins: int) -> None:
    spline = RationalQuadraticSpline(num_bins, bound=3.0)
    params = 2 * torch.randn(1, spline.num_params)
    bound, left, low, slopes = (tensor[0] for tensor in spline._knots(params))
    for end in (left, low):
        torch.testing.assert_close(end[[0, -1]], torch.stack([-bound, bound]))
        assert bool((end.diff() > 0).all())
    for x in torch.linspace(-0.999, 0.999, 41) * bound:
        y, _ = spline.forward(x[None], params)
        torch.testing.assert_close(float(y), naive(float(x), left, low, slopes))


def test_outside_the_box_it_is_the_identity_with_finite_gradients() -> None:
    spline = RationalQuadraticSpline()
    params = (5 * torch.randn(6, spline.num_params)).requires_grad_()
    x = torch.tensor([-1e9, -50.0, -37.0, 37.0, 50.0, 1e9]).requires_grad_()
    for direction in (spline.forward, spline.inverse):
        y, log_slope = direction(x, params)
        assert torch.equal(y, x)
        assert not log_slope.any()
        for gradient in torch.autograd.grad(y.sum() + log_slope.sum(), [x, params]):
            assert bool(gradient.isfinite().all())


def test_values_and_slopes_are_continuous_at_knots_and_at_the_edge_of_the_box() -> None:
    spline = RationalQuadraticSpline(6)
    params = torch.randn(1, spline.num_params)
    _, left, low, _ = spline._knots(params)
    for direction, knots in ((spline.forward, left), (spline.inverse, low)):
        before, after = (direction(knots[0] + side, params.expand(7, -1)) for side in (-1e-9, 1e-9))
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_box_is_a_parameter() -> None:
    spline = RationalQuadraticSpline(4, bound=2.0)
    params = torch.zeros(3, spline.num_params)
    params[:, -1] = torch.tensor([-100.0, 0.0, 100.0])
    bound = spline._knots(params)[0]
    torch.testing.assert_close(
        bound.log(), torch.tensor(2.0).log() + torch.tensor([-1.96, 0.0, 1.96]), atol=1e-2, rtol=0
    )


def test_the_box_grows_where_the_target_needs_it() -> None:
    # A normal of standard deviation 3, from a box that ends at 2.
    flow = Coupling(1, transformer=RationalQuadraticSpline(bound=2.0))
    optimizer = torch.optim.Adam(flow.parameters(), 0.03)
    for _ in range(300):
        y, log_det = flow.forward_and_log_det(torch.randn(256, 1))
        loss = (0.5 * (y[:, 0] / 3) ** 2 - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(flow(torch.randn(10_000, 1)).detach().std()) == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(("num_bins", "bound"), [(0, 1.0), (3, 0.0)])
def test_arguments(num_bins: int, bound: float) -> None:
    with pytest.raises(
        ValueError,
        match=r"num_bins must be a whole number of .*; got 0|bound must be .* greater than 0; got 0",
    ):
        RationalQuadraticSpline(num_bins, bound)
