"""Factorizations that fail for some draws: those have no density, and nothing is raised."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.programs.noise import running
from pyro_nf.programs.program import Program
from pyro_nf.programs.traces import log_prob_sum

pytestmark = pytest.mark.usefixtures("float64")
EYE = torch.eye(2, dtype=torch.float64)


def matrix(x):
    return torch.stack([torch.stack([x[0], x[1]]), torch.stack([x[1], x[0]])])


FUNCTIONS = {
    "cholesky": lambda m: torch.linalg.cholesky(m).sum(),
    "Tensor.cholesky": lambda m: m.cholesky(upper=True).sum(),
    "inv": lambda m: torch.linalg.inv(m).sum(),
    "Tensor.inverse": lambda m: m.inverse().sum(),
    "solve": lambda m: torch.linalg.solve(m, torch.ones(2)).sum(),
    "solve for many": lambda m: torch.linalg.solve(m, EYE).square().sum(),
    "lu_factor": lambda m: torch.linalg.lu_factor(m)[0].sum(),
    "eigh": lambda m: torch.linalg.eigh((m[0, 0] - m[0, 1]).sqrt() * EYE.new_tensor([[2, 1], [1, 3]]))[0].sum(),
    "svd": lambda m: torch.linalg.svdvals((m[0, 0] - m[0, 1]).sqrt() * EYE.new_tensor([[2, 1], [1, 3]])).sum(),
    "pinv": lambda m: torch.linalg.pinv((m[0, 0] - m[0, 1]).log() * EYE).sum(),
    "covariance": lambda m: dist.MultivariateNormal(torch.zeros(2), m).log_prob(torch.ones(2)),
    "precision": lambda m: dist.MultivariateNormal(torch.zeros(2), precision_matrix=m).log_prob(torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_bad_point_among_many_is_the_only_one_without_a_density(name):
    def log_density(x):
        return FUNCTIONS[name](matrix(x)) + x.sum()

    singular = name in ("inv", "Tensor.inverse", "solve", "solve for many", "lu_factor")
    bad = torch.tensor([0.0, 0.0] if singular else [1.0, 2.0])
    points = torch.stack([torch.tensor([3.0 + i, 1.0]) for i in range(5)])
    with_bad = torch.cat([points[:2], bad[None], points[2:]])
    density = Density(log_density)
    gradients, values = density.gradients(with_bad)
    is_bad = torch.arange(6) == 2
    assert torch.equal(values.isfinite(), ~is_bad)
    assert torch.equal(gradients.isfinite().all(-1), ~is_bad)
    for point, value, gradient in zip(points, values[~is_bad], gradients[~is_bad], strict=True):
        wanted_gradient, wanted = torch.func.grad_and_value(log_density)(point)  # as torch itself has it
        assert torch.allclose(value, wanted)
        assert torch.allclose(gradient, wanted_gradient)
    assert density.vectorized
    assert torch.equal(density.values(with_bad).isfinite(), ~is_bad)
    assert bool(density.hessian(points[0]).isfinite().all())
    density.hessian(bad)  # which is not raised from either


def test_every_replacement_is_torchs_where_that_does_not_raise():
    m = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    positive = m @ m.mT + torch.eye(4)
    vector, matrices = torch.randn(3, 4), torch.randn(3, 4, 2)
    calls = [
        lambda: torch.linalg.cholesky(positive, upper=True),
        lambda: torch.linalg.solve(m, matrices),
        lambda: torch.linalg.solve(m, vector),
        lambda: torch.linalg.solve(m, matrices.mT, left=False),
        lambda: torch.linalg.solve(m[0], vector[0]),
        lambda: torch.linalg.eigvalsh(positive),
        lambda: torch.linalg.svd(matrices, full_matrices=False)[1],
        lambda: torch.linalg.pinv(matrices),
    ]
    for call in calls:
        with running():
            got = call()
        assert torch.equal(got, call())


def process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    kernel = (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + 1e-9 * torch.eye(len(x))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), kernel))
    pyro.sample("y", dist.Normal(f, 0.05).to_event(1), obs=y)


def test_a_kernel_without_jitter_is_named_and_ends_neither_fit_nor_diagnosis():
    torch.set_default_dtype(torch.float32)
    x = torch.linspace(0, 1, 8)
    guide = AutoFlow(process)
    args = (x, (6 * x).sin())
    diagnosis = diagnose(process, guide, *args, num_samples=200, num_sets=1, num_starts=0)
    assert not diagnosis.reliable
    reason = "site 'f': its covariance_matrix is not symmetric and positive definite in"
    assert any(reason in words for words in diagnosis.reasons)
    program = Program(process, guide).bind(*args)
    values = program.vmap_traces(lambda p: {"p": log_prob_sum(p.model)}, program.draw(50))["p"]
    assert program.program.vectorized
    assert 0 < int((~values.isfinite()).sum()) < 50
