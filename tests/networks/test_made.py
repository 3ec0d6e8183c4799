"""MADE: what each output depends on."""

import pytest
import torch
from torch import Tensor

from pyro_nf.networks import MADE, MaskedLinear


def dependence(network: MADE, dim: int, context: Tensor | None = None) -> Tensor:
    """Which outputs (rows) depend on which inputs, at random weights: `(dim, dim)` booleans."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p))
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context), torch.randn(dim))
    return (jacobian != 0).all(1)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("hidden_dims", [(5,), (7, 6), (16, 5, 16)])
@pytest.mark.parametrize("order", [None, [5, 4, 3, 2, 1], [3, 1, 5, 2, 4]])
def test_outputs_see_exactly_the_inputs_before(
    order: list[int] | None, hidden_dims: tuple[int, ...], context_dim: int
) -> None:
    network = MADE(5, 2, hidden_dims, order, context_dim=context_dim)
    degrees = torch.tensor(order or [1, 2, 3, 4, 5])
    seen = dependence(network, 5, torch.randn(context_dim) if context_dim else None)
    assert torch.equal(seen, degrees[:, None] > degrees)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_context_reaches_every_output_nonlinearly(dim: int) -> None:
    torch.manual_seed(0)
    network = MADE(dim, 2, (16, 16), context_dim=3)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p))
    x, context = torch.randn(dim), torch.randn(3)
    slopes = [torch.autograd.functional.jacobian(lambda c: network(x, c), point) for point in (context, -context)]
    assert bool((slopes[0] != 0).all())
    assert bool((slopes[0] != slopes[1]).all())


def test_one_hidden_layer_of_dim_2_and_shapes() -> None:
    network = MADE(2, 3, (1,))
    assert network(torch.zeros(4, 7, 2)).shape == (4, 7, 2, 3)


def test_starts_at_zero() -> None:
    network = MADE(4, 2, (8,), context_dim=3)
    assert not network(torch.randn(6, 4), torch.randn(6, 3)).any()


@pytest.mark.parametrize(
    ("dim", "hidden_dims", "context_dim", "least"), [(5, (), 0, 4), (5, (3,), 0, 4), (5, (9, 4), 2, 5), (1, (), 0, 1)]
)
def test_hidden_dims_must_hold_every_degree(
    dim: int, hidden_dims: tuple[int, ...], context_dim: int, least: int
) -> None:
    with pytest.raises(ValueError, match=f"hidden_dims must hold at least one width, each >= {least} for dim={dim}"):
        MADE(dim, 2, hidden_dims, context_dim=context_dim)


@pytest.mark.parametrize("order", [[1, 1, 2], [0, 1, 2], [1, 2]])
def test_order_must_be_a_permutation(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"order must be a permutation of 1 \.\. 3; got"):
        MADE(3, 1, (4,), order)


def test_masked_linear_without_weights_to_train_has_a_buffer() -> None:
    layer = MaskedLinear(torch.zeros(3, 2))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert torch.equal(layer(torch.randn(5, 2)), layer.bias.expand(5, 3))


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("order", [None, [3, 1, 5, 2, 4]])
def test_unrolled_it_is_the_network_on_its_own_outputs(order: list[int] | None, context_dim: int) -> None:
    network = MADE(5, 2, (7, 9), order, context_dim=context_dim).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p))
    context = torch.randn(6, context_dim, dtype=torch.float64) if context_dim else None
    noise = torch.randn(6, 5, dtype=torch.float64)

    def value(params: Tensor, noise: Tensor) -> Tensor:
        return torch.tanh(params[..., 0]) + params[..., 1].sigmoid() * noise

    x = network.unroll(lambda k, params: value(params, noise[:, k : k + 1]), context)
    torch.testing.assert_close(value(network(x, context), noise), x)
