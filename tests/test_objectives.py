import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_feasible

from pyro_nf.guides import AutoFlow
from pyro_nf.objectives import ELBO

COV = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def gaussian():
    loc = torch.tensor([1.0, -2.0], dtype=torch.float64)
    pyro.sample("z", dist.MultivariateNormal(loc, COV))


def gradient_norm(objective, guide):
    loss = objective.differentiable_loss(gaussian, guide)
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in guide.parameters()]).norm()


@pytest.fixture
def exact_flow(float64):
    """A flow guide that is exactly the posterior: the identity under the right affine layer."""
    guide = AutoFlow(gaussian, "realnvp")
    guide()
    chol = torch.linalg.cholesky(COV)
    scale = chol.diagonal()
    affine = guide.flow.flows[-1]
    raw = scale.log() / (1 - (scale.log() / 30).abs())
    with torch.no_grad():
        affine.params.loc.copy_(torch.tensor([1.0, -2.0]))
        affine.params.log_scale.copy_(raw)
        affine.params.tril.copy_((chol / scale[:, None])[1, :1])
    return guide


def test_sticking_the_landing_is_zero_at_the_posterior(exact_flow):
    assert gradient_norm(ELBO(num_particles=1), exact_flow) < 1e-12


def test_without_it_the_gradient_is_noise(exact_flow):
    assert gradient_norm(ELBO(num_particles=1, sticking_the_landing=False), exact_flow) > 1e-3


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_it_is_zero_for_pyros_own_guides_too(guide_class, float64):
    def target():
        pyro.sample("z", dist.Normal(torch.zeros(2), 0.1).to_event(1))

    guide = guide_class(target, init_loc_fn=init_to_feasible)
    guide()
    ELBO(num_particles=3).differentiable_loss(target, guide).backward()
    assert torch.cat([p.grad.reshape(-1) for p in guide.parameters()]).norm() < 1e-12


@pytest.mark.parametrize("sticking", [True, False])
@pytest.mark.parametrize("name", ["planar", "radial", "realnvp", "iaf", "maf"])
def test_both_gradients_have_the_expectation_of_pyros(name, sticking, float64):
    guide = AutoFlow(gaussian, name, init_scale=1.0)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parameters = list(guide.parameters())

    def mean_and_se(objective, repeats):
        grads = []
        for _ in range(repeats):
            guide.zero_grad()
            objective.differentiable_loss(gaussian, guide).backward()
            grads.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
        stacked = torch.stack(grads)
        return stacked.mean(0), stacked.std(0) / repeats**0.5

    ours, our_se = mean_and_se(ELBO(num_particles=500, sticking_the_landing=sticking), 12)
    pyros, pyro_se = mean_and_se(Trace_ELBO(num_particles=500, vectorize_particles=True), 12)
    z = (ours - pyros) / (our_se**2 + pyro_se**2 + 1e-24).sqrt()
    # Scores of many parameters, with errors from 12 repeats: their mean square is near 1 if the means agree.
    assert z.square().mean() < 3


def test_it_drives_pyros_svi():
    pyro.clear_param_store()
    guide = AutoFlow(gaussian)
    svi = SVI(gaussian, guide, pyro.optim.Adam({"lr": 0.02}), ELBO(num_particles=32))
    losses = [svi.step() for _ in range(250)]
    assert sum(losses[-10:]) / 10 < 0.02
    assert isinstance(svi.evaluate_loss(), float)


def test_bad_number_of_particles_is_named():
    with pytest.raises(ValueError, match="num_particles must be a positive whole number; got 0"):
        ELBO(num_particles=0)
