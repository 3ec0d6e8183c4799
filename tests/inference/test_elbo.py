import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_feasible

from pyro_nf.flows import ElementwiseAffine, stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow, MixtureBase
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO, IWELBO, CoordinateELBO, KLAnnealedELBO
from pyro_nf.programs.program import Program

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
    guide.flow.flows[-1].assign(torch.tensor([1.0, -2.0]), torch.linalg.cholesky(COV))
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
    guide = AutoFlow(gaussian, partial(stacks.realnvp, depth=2, hidden_dims=(8,)))
    svi = SVI(gaussian, guide, pyro.optim.Adam({"lr": 0.02}), ELBO(num_particles=32))
    losses = [svi.step() for _ in range(250)]
    assert sum(losses[-10:]) / 10 < 0.02
    assert isinstance(svi.evaluate_loss(), float)


# Gradients against quadrature: one latent on a grid, and a parameter of the model.

GRID = torch.linspace(-12.0, 12.0, 1201, dtype=torch.float64)


def skewed():
    loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
    z = pyro.sample("z", dist.Normal(loc, 1.5))
    pyro.sample("y", dist.StudentT(3.0, z + 0.3 * z**2, 1.0), obs=torch.tensor(2.0, dtype=torch.float64))


def log_joint(z):
    log_prior = dist.Normal(pyro.param("loc"), 1.5).log_prob(z)
    return log_prior + dist.StudentT(3.0, z + 0.3 * z**2, 1.0).log_prob(torch.tensor(2.0, dtype=torch.float64))


def flow_guide(base):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = AutoFlow(skewed, partial(ElementwiseAffine, scale=1.3), base=base, init_scale=0.8)
    guide()
    return guide


def gradients(value, guide):
    params = [*guide.parameters(), pyro.param("loc").unconstrained()]
    grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def estimated(objective, guide, repeats=30, num_draws=2000):
    program = Program(skewed, guide).bind()
    grads = []
    for _ in range(repeats):
        _, surrogate = objective.estimate(program, program.draw(num_draws))
        grads.append(gradients(surrogate, guide))
    stacked = torch.stack(grads)
    return stacked.mean(0), stacked.std(0) / repeats**0.5


def on_the_grid(guide):
    log_q = guide.get_posterior().log_prob(GRID[:, None])
    return log_q, log_joint(GRID) - log_q, float(GRID[1] - GRID[0])


@pytest.mark.parametrize("sticking", [True, False])
@pytest.mark.parametrize("base", ["normal", partial(MixtureBase, num_components=2)], ids=["normal", "mixture"])
def test_the_gradient_of_the_elbo_is_quadratures(base, sticking, float64):
    guide = flow_guide(base)
    log_q, log_w, width = on_the_grid(guide)
    exact = gradients((log_q.exp() * log_w).sum() * width, guide)
    mean, error = estimated(ELBO(sticking_the_landing=sticking), guide)
    assert ((mean - exact).abs() < 4.5 * error + 1e-8).all()
    assert (exact[:2].abs() > 10 * error[:2]).any()  # of the weights or locations: the test could fail


def test_the_gradient_of_the_importance_weighted_bound_is_quadratures(float64):
    guide = flow_guide("normal")
    log_q, log_w, width = on_the_grid(guide)
    pairs = log_q[:, None] + log_q
    bound = torch.logaddexp(log_w[:, None], log_w) - torch.tensor(2.0).log()
    exact = gradients((pairs.exp() * bound).sum() * width**2, guide)
    mean, error = estimated(IWELBO(2), guide)
    assert ((mean - exact).abs() < 4.5 * error + 1e-8).all()
    program = Program(skewed, guide).bind()
    value, _ = IWELBO(2).estimate(program, program.draw(20_000))
    assert float(value) == pytest.approx(((pairs.exp() * bound).sum() * width**2).item(), abs=0.05)


def test_a_mixture_at_the_posterior_has_no_gradient(float64):
    locs = torch.tensor([[-4.0], [4.0]])

    def target():
        pyro.sample("z", dist.MixtureOfDiagNormals(locs, torch.ones(2, 1), torch.tensor([0.25, 0.75]).log()))

    guide = AutoFlow(target, partial(ElementwiseAffine), base=partial(MixtureBase, num_components=2), init_scale=1.0)
    guide()
    with torch.no_grad():
        guide.flow.flows[-1].assign(torch.zeros(1), torch.eye(1))
        guide.base.logits.copy_(torch.tensor([0.25, 0.75]).log())
        for loc, component in zip(locs, guide.base.components, strict=True):
            component.assign(loc, torch.eye(1))
    ELBO(num_particles=64).differentiable_loss(target, guide).backward()
    assert torch.cat([p.grad.reshape(-1) for p in guide.parameters() if p.grad is not None]).norm() < 1e-10


ROWS = torch.linspace(-2.0, 2.0, 12)


def local(batch_size=None):
    with pyro.plate("rows", len(ROWS), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=ROWS[rows])


class Known(torch.nn.Module):
    def forward(self, batch_size=None):
        return ROWS[:, None]


def test_each_datum_of_a_local_model_has_weights_of_its_own():
    guide = AmortizedFlow(local, Known())
    program = Program(local, guide).bind()
    evidence = float(dist.Normal(0.0, 2.0**0.5).log_prob(ROWS).sum())
    value, _ = IWELBO(500).estimate(program, program.draw(5000))
    # The weights of all the data together would leave more than a nat with as many draws.
    assert float(value) == pytest.approx(evidence, abs=0.1)


def test_the_bound_of_minibatches_is_scaled_up():
    def model(x, batch_size=None):
        with pyro.plate("rows", len(x), subsample_size=batch_size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows])

    data = torch.ones(12)  # all alike: any minibatch gives the whole

    class Rows(torch.nn.Module):
        def forward(self, x):
            return x[:, None]

    guide = AmortizedFlow(model, Rows())
    values = []
    for size in (12, 3):
        program = Program(model, guide).bind(data, batch_size=size)
        values.append(float(IWELBO(200).estimate(program, program.draw(4000))[0]))
    assert values[0] == pytest.approx(values[1], abs=0.15)


def test_a_fit_maximises_an_importance_weighted_bound(float64):
    options = {"num_particles": 16, "learning_rate": 0.05, "max_steps": 400, "compile": False}
    svi = FlowSVI(gaussian, AutoMultivariateNormal(gaussian), objective=IWELBO(4), seed=0, progress=False, **options)
    assert svi.run().elbo > -0.05


def test_what_an_importance_weighted_bound_cannot_take_is_said():
    guide = AutoFlow(gaussian, base="mixture")
    with pytest.raises(ValueError, match=r"IWELBO takes guides with reparametrised draws; those of .*_component"):
        IWELBO(16, 32).differentiable_loss(gaussian, guide)
    with pytest.raises(ValueError, match="num_particles must be a multiple of num_importance_samples=16; got 20"):
        IWELBO(16, 20).differentiable_loss(gaussian, AutoFlow(gaussian))
    with pytest.raises(ValueError, match="num_importance_samples must be a whole number of at least 1; got 0"):
        IWELBO(0)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(ROWS), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(w, 1.0), obs=ROWS[rows])

    with pytest.raises(ValueError, match="plate 'rows' may be subsampled only if every site stands in it"):
        IWELBO(16, 32).differentiable_loss(model, AutoFlow(model))


def test_annealing_scales_the_density_and_reports_the_elbo(float64):
    guide = flow_guide("normal")
    objective = ELBO(annealing_steps=100)
    for step, temperature in ((0, 0.01), (50, 0.51), (100, 1.0)):
        objective.start_block(step, 0.0, GRID)
        log_q, log_w, width = on_the_grid(guide)
        exact = gradients((log_q.exp() * (temperature * log_joint(GRID) - log_q)).sum() * width, guide)
        mean, error = estimated(objective, guide)
        assert ((mean - exact).abs() < 4.5 * error + 1e-8).all()
    objective.start_block(0, 0.0, GRID)
    program = Program(skewed, guide).bind()
    value, _ = objective.estimate(program, program.draw(20_000))
    assert float(value) == pytest.approx(((log_q.exp() * log_w).sum() * width).item(), abs=0.05)


def test_the_path_gradient_takes_over_near_the_posterior():
    guide = AutoFlow(gaussian, ElementwiseAffine, init_scale=1.0)
    objective = ELBO(sticking_the_landing="auto")
    options = {"seed": 0, "progress": False, "max_steps": 400, "learning_rate": 0.02, "eval_every": 20}
    result = FlowSVI(gaussian, guide, objective=objective, **options).run()
    assert result.path_gradient
    objective.start_block(0, 3.0, torch.zeros(1))
    assert not objective.path_gradient
    objective.start_block(20, 1.0, torch.zeros(1))
    assert objective.path_gradient


def test_an_annealed_fit_goes_on_after_the_annealing():
    guide = AutoFlow(gaussian, ElementwiseAffine)
    objective = ELBO(annealing_steps=300)
    result = FlowSVI(gaussian, guide, objective=objective, seed=0, progress=False, learning_rate=0.02).run()
    assert result.steps > 300
    assert abs(result.elbo) < 0.01


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="annealing_steps must be a whole number of at least 0; got -1"):
        ELBO(annealing_steps=-1)
    with pytest.raises(ValueError, match=r"sticking_the_landing must be .* or 'auto'; got 'never'"):
        ELBO(sticking_the_landing="never")


def test_bad_number_of_particles_is_named():
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 1; got 0"):
        ELBO(num_particles=0)


def test_the_coordinate_elbo_has_value_and_gradient_of_sticking_the_landing(float64):
    def model():
        scale = pyro.sample("scale", dist.Gamma(3.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))

    guide = AutoFlow(model)
    guide()
    program = Program(model, guide).bind()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.2 * torch.randn_like(param))
    draws = program.draw(32)
    params = list(guide.parameters())
    results = []
    for objective in (ELBO(), CoordinateELBO(guide.get_posterior, guide.density())):
        elbo, surrogate = objective.estimate(program, draws)
        grads = torch.autograd.grad(surrogate, params, allow_unused=True, materialize_grads=True)
        results.append((elbo, torch.cat([grad.reshape(-1) for grad in grads])))
    assert torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


OBSERVED = torch.randn(20, 2, generator=torch.Generator().manual_seed(3))


def autoencoder(x, batch_size=None):
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        one = pyro.sample("one", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        other = pyro.sample("other", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(one + 0.1 * other, 1.0).to_event(1), obs=x[rows])


class TwoNormals(torch.nn.Module):
    """A guide that samples each site by itself."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [0.1, 0.0]]))

    def forward(self, x, batch_size=None):
        pyro.module("two", self)
        with pyro.plate("data", len(x), subsample_size=batch_size):
            for name, loc in zip(("one", "other"), self.loc, strict=True):
                pyro.sample(name, dist.Normal(loc, 1.0).to_event(1))


def location_gradient(objective, num_particles=20_000, step=0):
    guide = TwoNormals()
    program = Program(autoencoder, guide).bind(OBSERVED)
    draws = program.draw(num_particles)
    objective.start_block(step, 0.0, draws.noise)
    value, surrogate = objective.estimate(program, draws)
    surrogate.backward()
    return float(value.detach()), guide.loc.grad


@pytest.mark.parametrize("sticking", [True, False])
@pytest.mark.parametrize(("step", "beta"), [(0, 0.01), (49, 0.5), (1000, 1.0)])
def test_warming_up_weighs_the_divergence_and_reports_the_elbo(step, beta, sticking):
    value, grad = location_gradient(KLAnnealedELBO(100, sticking_the_landing=sticking), step=step)
    loc = TwoNormals().loc.detach()
    # The likelihood pulls towards the data, beta times the divergence N |loc|^2 / 2 towards 0.
    pull = (OBSERVED - loc[0] - 0.1 * loc[1]).sum(0)
    assert torch.allclose(grad, torch.stack([pull, 0.1 * pull]) - beta * 20 * loc, atol=0.5)
    residual = (OBSERVED - loc[0] - 0.1 * loc[1]).square().sum() + 40 * 1.01 + 40 * math.log(2 * math.pi)
    assert value == pytest.approx(float(-0.5 * residual - 10 * loc.square().sum()), abs=0.5)


@pytest.mark.parametrize("sticking", [True, False])
def test_sites_within_their_free_bits_have_no_divergence_to_climb(sticking):
    # Divergences for each datum: 2.5 and 0.005 nats.
    _, grad = location_gradient(KLAnnealedELBO(0, free_bits=0.5, sticking_the_landing=sticking))
    loc = TwoNormals().loc.detach()
    pull = (OBSERVED - loc[0] - 0.1 * loc[1]).sum(0)
    assert torch.allclose(grad, torch.stack([pull - 20 * loc[0], 0.1 * pull]), atol=0.5)


def test_under_one_flow_all_latents_share_their_free_bits():
    guide = AmortizedFlow(autoencoder, torch.nn.Linear(2, 3), None)
    guide(OBSERVED)
    loc = guide.flow.flows[0].params.loc
    loc.data.fill_(1.0)  # 2 nats of divergence for each datum
    grads = []
    for free_bits in (0.0, 1.5, 2.5):
        guide.zero_grad()
        program = Program(autoencoder, guide).bind(OBSERVED, batch_size=5)
        draws = program.draw(2)._replace(indices={"data": torch.arange(5)})
        _, surrogate = KLAnnealedELBO(free_bits=free_bits).estimate(program, draws)
        surrogate.backward()
        grads.append(loc.grad.clone())
    assert torch.allclose(grads[0], grads[1], atol=1e-4)
    assert torch.allclose(grads[2] - grads[0], torch.full((4,), 20.0), atol=1e-3)


def test_a_fit_that_warms_up_ends_at_the_elbo():
    guide = AmortizedFlow(autoencoder, torch.nn.Linear(2, 3), None)
    options = {"num_particles": 8, "learning_rate": 0.05, "max_steps": 200, "seed": 0, "progress": False}
    result = FlowSVI(autoencoder, guide, objective=KLAnnealedELBO(50), **options).run(OBSERVED)
    exact = dist.MultivariateNormal(torch.zeros(2), 2.01 * torch.eye(2)).log_prob(OBSERVED).sum()
    # Two latents a coordinate, whose correlation of -.07 a mean-field normal misses: .1 nats.
    assert result.elbo == pytest.approx(float(exact), abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0; got -1"),
        ({"free_bits": -0.1}, "free_bits must be a finite number of at least 0; got -0.1"),
    ],
)
def test_bad_warm_ups_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        KLAnnealedELBO(**options)
