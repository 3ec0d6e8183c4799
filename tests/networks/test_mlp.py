"""MLP: widths, context and starting values."""

import pytest
import torch

from pyro_nf.networks import MLP


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 4)])
def test_context_broadcasts_and_matters(hidden_dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = MLP(3, hidden_dims, 2, context_dim=4)
    x, context = torch.randn(5, 3), torch.randn(4)
    out = network(x, context)
    torch.testing.assert_close(out, network(x, context.expand(5, 4)))
    assert not torch.equal(out, network(x, -context))


def test_context_goes_to_the_output_directly_too() -> None:
    network = MLP(3, (8,), 2, context_dim=4, zero_init=True)
    assert network.context_to_output is not None
    torch.nn.init.normal_(network.context_to_output.weight)
    x, context = torch.randn(5, 3), torch.randn(5, 4)
    torch.testing.assert_close(network(x, context), context @ network.context_to_output.weight.mT)


@pytest.mark.parametrize("context_dim", [0, 4])
@pytest.mark.parametrize("hidden_dims", [(), (8, 4)])
def test_zero_init(hidden_dims: tuple[int, ...], context_dim: int) -> None:
    network = MLP(3, hidden_dims, 2, context_dim=context_dim, zero_init=True)
    assert not network(torch.randn(5, 3), torch.randn(5, context_dim) if context_dim else None).any()


def test_without_hidden_layers_it_is_linear() -> None:
    network = MLP(3, (), 2)
    x = torch.randn(5, 3)
    torch.testing.assert_close(network(2 * x) - network(x), network(x) - network(0 * x))
