"""Log densities in batches: recorded or not, batched or not, and asked for by several threads."""

import signal
import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_nf.approximations.density import BatchedEvaluator, Density
from pyro_nf.programs.batching import Batchable

pytestmark = pytest.mark.usefixtures("float64")


def smooth(x):
    return -0.5 * x.square().sum() + x[0].sin() * x[1]


def branching(x):
    # Recorded on one side of 0, it would be wrong on the other.
    return smooth(x) if bool(x.detach()[0] < 0) else 3.0 * smooth(x)


def reading(x):
    x.detach().sum().item()
    return smooth(x)


@pytest.mark.parametrize("log_density", [smooth, branching, reading])
@pytest.mark.parametrize("num_points", [1, 128, 300])
def test_values_gradients_and_hessian_are_autograds(log_density, num_points):
    density = Density(log_density)
    points = torch.randn(num_points, 3, generator=torch.Generator().manual_seed(0))
    gradients, values = density.gradients(points)
    for point, gradient, value in zip(points, gradients, values, strict=True):
        wanted, at = torch.func.grad_and_value(log_density)(point)
        assert torch.allclose(gradient, wanted)
        assert torch.allclose(value, at)
    fresh = Density(log_density)
    for same in (density, fresh, fresh):  # a first time, and again
        assert torch.allclose(same.values(points), values)
    assert torch.allclose(density.hessian(points[0]), torch.autograd.functional.hessian(log_density, points[0]))
    assert density.vectorized == (log_density is smooth)
    assert (density.work > 0) == (log_density is smooth)


def test_values_at_points_of_many_coordinates_before_any_gradient():
    points = torch.randn(200, 300)
    density = Density(smooth)
    for _ in range(2):
        assert torch.allclose(density.values(points), torch.func.vmap(smooth)(points))


def test_a_density_of_many_operations_is_the_same():
    def long(x):
        for _ in range(600):
            x = x + 0.01 * x.sin()
        return -x.square().sum()

    points = torch.randn(5, 2)
    density = Density(long)
    gradients, values = density.gradients(points)
    assert torch.allclose(values, torch.func.vmap(long)(points))
    assert torch.allclose(gradients, torch.func.vmap(torch.func.grad(long))(points))
    assert density.is_long
    recorded = make_fx(density.batch(5))(points)
    assert len([node for node in recorded.graph.nodes if node.op == "call_function"]) < 10
    assert all(map(torch.allclose, recorded(points), (gradients, values)))


def test_threads_are_answered_together_in_their_order_where_run_was_called():
    batches, here = [], threading.current_thread()

    def function(points):
        assert threading.current_thread() is here
        batches.append(points[:, 0].tolist())
        return (points.square(),)

    def job(number, ask):
        return [float(ask(torch.full((1,), float(number)))[0]) for _ in range(number + 1)]

    assert BatchedEvaluator(function).run(job, 3) == [[0.0], [1.0, 1.0], [4.0, 4.0, 4.0]]
    assert batches == [[0.0, 1.0, 2.0], [1.0, 2.0], [2.0]]


# What ends programs and tests is no Exception.
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, pytest.fail.Exception])
@pytest.mark.parametrize("raised_by", ["function", "job"])
def test_the_first_error_ends_all_threads_and_is_raised(error, raised_by):
    def function(points):
        if raised_by == "function":
            raise error("no more")
        return (points,)

    def job(number, ask):
        for _ in range(10_000):
            ask(torch.zeros(1))
            if number == 1:
                raise error("no more")

    before = set(threading.enumerate())
    with pytest.raises(error, match="no more"):
        BatchedEvaluator(function).run(job, 3)
    assert not climbing(before)


def climbing(before):
    """Threads that are new and do not end by themselves, but for that of a progress bar."""
    new = [each for each in threading.enumerate() if each not in before and type(each).__name__ != "TMonitor"]
    for each in new:  # one that Ctrl-C met as it started is not waited for by its pool
        each.join(5.0)
    return [each for each in new if each.is_alive()]


def test_ctrl_c_ends_all_threads():
    def job(number, ask):
        if number == 0:
            signal.raise_signal(signal.SIGINT)  # Python handles it in the main thread, which waits
        while True:
            ask(torch.zeros(1))

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        BatchedEvaluator(lambda points: (points,)).run(job, 3)
    assert not climbing(before)


@pytest.mark.parametrize("dim", [2, 300])
def test_a_point_whose_matrix_cannot_be_factored_has_no_density(dim):
    def log_density(x):
        return torch.linalg.cholesky(torch.stack([torch.stack([x[0], x[1]]), torch.stack([x[1], x[0]])])).sum()

    density = Density(log_density)
    rest = torch.zeros(dim - 2)
    good, bad = torch.cat([torch.tensor([2.0, 1.0]), rest]), torch.cat([torch.tensor([1.0, 2.0]), rest])
    for points in (torch.stack([bad, good]), torch.stack([good, good]), torch.stack([good, bad])):
        gradients, values = density.gradients(points)
        assert torch.equal(values.isnan(), (points == bad).all(-1))
        assert torch.equal(gradients.isnan().any(-1), (points == bad).all(-1))
        assert torch.allclose(values[points[:, 0] == 2.0], log_density(good))
    many = torch.cat([good.expand(300, dim), bad[None]])
    assert density.values(many).isnan().sum() == 1
    assert density.vectorized


def test_what_cannot_be_batched_is_computed_for_the_points_alone():
    calls = []

    def log_density(x):
        calls.append(1)
        return -x.square().sum() if float(x.sum()) > 0 else -x.abs().sum()

    density = Density(log_density)
    density.gradients(torch.ones(3, 2))
    calls.clear()
    assert density.gradients(torch.ones(3, 2))[1].tolist() == [-2.0] * 3
    assert len(calls) == 3


def test_a_multinomial_is_batched():
    counts = torch.tensor([5.0, 3.0, 0.0, 8.0])

    def log_density(x):
        with Batchable():
            return torch.distributions.Multinomial(16, logits=x, validate_args=False).log_prob(counts)

    density = Density(log_density)
    points = torch.randn(5, 4)
    _, values = density.gradients(points)
    assert density.vectorized
    wanted = torch.distributions.Multinomial(16, logits=points).log_prob(counts)
    assert torch.allclose(values, wanted)
