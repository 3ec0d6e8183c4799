import torch
from torch import nn

from pyro_nf.networks import GatedLinear, GatedMLP


def test_a_gated_layer_follows_its_formula(float64):
    layer = GatedLinear(3, 2)
    x = torch.randn(5, 4, 3)
    value, gate = layer.linear.weight.chunk(2)
    b, c = layer.linear.bias.chunk(2)
    assert torch.allclose(layer(x), (x @ value.T + b) * (x @ gate.T + c).sigmoid())


def test_a_gated_mlp_ends_linearly():
    network = GatedMLP(3, (8, 6), 2)
    assert [type(part) for part in network] == [GatedLinear, GatedLinear, nn.Linear]
    assert network(torch.randn(5, 4, 3)).shape == (5, 4, 2)
    assert isinstance(GatedMLP(3, (), 2)[0], nn.Linear)
