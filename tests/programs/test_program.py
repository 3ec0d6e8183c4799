import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.programs.program import Program
from pyro_nf.programs.traces import log_prob_sum

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def regression(x, y=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=x.sum(-1) if y is None else y)


def run(program, extract, num_particles, *args):
    bound = program.bind(*args)
    return bound.vmap_traces(extract, bound.draw(num_particles))


def densities(particle):
    return {"log_p": log_prob_sum(particle.model), "beta": particle.model.nodes["beta"]["value"]}


def test_draws_are_independent_and_need_no_broadcasting():
    program = Program(regression, AutoNormal(regression))
    result = run(program, densities, 8, X)
    assert result["beta"].shape == (8, 3)
    assert len(result["beta"].unique(dim=0)) == 8
    expected = torch.stack(
        [
            dist.Normal(0.0, 1.0).log_prob(beta).sum() + dist.Normal(X @ beta, 1.0).log_prob(X.sum(-1)).sum()
            for beta in result["beta"]
        ]
    )
    assert torch.allclose(result["log_p"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "prior",
    [dist.Gamma(2.0, 1.0), dist.StudentT(3.0), dist.Cauchy(0.0, 1.0), dist.Exponential(1.0), dist.Uniform(0, 1)],
)
def test_every_reparametrised_draw_differs_between_particles(prior):
    def model():
        pyro.sample("x", prior)

    def guide():
        pyro.sample("x", prior)

    result = run(Program(model, guide), lambda p: {"x": p.model.nodes["x"]["value"]}, 6)
    assert len(result["x"].unique()) == 6


def test_the_same_draws_give_the_same_run():
    program = Program(regression, AutoNormal(regression)).bind(X)
    draws = program.draw(8)
    assert draws.noise.shape == (8, 3)
    one, other = (program.vmap_traces(densities, draws) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "normals",
    [
        lambda: torch.randn(2, 3),
        lambda: torch.randn_like(torch.zeros(2, 3)),
        lambda: torch.empty(2, 3).normal_(0.0, 1.0),
        lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)).rsample((2,)),
    ],
)
def test_normals_are_those_given(normals):
    def guide():
        pyro.sample("x", dist.Delta(normals()).to_event(2))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    program = Program(model, guide).bind()
    draws = program.draw(4)
    result = program.vmap_traces(lambda p: {"x": p.model.nodes["x"]["value"]}, draws)
    torch.testing.assert_close(result["x"], draws.noise.view(4, 2, 3))


@pytest.mark.filterwarnings("error")
def test_counts_differ_between_particles():
    def guide():
        pyro.sample("x", dist.Delta(dist.Binomial(torch.full((3,), 45.0), 0.3).sample()).to_event(1))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    result = run(Program(model, guide), lambda p: {"x": p.model.nodes["x"]["value"]}, 1000)
    assert torch.allclose(result["x"].mean(0), torch.tensor(13.5), atol=0.5)
    assert torch.allclose(result["x"].std(0), torch.tensor(3.07), atol=0.4)


def test_a_number_of_draws_that_changes_is_refused():
    sizes = [2, 2, 3]

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(sizes.pop(0)), 1.0).to_event(1))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="the guide drew 3 normals where its first run took 2"):
        run(Program(model, guide), lambda p: {}, 1)


def test_minibatches_of_consecutive_steps_share_a_permutation():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 11, subsample_size=5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(5))

    draws = Program(model, AutoNormal(model)).bind().draw(4, num_steps=7)
    rows = draws.indices["rows"]
    assert rows.shape == (7, 5)
    assert draws.noise.shape == (7, 4, 1)
    assert all(len(rows[i : i + 2].unique()) == 10 for i in (0, 2, 4))
    assert draws.step(3).indices["rows"].equal(rows[3])


@pytest.mark.parametrize("subsample_size", [5, None])
def test_noise_comes_in_opposite_pairs_only_where_a_plate_is_subsampled(subsample_size):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 10, subsample_size=subsample_size) as rows:
            pyro.sample("y", dist.Normal(z[0], 1.0), obs=torch.zeros(len(rows)))

    program = Program(model, AutoNormal(model)).bind()
    for num_particles in (1, 2, 5):
        noise = program.draw(num_particles, num_steps=3).noise
        assert noise.shape == (3, num_particles, 2)
        pairs = num_particles // 2
        opposite = torch.equal(noise[:, -pairs:], -noise[:, :pairs]) and pairs > 0
        assert opposite == (subsample_size == 5 and pairs > 0)


def test_a_subsampled_plate_is_shared_by_the_draws_and_fresh_at_each_call():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 1000, subsample_size=5) as rows:
            pyro.deterministic("rows_seen", rows)
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(5))

    program = Program(model, AutoNormal(model))
    seen = [run(program, lambda p: {"rows": p.model.nodes["rows_seen"]["value"]}, 4)["rows"] for _ in range(2)]
    assert (seen[0] == seen[0][0]).all()
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize("number", [lambda z: z.item(), lambda z: float(z.numpy()), lambda z: 1.0 if z > 0 else 2.0])
def test_a_model_that_cannot_be_batched_runs_draw_by_draw_with_a_warning(number):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(number(z.detach()), 1.0), obs=torch.zeros(()))

    program = Program(model, AutoNormal(model))
    with pytest.warns(UserWarning, match="cannot be batched over draws"):
        result = run(program, lambda p: {"log_p": log_prob_sum(p.model)}, 5)
    assert len(result["log_p"].unique()) == 5


def test_the_score_is_the_gradient_at_a_fixed_draw(float64):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(loc, 2.0))

    program = Program(model, guide).bind()

    def score(pair):
        return {"score": log_prob_sum(program.guide_at_fixed_draw(pair)), "z": pair.guide.nodes["z"]["value"].detach()}

    result = program.vmap_traces(score, program.draw(4))
    (grad,) = torch.autograd.grad(result["score"].sum(), pyro.param("loc").unconstrained())
    assert torch.allclose(grad, ((result["z"] - 0.5) / 4).sum())


def test_a_model_error_that_is_no_batching_problem_is_raised():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if x.shape == (2,):
            raise RuntimeError("boom")
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(RuntimeError, match="boom"):
        run(Program(model, AutoNormal(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))), densities, 2, torch.zeros(2))


def bad_data(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("height", dist.Normal(z, 1.0), obs=x)


def no_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def one_latent():
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "args", "message"),
    [
        (bad_data, AutoNormal(bad_data), (torch.tensor([1.0, float("nan")]),), "data of site 'height' hold 1 NaN"),
        (no_latent, lambda: None, (), "no latent variables"),
        (one_latent, lambda: None, (), "no site for the model's latent 'z'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(model, guide, args, message):
    program = Program(model, guide).bind(*args)
    with pytest.raises(ValueError, match=message):
        program.draw(1)


def test_nan_beside_the_mask_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    program = Program(model, AutoNormal(model)).bind(torch.full((2,), float("nan")))
    with pytest.raises(ValueError, match="data of site 'y' hold 1 NaN"):
        program.draw(1)


@pytest.mark.parametrize("dim", [0, 2])
def test_masked_nan_is_accepted_and_leaves_gradients_finite(dim):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        missing = x.isnan().any(-1) if dim else x.isnan()
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=~missing):
            pyro.sample("y", dist.Normal(z.expand(x.shape), 1.0).to_event(1 if dim else 0), obs=x)

    data = torch.tensor([[1.0, float("nan")], [0.0, 0.5]]) if dim else torch.tensor([1.0, float("nan")])
    guide = AutoNormal(model)
    result = run(Program(model, guide), lambda p: {"log_p": log_prob_sum(p.model)}, 3, data)
    assert torch.isfinite(result["log_p"]).all()
    grads = torch.autograd.grad(result["log_p"].sum(), list(guide.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)
