"""ContextParameters: own values, shifted by a context."""

import torch

from pyro_nf.networks import ContextParameters

INITIAL = {"matrix": torch.arange(6.0).reshape(2, 3), "number": torch.tensor([7.0])}


def test_own_values() -> None:
    matrix, number = ContextParameters(INITIAL)()
    torch.testing.assert_close(matrix, INITIAL["matrix"])
    torch.testing.assert_close(number, INITIAL["number"])


def test_context_shifts_linearly_from_zero() -> None:
    parameters = ContextParameters(INITIAL, context_dim=4)
    matrix, number = parameters(torch.randn(5, 1, 4))
    assert matrix.shape == (5, 1, 2, 3)
    assert number.shape == (5, 1, 1)
    torch.testing.assert_close(matrix[0, 0], INITIAL["matrix"])
    with torch.no_grad():
        parameters.from_context.weight.fill_(1.0)
    matrix, _ = parameters(torch.ones(4))
    torch.testing.assert_close(matrix, INITIAL["matrix"] + 4)


def test_initial_values_are_copied() -> None:
    parameters = ContextParameters(INITIAL)
    with torch.no_grad():
        parameters.matrix.add_(1.0)
    assert float(INITIAL["matrix"][0, 0]) == 0.0


def test_functional_call() -> None:
    parameters = ContextParameters(INITIAL)
    matrix, _ = torch.func.functional_call(parameters, {"matrix": torch.ones(2, 3)}, ())
    torch.testing.assert_close(matrix, torch.ones(2, 3))
