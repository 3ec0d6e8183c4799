"""Mixtures of sigmoids: formula, tails, and units that part."""

import pytest
import torch
from torch import Tensor

from pyro_nf.flows import Coupling
from pyro_nf.flows.transformers import DeepSigmoidal, LogisticMixture

pytestmark = pytest.mark.usefixtures("float64")


def mixture(transformer: DeepSigmoidal, x: Tensor, params: Tensor) -> Tensor:
    log_w, log_a, b = transformer._unpack(params)
    return (log_w.exp() * torch.sigmoid(log_a.exp() * x[..., None] + b)).sum(-1)


def test_deep_sigmoidal_is_the_formula_of_the_paper() -> None:
    transformer = DeepSigmoidal(5)
    x, params = torch.randn(20), torch.randn(20, transformer.num_params)
    y, _ = transformer.forward(x, params)
    torch.testing.assert_close(y, mixture(transformer, x, params).logit())


def test_logistic_mixture_is_a_distribution_function_through_logit_and_affine() -> None:
    transformer = LogisticMixture(5)
    x, params = torch.randn(20), torch.randn(20, transformer.num_params)
    y, _ = transformer.forward(x, params)
    shift, log_scale = params[:, -2], params[:, -1]
    inner = mixture(transformer.mixture, x, params[:, :-2]).logit()
    torch.testing.assert_close(y, shift + (log_scale / (1 + log_scale.abs() / 5)).exp() * inner)


def test_tails_are_linear_with_the_smallest_slope() -> None:
    transformer = DeepSigmoidal(4)
    params = torch.randn(7, transformer.num_params)
    _, log_a, _ = transformer._unpack(params)
    for end in (-1e8, 1e8):
        y, log_slope = transformer.forward(torch.full((7,), end), params)
        assert bool(y.isfinite().all())
        torch.testing.assert_close(log_slope, log_a.amin(-1))


def test_equal_units_part_in_training() -> None:
    # Two modes need at least two different sigmoids.
    torch.manual_seed(0)
    flow = Coupling(1, transformer=DeepSigmoidal(4))
    y = torch.cat([torch.randn(500) - 4, torch.randn(500) + 4])[:, None]
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    losses = []
    for _ in range(200):
        x, log_det = flow.forward_and_log_det(y)
        loss = (0.5 * x[:, 0] ** 2 - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Equal units are an affine map, which leaves .5 + log 4.1 = 1.92; two modes leave .5 + log 2 = 1.19.
    assert losses[-1] < 1.5


def test_num_units() -> None:
    with pytest.raises(ValueError, match="num_units must be a whole number of at least 1; got 0"):
        DeepSigmoidal(0)
