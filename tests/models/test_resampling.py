import torch

from pyro_nf.models import Resampled, binarize, dequantize


def test_levels_become_bits_or_fractions():
    levels = torch.tensor([0.0, 51.0, 255.0]).expand(20_000, 3)
    assert torch.allclose(binarize(levels).mean(0), levels[0] / 255, atol=0.02)
    fractions = dequantize(levels)
    assert torch.equal((256 * fractions).floor(), levels)
    assert torch.allclose(256 * fractions.mean(0), levels[0] + 0.5, atol=0.02)


def test_data_are_drawn_anew_where_they_are():
    data = Resampled(torch.full((100, 4), 128.0), binarize)
    values, before = data.values, data.values.clone()
    data()
    assert data.values is values
    assert (values != before).any()
