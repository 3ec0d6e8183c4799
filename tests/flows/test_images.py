"""Flows of images: wrappers and couplings against plain loops and hand-made arrays, and two architectures."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from pyro_nf.flows import Additive, Affine, Flow, Gated, LowerTriangularAffine, Permutation, Planar, Sequential
from pyro_nf.flows.images import Channelwise, ImageCoupling, Split, Squeezed, multiscale
from pyro_nf.flows.normalization import ActNorm, initialize_actnorm
from pyro_nf.testing import check_flow

pytestmark = pytest.mark.usefixtures("float64")


def randomized(flow: Flow, scale: float = 1.0) -> Flow:
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn_like(p))
    return flow


def coupling(shape: Sequence[int], mask: str = "channel", context_dim: int = 0, **options: object) -> ImageCoupling:
    return ImageCoupling(shape, mask, hidden_channels=(4,), context_dim=context_dim, **options)


def real_nvp(shape: Sequence[int], num_scales: int, context_dim: int = 0, depth: int = 1) -> Flow:
    def steps(shape: tuple[int, int, int], squeezed: bool) -> list[Flow]:
        mask = "channel" if squeezed else "checkerboard"
        return [coupling(shape, mask, context_dim, invert=i % 2 == 1) for i in range(depth)]

    return multiscale(shape, num_scales, steps)


def glow(shape: Sequence[int], num_scales: int, context_dim: int = 0, depth: int = 1) -> Flow:
    def step(c: int, h: int, w: int) -> Flow:
        mix = Sequential(Permutation(range(c)[::-1]), LowerTriangularAffine(c), ActNorm(c, context_dim))
        return Sequential(coupling((c, h, w), "channel", context_dim), Channelwise(mix, h, w))

    return multiscale(shape, num_scales, lambda s, squeezed: [step(*s) for _ in range(depth)] if squeezed else [])


FLOWS: dict[str, Callable[..., Flow]] = {
    "Channelwise": lambda context_dim: Channelwise(LowerTriangularAffine(2, context_dim), 2, 2),
    "Channelwise-one": lambda context_dim: Channelwise(ActNorm(1, context_dim), 1, 1),
    "Channelwise-numerical": lambda context_dim: Channelwise(Planar(2, context_dim), 1, 2),
    "Squeezed": lambda context_dim: Squeezed(coupling((4, 1, 2), "channel", context_dim)),
    "Split": lambda context_dim: Split(coupling((2, 2, 2), "channel", context_dim), 3),
    "checkerboard": partial(coupling, (1, 2, 2), "checkerboard"),
    "checkerboard-inverted": partial(coupling, (2, 3, 1), "checkerboard", invert=True),
    "channel": partial(coupling, (3, 1, 2), "channel"),
    "channel-inverted": partial(coupling, (3, 2, 1), "channel", invert=True),
    "additive": partial(coupling, (2, 2, 2), transformer=Additive()),
    "gated": partial(coupling, (2, 2, 2), transformer=Gated()),
    "Real NVP": partial(real_nvp, (1, 4, 4), 2),
}


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_contract(make: Callable[..., Flow], context_dim: int) -> None:
    factory = partial(make, context_dim=context_dim)
    check_flow(factory(), factory=factory)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_contract_of_glow(context_dim: int) -> None:
    # One step: matrices of wild parameters, one after another, are as good as singular.
    factory = partial(glow, (1, 4, 4), 1, context_dim)
    check_flow(factory(), factory=factory, identity=False)


@pytest.mark.parametrize("make", [partial(real_nvp, depth=2), partial(glow, depth=2)])
def test_architectures_on_digits(make: Callable[..., Flow]) -> None:
    flow = randomized(make((1, 8, 8), 2), 0.3)
    x = torch.randn(1, 8, 8)
    y, log_det = flow.forward_and_log_det(x)
    back, back_log_det = flow.inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_log_det, -log_det)
    jacobian = torch.autograd.functional.jacobian(flow, x).reshape(64, 64)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1])
    # Nothing is left out: every pixel of the data depends on many of the base.
    assert int((jacobian.abs() > 1e-12).sum(1).min()) > 8


def test_glow_is_initialized_by_images() -> None:
    flow, images = glow((1, 8, 8), 2, depth=2), 100 + 50 * torch.rand(20, 1, 8, 8)
    initialize_actnorm(flow, images)
    assert all(part.initialized for part in flow.modules() if isinstance(part, ActNorm))
    x, _ = flow.inverse_and_log_det(images)
    assert 0.5 < float(x.detach().std()) < 2
    assert abs(float(x.detach().mean())) < 0.5


# Wrappers


@pytest.mark.parametrize("inverse", [False, True])
def test_channelwise_goes_pixel_by_pixel(inverse: bool) -> None:
    inner = randomized(LowerTriangularAffine(3, context_dim=2))
    flow = Channelwise(inner, 2, 4)
    images, context = torch.randn(5, 3, 2, 4), torch.randn(5, 2)
    direction = "inverse_and_log_det" if inverse else "forward_and_log_det"
    out, log_det = getattr(flow, direction)(images, context)
    total = torch.zeros(5)
    for i in range(2):
        for j in range(4):
            pixel, pixel_log_det = getattr(inner, direction)(images[:, :, i, j], context)
            torch.testing.assert_close(out[:, :, i, j], pixel)
            total += pixel_log_det.detach()
    torch.testing.assert_close(log_det, total)


def test_squeeze_moves_blocks_to_channels() -> None:
    # The flow sees what its first map, a permutation at every pixel, shows.
    image = torch.tensor([[[1.0, 2, 5, 6], [3, 4, 7, 8]], [[11.0, 12, 15, 16], [13, 14, 17, 18]]])
    seen: list[Tensor] = []

    class Spy(Permutation):
        def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            seen.append(x)
            return super().forward_and_log_det(x, context)

    flow = Squeezed(Channelwise(Spy([1, 0, 2, 3, 4, 5, 6, 7]), 1, 2))
    y = flow(image)
    assert seen[0].tolist() == [[[1, 11, 2, 12, 3, 13, 4, 14], [5, 15, 6, 16, 7, 17, 8, 18]]]
    assert y.tolist() == [[[11, 2, 15, 6], [3, 4, 7, 8]], [[1, 12, 5, 16], [13, 14, 17, 18]]]
    assert torch.equal(flow.inv(y), image)


def test_split_leaves_the_rest() -> None:
    inner = randomized(coupling((2, 3, 3)))
    flow, x = Split(inner, 5), torch.randn(4, 5, 3, 3)
    y, log_det = flow.forward_and_log_det(x)
    first, first_log_det = inner.forward_and_log_det(x[:, :2])
    assert torch.equal(y[:, 2:], x[:, 2:])
    torch.testing.assert_close(y[:, :2], first)
    torch.testing.assert_close(log_det, first_log_det)


def test_multiscale_factors_out_in_base_coordinates() -> None:
    # Half of the squeezed channels passes the steps of the first scale alone: moving the deeper ones leaves it.
    torch.manual_seed(1)
    flow = randomized(real_nvp((1, 4, 4), 2, depth=2), 0.3)
    images = torch.randn(3, 1, 4, 4)
    x, _ = flow.inverse_and_log_det(images)
    deeper = next(part for part in flow.modules() if isinstance(part, Split))
    randomized(deeper, 0.3)
    other, _ = flow.inverse_and_log_det(images)
    assert torch.equal(other[..., 1::2, :], x[..., 1::2, :])  # lower pixels of the blocks: second half of the channels
    assert bool((other[..., ::2, :] != x[..., ::2, :]).all())


def test_multiscale_calls_for_steps() -> None:
    calls = []

    def steps(shape: tuple[int, int, int], squeezed: bool) -> list[Flow]:
        calls.append((shape, squeezed))
        return [coupling(shape)] if squeezed else []

    assert multiscale((3, 8, 16), 3, steps).event_shape == (3, 8, 16)
    assert {shape for shape, squeezed in calls if squeezed} == {(12, 4, 8), (24, 2, 4), (48, 1, 2)}
    assert {shape for shape, squeezed in calls if not squeezed} == {(3, 8, 16), (6, 4, 8), (12, 2, 4)}


# ImageCoupling


@pytest.mark.parametrize(
    ("mask", "invert", "transformed"),
    [
        ("checkerboard", False, [[[1, 0, 1], [0, 1, 0]]] * 3),
        ("checkerboard", True, [[[0, 1, 0], [1, 0, 1]]] * 3),
        ("channel", False, [[[0] * 3] * 2, [[1] * 3] * 2, [[1] * 3] * 2]),
        ("channel", True, [[[1] * 3] * 2, [[0] * 3] * 2, [[0] * 3] * 2]),
    ],
)
@pytest.mark.parametrize("transformer", [Affine(), Additive()])
def test_coupling_against_loops(
    mask: str, invert: bool, transformed: list[list[list[int]]], transformer: Affine | Additive
) -> None:
    flow = randomized(coupling((3, 2, 3), mask, invert=invert, transformer=transformer, context_dim=2))
    chosen = torch.tensor(transformed).bool()
    assert torch.equal(flow.transformed, chosen)
    x, context = torch.randn(3, 2, 3), torch.randn(2)
    params = flow.network(x * ~chosen, context).unflatten(0, (3, -1))
    y, log_det = flow.forward_and_log_det(x, context)
    total = torch.zeros(())
    for c in range(3):
        for i in range(2):
            for j in range(3):
                moved, slope = transformer.forward(x[c, i, j], params[c, :, i, j])
                if chosen[c, i, j]:
                    total = total + slope
                torch.testing.assert_close(y[c, i, j], moved if chosen[c, i, j] else x[c, i, j] + 0 * moved)
    torch.testing.assert_close(log_det, total)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.forward_and_log_det(x, context)[0], x).reshape(18, 18)
    off_diagonal = jacobian - jacobian.diag().diag()
    assert not off_diagonal[~chosen.flatten()].any()
    assert not off_diagonal[:, chosen.flatten()].any()
    assert off_diagonal.any()


def test_coupling_leaves_the_kept_exactly() -> None:
    flow, x = randomized(coupling((2, 4, 4), "checkerboard", transformer=Gated()), 5.0), torch.randn(10, 2, 4, 4)
    y = flow(x)
    assert torch.equal(y[:, ~flow.transformed], x[:, ~flow.transformed])
    assert torch.equal(flow.inv(y)[:, ~flow.transformed], x[:, ~flow.transformed])


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Channelwise(coupling((2, 1, 1)), 1, 1),
            r"flow must be a flow of vectors .* got event_shape \(2, 1, 1\)",
        ),
        (lambda: Channelwise(Planar(2), 0, 1), "height must be a whole number of at least 1; got 0"),
        (lambda: Squeezed(Planar(4)), r"flow must be a flow of images .* multiple of 4; got event_shape \(4,\)"),
        (lambda: Squeezed(coupling((2, 1, 1))), r"multiple of 4; got event_shape \(2, 1, 1\)"),
        (lambda: Split(Planar(2), 3), r"flow must be a flow of images .* got event_shape \(2,\)"),
        (lambda: Split(coupling((2, 1, 1)), 2), "channels must be more than the flow's 2; got 2"),
        (lambda: coupling((3, 3)), r"event_shape must be \(channels, height, width\); got \(3, 3\)"),
        (lambda: coupling((2, 0, 3)), r"event_shape\[1\] must be a whole number of at least 1; got 0"),
        (lambda: coupling((2, 3, 3), "stripes"), "mask must be 'checkerboard' or 'channel'; got 'stripes'"),
        (lambda: coupling((1, 3, 3), "channel"), r"mask must leave some .* got 'channel' for event_shape \(1, 3, 3\)"),
        (lambda: coupling((3, 1, 1), "checkerboard", invert=True), "mask must leave some .* got 'checkerboard'"),
        (lambda: real_nvp((1, 6, 8), 2), r"multiples of 2 \*\* num_scales, .* got \(1, 6, 8\) and num_scales=2"),
        (lambda: real_nvp((1, 8, 8), 0), "num_scales must be a whole number of at least 1; got 0"),
        (lambda: real_nvp((8, 8), 1), r"event_shape must be .* got \(8, 8\) and num_scales=1"),
    ],
)
def test_errors(make: Callable[[], Flow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
