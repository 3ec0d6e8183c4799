"""Bounded scales, roots and their gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_nf.flows.numerics import implicit_gradient, positive, soft_bound, solve_increasing, unbound

numbers = st.floats(-1e12, 1e12)


@given(numbers, st.floats(0.1, 100.0))
def test_soft_bound_stays_inside_and_is_undone(raw: float, bound: float) -> None:
    value = soft_bound(torch.tensor(raw, dtype=torch.float64), bound)
    assert abs(float(value)) <= bound
    if abs(raw) < 1e3 * bound:
        assert math.isclose(float(unbound(value, bound)), raw, rel_tol=1e-9, abs_tol=1e-300)


@given(st.floats(-600.0, 1e12))
def test_positive_is_positive(raw: float) -> None:
    assert float(positive(torch.tensor(raw, dtype=torch.float64))) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_the_neutral_value(dtype: torch.dtype) -> None:
    zero = torch.zeros((), dtype=dtype, requires_grad=True)
    torch.testing.assert_close(positive(zero), torch.ones((), dtype=dtype))
    (slope,) = torch.autograd.grad(soft_bound(zero, 5.0), zero)
    assert float(slope) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_is_accurate_to_rounding(dtype: torch.dtype) -> None:
    root = torch.linspace(-3, 3, 50, dtype=dtype)
    found = solve_increasing(lambda x: (x**3, 3 * x**2), root**3, torch.full_like(root, -4), torch.full_like(root, 5))
    # Where the slope vanishes, x^3 itself is all that float can tell.
    assert float((found**3 - root**3).abs().max()) < 100 * torch.finfo(dtype).eps
    steep = root.abs() > 0.5
    assert float((found - root)[steep].abs().max()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("slope", [0.0, -1.0, torch.nan, torch.inf, 1e-30])
def test_solve_has_half_of_the_digits_whatever_the_slopes_say(slope: float) -> None:
    root = torch.linspace(-3, 3, 50, dtype=torch.float64)
    found = solve_increasing(
        lambda x: (x**3, torch.full_like(x, slope)), root**3, torch.full_like(root, -4), torch.full_like(root, 5)
    )
    assert float((found - root).abs().max()) < 1e-8


def test_solve_ends_of_the_bracket() -> None:
    lower, upper = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    found = solve_increasing(lambda x: (x, torch.ones_like(x)), torch.tensor([1.0, 1.0]), lower, upper)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0]))


def test_implicit_gradient_is_that_of_the_root() -> None:
    # x = (y / a)^(1/3)
    y, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 3.0))
    root = (y / a).pow(1 / 3)
    fixed = root.detach()
    implicit = implicit_gradient(fixed, y - a * fixed**3, lambda r: r / (3 * a.detach() * fixed**2))
    assert torch.equal(implicit.detach(), fixed)
    wanted = torch.autograd.grad(root, (y, a))
    torch.testing.assert_close(torch.autograd.grad(implicit, (y, a)), wanted)
