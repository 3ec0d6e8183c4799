"""ActNorm and BatchNorm: what data set, what training does, what is saved."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from pyro_nf.flows import Coupling, ElementwiseAffine, Inverse, Permutation, Planar, Sequential
from pyro_nf.flows.images import Channelwise
from pyro_nf.flows.normalization import ActNorm, BatchNorm, initialize_actnorm, set_batchnorm_statistics
from pyro_nf.testing import check_flow

pytestmark = pytest.mark.usefixtures("float64")

LOC, SCALE = torch.tensor([1.0, -200.0, 3e4], dtype=torch.float64), torch.tensor([1.0, 1e-3, 1e5], dtype=torch.float64)


def data(*batch: int) -> Tensor:
    return LOC + SCALE * torch.randn(*batch, 3, dtype=torch.float64)


def assert_standard(points: Tensor) -> None:
    variance, mean = torch.var_mean(points.reshape(-1, points.shape[-1]), 0, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-6, atol=0)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("make", [ActNorm, lambda dim, context_dim: BatchNorm(dim, context_dim).eval()])
def test_contract(make: type[ActNorm], dim: int, context_dim: int) -> None:
    factory = partial(make, dim, context_dim)
    check_flow(factory(), factory=factory)


# ActNorm


@pytest.mark.parametrize("batch", [(100,), (4, 25)])
@pytest.mark.parametrize("inverse", [True, False])
def test_initialize_normalizes_in_the_direction_of_the_data(batch: tuple[int, ...], inverse: bool) -> None:
    flow, points = ActNorm(3), data(*batch)
    initialize_actnorm(flow, points, inverse=inverse)
    out, _ = flow.inverse_and_log_det(points) if inverse else flow.forward_and_log_det(points)
    assert_standard(out)
    check_flow(flow, identity=False)


@pytest.mark.parametrize("inverse", [True, False])
def test_initialize_sets_all_in_one_pass(inverse: bool) -> None:
    flow = Sequential(ActNorm(3), Planar(3), Inverse(ActNorm(3)), Coupling(3), ActNorm(3))
    with torch.no_grad():
        for p in [*flow.flows[1].parameters(), *flow.flows[3].parameters()]:
            p.copy_(torch.randn_like(p))
    points = data(50)
    initialize_actnorm(flow, points, inverse=inverse)
    parts = list(flow.flows)
    for part in reversed(parts) if inverse else parts:
        points, _ = part.inverse_and_log_det(points) if inverse else part.forward_and_log_det(points)
        if isinstance(part, ActNorm) or (isinstance(part, Inverse) and isinstance(part.flow, ActNorm)):
            assert_standard(points)


def test_initialize_takes_statistics_over_pixels() -> None:
    flow, images = Channelwise(ActNorm(3), 2, 5), data(4, 2, 5).movedim(-1, -3)
    initialize_actnorm(flow, images)
    assert_standard(flow.inverse_and_log_det(images)[0].movedim(-3, -1))


def test_initialize_sets_the_own_part_under_a_context() -> None:
    flow, points, context = ActNorm(3, context_dim=2), data(100), torch.randn(100, 2)
    initialize_actnorm(flow, points, context)
    assert_standard(flow.inverse_and_log_det(points, context)[0])
    assert flow.params.from_context is not None
    assert not flow.params.from_context.weight.any()


def test_initialize_leaves_what_is_initialized() -> None:
    first, second = ActNorm(3), ActNorm(3)
    initialize_actnorm(first, data(10))
    before = copy.deepcopy(first.state_dict())
    initialize_actnorm(Sequential(second, first), data(20))
    torch.testing.assert_close(dict(first.state_dict()), dict(before), rtol=0, atol=0)
    assert second.initialized


def test_state_dict_restores_values_and_flag() -> None:
    flow, fresh = ActNorm(3), ActNorm(3)
    initialize_actnorm(flow, data(10))
    fresh.load_state_dict(flow.state_dict())
    assert fresh.initialized
    points = data(5)
    initialize_actnorm(fresh, data(20))
    torch.testing.assert_close(fresh(points), flow(points), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [True, False])
def test_constant_coordinates_are_only_centred(dtype: torch.dtype, inverse: bool) -> None:
    flow = ActNorm(4).to(dtype)
    points = torch.tensor([0.1, 0.0, 12345.678, 0.0], dtype=dtype).repeat(1000, 1)
    points[:, 3] = torch.randn(1000)
    initialize_actnorm(flow, points, inverse=inverse)
    out, log_det = flow.inverse_and_log_det(points) if inverse else flow.forward_and_log_det(points)
    torch.testing.assert_close(out[:, :3], torch.zeros_like(out[:, :3]), rtol=0, atol=1e-2)
    torch.testing.assert_close(log_det, -points[:, 3].std(correction=0).log().expand(1000), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e25])
def test_scales_of_any_size_stay_finite(scale: float) -> None:
    flow, points = ActNorm(1).float(), scale * torch.randn(50, 1, dtype=torch.float32)
    initialize_actnorm(flow, points)
    assert all(bool(t.isfinite().all()) for t in flow.inverse_and_log_det(points))


def test_one_point_is_centred() -> None:
    flow, point = ActNorm(3), data()
    initialize_actnorm(flow, point)
    x, log_det = flow.inverse_and_log_det(point)
    torch.testing.assert_close(x, torch.zeros(3))
    assert float(log_det.detach()) == 0.0


class _Failing(Permutation):
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no way through")


def test_a_failing_pass_leaves_nothing_switched_on() -> None:
    flow = Sequential(ActNorm(3), _Failing(range(3)), ActNorm(3))
    with pytest.raises(RuntimeError, match="no way through"):
        initialize_actnorm(flow, data(10))
    before = copy.deepcopy(flow.flows[0].state_dict())
    flow.flows[0].inverse_and_log_det(data(10))
    torch.testing.assert_close(dict(flow.flows[0].state_dict()), dict(before), rtol=0, atol=0)
    assert not flow.flows[0].initialized
    assert flow.flows[2].initialized


def test_parameters_train_after_initialize() -> None:
    flow = ActNorm(3)
    initialize_actnorm(flow, data(10))
    x, log_det = flow.inverse_and_log_det(data(4))
    (x.square().sum() + log_det.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in flow.parameters())


# BatchNorm


def naive(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = y.sum(0) / len(y)
    variance = ((y - mean) ** 2).sum(0) / len(y)
    return torch.exp(gamma) * (y - mean) / torch.sqrt(variance + eps) + beta, (
        gamma - 0.5 * (variance + eps).log()
    ).sum()


def trained(**options: float) -> BatchNorm:
    flow = BatchNorm(3, **options)
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
    return flow


def test_training_normalizes_by_the_batch_with_gradients() -> None:
    flow, points = trained(eps=1e-3), torch.randn(7, 3, requires_grad=True)
    log_scale = flow.affine.params.log_scale
    gamma, beta = log_scale / (1 + (log_scale / 30).abs()), flow.affine.params.loc
    weights = torch.randn(7, 3)
    gradients = []
    for x, log_det in (flow.inverse_and_log_det(points), naive(points, gamma, beta, 1e-3)):
        log_det = log_det.expand(7)
        gradients.append(torch.autograd.grad((weights * x).sum() + log_det.sum(), [points, *flow.parameters()]))
        gradients[-1] += (x, log_det)
    torch.testing.assert_close(*gradients)


def test_running_statistics_follow() -> None:
    flow, mean, variance = BatchNorm(3, momentum=0.25, eps=1e-3), torch.zeros(3), torch.ones(3)
    for batch in ((5,), (2, 4), (3, 1, 2)):
        points = torch.randn(*batch, 3) + 3
        flow.inverse_and_log_det(points)
        flat = points.reshape(-1, 3)
        mean = 0.75 * mean + 0.25 * flat.mean(0)
        variance = 0.75 * variance + 0.25 * (flat.var(0, correction=0) + 1e-3)
        torch.testing.assert_close(flow.mean, mean)
        torch.testing.assert_close(flow.variance, variance)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_undo_the_normalization(training: bool) -> None:
    flow = trained()
    set_batchnorm_statistics(flow, data(50))
    before = copy.deepcopy(flow.state_dict())
    x = torch.randn(5, 3)
    y, log_det = flow.train(training).forward_and_log_det(x)
    back, back_log_det = flow.eval().inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det, -back_log_det)
    torch.testing.assert_close(dict(flow.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_set_statistics_are_those_of_all_data(training: bool) -> None:
    flow, points = Sequential(BatchNorm(3), Planar(3), BatchNorm(3, momentum=0.01)), data(40)
    flow.train(training)
    set_batchnorm_statistics(flow, points)
    torch.testing.assert_close(flow.flows[2].mean, points.mean(0))
    torch.testing.assert_close(flow.flows[2].variance, points.var(0, correction=0) + 1e-5)
    # What arrives at the first has passed the last, already set.
    arrived, _ = Sequential(*flow.flows[1:]).eval().inverse_and_log_det(points)
    torch.testing.assert_close(flow.flows[0].mean, arrived.mean(0))
    assert flow.flows[0].training == training


def test_set_statistics_through_an_inverse() -> None:
    flow, points = Sequential(Inverse(BatchNorm(3)), ElementwiseAffine(3)), data(40)
    with pytest.raises(ValueError, match=r"data must reach every layer .* with inverse=True they miss 1"):
        set_batchnorm_statistics(flow, points)
    set_batchnorm_statistics(flow, points, inverse=False)
    torch.testing.assert_close(flow.flows[0].flow.mean, points.mean(0))


def test_state_dict_restores_statistics() -> None:
    flow, fresh = trained(), BatchNorm(3)
    set_batchnorm_statistics(flow, data(20))
    fresh.load_state_dict(flow.state_dict())
    points = data(5)
    torch.testing.assert_close(
        fresh.eval().inverse_and_log_det(points), flow.eval().inverse_and_log_det(points), rtol=0, atol=0
    )


def test_a_scored_batch_can_be_sampled_and_scored_again() -> None:
    # The running statistics change in place, after an earlier call of the same graph has used them.
    flow = trained()
    total = flow.forward_and_log_det(torch.randn(4, 3))[0].sum() + flow.inverse_and_log_det(data(4))[0].square().sum()
    total = total + flow.forward_and_log_det(torch.randn(4, 3))[1].sum()
    total.backward()


@pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3)])
def test_a_batch_of_one_cannot_train(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least two points; got y of shape .* \(call eval\(\)"):
        BatchNorm(3).inverse_and_log_det(torch.zeros(shape))
    BatchNorm(3).eval().inverse_and_log_det(torch.zeros(shape))


def test_pixels_count_as_points() -> None:
    flow = Channelwise(BatchNorm(3), 2, 5)
    x, _ = flow.inverse_and_log_det(data(2, 5).movedim(-1, -3))
    torch.testing.assert_close(x.mean((-2, -1)), torch.zeros(3))


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_momentum_must_be_a_weight(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum must be in \(0, 1\]; got {momentum}"):
        BatchNorm(3, momentum=momentum)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive(eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps must be a finite number greater than 0; got {eps}"):
        BatchNorm(3, eps=eps)


@pytest.mark.parametrize("function", [initialize_actnorm, set_batchnorm_statistics])
def test_data_must_be_points(function: type) -> None:
    flow = Sequential(ActNorm(3), BatchNorm(3))
    with pytest.raises(ValueError, match=r"data must be a tensor of real numbers, at least one, .* of shape \(0, 3\)"):
        function(flow, torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"data must be finite; 6 of its 6 numbers are NaN or infinite"):
        function(flow, torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"of shape \(\*batch, 3\); got .* of shape \(5, 2\)"):
        function(flow, torch.zeros(5, 2))
    assert not flow.flows[0].initialized
