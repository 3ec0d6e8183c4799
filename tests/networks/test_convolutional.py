"""ConvNet: the formula, batch shapes, context and starting values."""

import pytest
import torch
from torch import Tensor

from pyro_nf.networks.convolutional import ConvNet


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One pixel after another, `sum_{c, k, l} weight[:, c, k, l] x[c, i + k - r, j + l - r] + bias`."""
    radius = weight.shape[-1] // 2
    out = bias[:, None, None].repeat(1, *x.shape[1:])
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for k in range(weight.shape[-1]):
                for m in range(weight.shape[-1]):
                    row, column = i + k - radius, j + m - radius
                    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                        out[:, i, j] += weight[:, :, k, m] @ x[:, row, column]
    return out


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_formula(kernel_size: int) -> None:
    network = ConvNet(2, (4,), 3, kernel_size, context_dim=2).double()
    x, context = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    first, last = network.layers
    shift = network.from_context.weight @ context
    hidden = torch.tanh(convolution(x, first.weight, first.bias + shift))
    out_shift = network.context_to_output.weight @ context
    torch.testing.assert_close(network(x, context), convolution(hidden, last.weight, last.bias + out_shift))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
def test_batch_shapes(batch: tuple[int, ...]) -> None:
    network = ConvNet(2, (4,), 3)
    x = torch.randn(*batch, 2, 4, 5)
    out = network(x)
    assert out.shape == (*batch, 3, 4, 5)
    one_by_one = [network(image) for image in x.reshape(-1, 2, 4, 5)]
    if one_by_one:
        torch.testing.assert_close(out.reshape(-1, 3, 4, 5), torch.stack(one_by_one))


@pytest.mark.parametrize(
    ("batch", "context_batch"), [((), (3,)), ((3,), ()), ((2, 3), (3,)), ((3,), (2, 1)), ((0,), ()), ((), (0,))]
)
@pytest.mark.parametrize("hidden_channels", [(), (4,), (4, 3)])
def test_context_broadcasts_and_matters(
    hidden_channels: tuple[int, ...], batch: tuple[int, ...], context_batch: tuple[int, ...]
) -> None:
    network = ConvNet(1, hidden_channels, 2, context_dim=4)
    x, context = torch.randn(*batch, 1, 3, 3), torch.randn(*context_batch, 4)
    whole = torch.broadcast_shapes(batch, context_batch)
    out = network(x, context)
    assert out.shape == (*whole, 2, 3, 3)
    torch.testing.assert_close(out, network(x.expand(*whole, 1, 3, 3), context.expand(*whole, 4)))
    assert not out.numel() or not torch.equal(out, network(x, -context))


@pytest.mark.parametrize("context_dim", [0, 4])
@pytest.mark.parametrize("hidden_channels", [(), (8, 4)])
def test_zero_init(hidden_channels: tuple[int, ...], context_dim: int) -> None:
    network = ConvNet(3, hidden_channels, 2, context_dim=context_dim, zero_init=True)
    assert not network(torch.randn(5, 3, 2, 2), torch.randn(5, context_dim) if context_dim else None).any()


def test_vmap() -> None:
    network = ConvNet(2, (4,), 3, context_dim=2)
    x, context = torch.randn(5, 2, 4, 4), torch.randn(5, 2)
    torch.testing.assert_close(torch.func.vmap(network)(x, context), network(x, context))


@pytest.mark.parametrize("kernel_size", [-1, 0, 2])
def test_kernel_size_must_be_odd(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"kernel_size must be .*; got {kernel_size}"):
        ConvNet(1, (), 1, kernel_size)
