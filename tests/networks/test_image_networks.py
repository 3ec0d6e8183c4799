import functools

import pytest
import torch

from pyro_nf.networks import ImageDecoder, ImageEncoder


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 20), (2, 7, 5), (3, 1, 2)])
@pytest.mark.parametrize("channels", [(4,), (4, 3, 5)])
def test_images_of_every_size_are_encoded_and_decoded(shape, channels):
    size = shape[0] * shape[1] * shape[2]
    encoder = ImageEncoder(shape, 6, channels, kernel_size=3)
    decoder = ImageDecoder(6, shape, num_params=2, channels=channels, kernel_size=3)
    x = torch.randn(2, 4, size)
    context = encoder(x)
    assert context.shape == (2, 4, 6)
    assert decoder(context).shape == (2, 4, 2 * size)
    assert torch.allclose(encoder(x[1, 2]), context[1, 2], atol=1e-5)


def test_every_pixel_is_seen_and_reached():
    encoder, decoder = ImageEncoder((1, 7, 6), 5, (4, 4)), ImageDecoder(5, (1, 7, 6), channels=(4, 4))
    seen = torch.autograd.functional.jacobian(lambda x: encoder(x).sum(0), torch.randn(3, 42))
    assert (seen.abs().sum((0, 1)) > 0).all()
    reached = torch.autograd.functional.jacobian(lambda z: decoder(z).sum(0), torch.randn(3, 5))
    assert (reached.abs().sum((1, 2)) > 0).all()


def test_outputs_stand_parameter_by_parameter():
    decoder = ImageDecoder(5, (1, 4, 4), num_params=2, channels=(3,))
    with torch.no_grad():
        decoder.convolutions[-1].weight.zero_()
        decoder.convolutions[-1].bias.copy_(torch.tensor([1.0, 2.0]))
    assert decoder(torch.randn(5)).tolist() == [1.0] * 16 + [2.0] * 16


def test_they_run_under_vmap():
    encoder, decoder = ImageEncoder((1, 6, 6), 5, (4,)), ImageDecoder(5, (1, 6, 6), channels=(4,))
    x, z = torch.randn(3, 4, 36), torch.randn(3, 4, 5)
    assert torch.allclose(torch.func.vmap(encoder)(x), encoder(x), atol=1e-5)
    assert torch.allclose(torch.func.vmap(decoder)(z), decoder(z), atol=1e-5)


@pytest.mark.parametrize("make", [functools.partial(ImageEncoder, out_features=2), functools.partial(ImageDecoder, 2)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\), all positive; got \(8, 8\)"),
        ({"channels": ()}, r"channels must hold the positive number of each level; got \(\)"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
    ],
)
def test_bad_input_gets_a_sentence(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"image_shape": (1, 8, 8), **options})
