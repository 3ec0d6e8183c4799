import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_nf.flows import stacks
from pyro_nf.flows.numerics import LOG_SCALE_BOUND, unbound
from pyro_nf.guides import AutoFlow, StructuredFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.networks import MLP

X = torch.tensor([-1.0, 0.5, 2.0, 3.0, 1.0, 2.5])
SMALL = functools.partial(stacks.make, "planar", depth=1)


def hierarchy(x, batch_size=None):
    """mu ~ N(0, 2), z_n ~ N(mu, 1), x_n ~ N(z_n, 1)."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("rows", len(x), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


class Column(torch.nn.Linear):
    """A linear encoder of numbers."""

    def __init__(self, width):
        super().__init__(1, width)

    def forward(self, x):
        return super().forward(x[:, None])


def exact_global(x):
    """Location and scale of mu's posterior: x_n ~ N(mu, sqrt 2) with z_n integrated out."""
    precision = 1 / 4 + len(x) / 2
    return x.sum() / 2 / precision, precision**-0.5


def crossed(y):
    """Effects of rows and of columns, of several supports, and two global latents."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    rows, columns = pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(loc[0], scale))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with columns:
        column = pyro.sample("column", dist.Normal(loc, 1.0).to_event(1))
    with rows, columns:
        pyro.sample("y", dist.Normal(row + share[..., 0] + column.sum(-1), 1.0), obs=y)


class Rows(Column):
    def forward(self, y):
        return super().forward(y.mean(1))


class Columns(Column):
    def forward(self, y):
        return super().forward(y.mean(0))


def perturbed(guide, *args):
    """Set a guide up and move its parameters, so that nothing is at its start."""
    guide(*args)
    for param in guide.parameters():
        param.data.add_(0.2 * torch.randn_like(param))
    return guide


def test_the_density_is_the_trace_s_and_the_draws_are_of_all_data(float64):
    y = torch.randn(5, 4)
    guide = perturbed(StructuredFlow(crossed, {"columns": Columns(3), "rows": Rows(2)}, local_flow="planar"), y)
    trace = poutine.trace(guide).get_trace(y)
    names = ("loc", "scale", "row", "share", "column")
    value = {name: trace.nodes[name]["value"] for name in names}
    model_trace = poutine.trace(poutine.replay(crossed, trace)).get_trace(y)
    assert all(value[name].shape == model_trace.nodes[name]["fn"].shape() for name in names)
    assert torch.allclose(guide.log_prob(value, y), trace.log_prob_sum())
    draws = guide.sample_posterior(6, y)
    assert {name: tuple(draws[name].shape) for name in names} == {
        "loc": (6, 2),
        "scale": (6,),
        "row": (6, 5, 1),
        "share": (6, 5, 1, 3),
        "column": (6, 4, 2),
    }
    one_by_one = torch.stack([guide.log_prob({name: draws[name][i] for name in names}, y) for i in range(6)])
    assert torch.allclose(guide.log_prob(draws, y), one_by_one)
    assert guide.median(y)["share"].shape == (5, 1, 3)
    assert guide.quantiles([0.1, 0.9], y)["column"].shape == (2, 4, 2)


def exact_guide(x):
    """The guide whose parameters make it the posterior of `hierarchy`."""
    guide = StructuredFlow(hierarchy, {"rows": Column(1)}, SMALL, local_flow=SMALL)
    guide(x)
    loc, scale = exact_global(x)
    overall, local = guide[0].flow.flows[-1].affine.params, guide[1]
    with torch.no_grad():
        overall.loc.fill_(loc)
        overall.log_scale.copy_(unbound(torch.tensor([scale]).log(), LOG_SCALE_BOUND))
        # z_n given mu is N((x_n + mu) / 2, 1 / 2), and mu = loc + scale u.
        local.encoder.weight.fill_(1.0)
        local.encoder.bias.zero_()
        local.follow.matrix.bias.fill_(scale * len(x) ** 0.5)
        own = local.flow.flows[-1].params
        own.loc.fill_(loc / 2)
        own.log_scale.copy_(unbound(torch.tensor([0.5]).log() / 2, LOG_SCALE_BOUND))
        own.from_context.weight.copy_(torch.tensor([[0.5], [0.0]]))
    return guide


def test_at_the_posterior_the_elbo_is_the_evidence_and_no_draw_has_a_gradient(float64):
    x = X.double()
    guide = exact_guide(x)
    cov = torch.eye(6) * 2 + 4
    evidence = dist.MultivariateNormal(torch.zeros(6), cov).log_prob(x)
    loss = ELBO(num_particles=3).differentiable_loss(hierarchy, guide, x)
    assert torch.allclose(-loss, evidence)
    gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    assert torch.cat([g.reshape(-1) for g in gradients if g is not None]).abs().max() < 1e-8


def test_gradients_are_those_of_the_elbo(float64):
    # Sticking the landing leaves out a score whose mean is zero: over many draws both gradients agree.
    guide = perturbed(StructuredFlow(hierarchy, {"rows": Column(2)}, SMALL, local_flow=SMALL), X.double())
    gradients = []
    for sticking in (True, False):
        pyro.set_rng_seed(0)
        loss = ELBO(20_000, sticking_the_landing=sticking).differentiable_loss(hierarchy, guide, X.double())
        params = [p for name, p in guide.named_parameters() if "flows.1.affine" in name or "matrix" in name]
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]))
    assert torch.allclose(*gradients, atol=0.03 * float(gradients[0].abs().max()))


def test_the_exact_joint_posterior_is_found_from_minibatches():
    guide = StructuredFlow(hierarchy, {"rows": Column(2)}, SMALL, local_flow=SMALL)
    kwargs = {"max_steps": 300, "num_particles": 64, "learning_rate": 0.05}
    FlowSVI(hierarchy, guide, seed=0, progress=False, **kwargs).run(X, batch_size=3)
    draws = guide.sample_posterior(20_000, X)
    loc, scale = exact_global(X)
    assert float(draws["mu"].mean()) == pytest.approx(float(loc), abs=0.06)
    assert float(draws["mu"].std()) == pytest.approx(scale, rel=0.05)
    assert torch.allclose(draws["z"].mean(0), (X + loc) / 2, atol=0.07)
    local_scale = math.sqrt(1 / 2 + scale**2 / 4)
    assert torch.allclose(draws["z"].std(0), torch.full((6,), local_scale), rtol=0.06)
    together = torch.corrcoef(torch.cat([draws["mu"][:, None], draws["z"]], 1).T)
    assert torch.allclose(together[0, 1:], torch.full((6,), scale / 2 / local_scale), atol=0.06)
    assert torch.allclose(together[1, 2], torch.tensor(scale**2 / 4 / local_scale**2), atol=0.06)


def test_guide_and_model_see_the_same_minibatch_of_any_size():
    guide = StructuredFlow(hierarchy, {"rows": Column(4)})
    for size in (2, 5, None, 1):
        guide_trace = poutine.trace(guide).get_trace(X, batch_size=size)
        model_trace = poutine.trace(poutine.replay(hierarchy, guide_trace)).get_trace(X, batch_size=size)
        assert torch.equal(guide_trace.nodes["rows"]["value"], model_trace.nodes["rows"]["value"])
        assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["x"]["scale"] == 6 / (size or 6)
        assert guide_trace.nodes["mu"]["scale"] == 1.0
    assert guide.sample_posterior(3, X, batch_size=2)["z"].shape == (3, 6)


def by_rows(x, rows):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x), subsample=rows):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


class OfRows(Column):
    def forward(self, x, rows):
        return super().forward(x)


@pytest.mark.parametrize("rows", [[4, 1], [5, 4, 3, 2, 1, 0]])
def test_indices_that_the_model_is_given_reach_the_encoder(rows):
    rows = torch.tensor(rows)
    guide = StructuredFlow(
        by_rows, {"rows": OfRows(2)}, create_plates=lambda x, rows: pyro.plate("rows", len(x), subsample=rows)
    )
    seen = []
    guide[1].encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trace = poutine.trace(guide).get_trace(X, rows)
    assert torch.equal(seen[-1], X[rows])
    assert torch.equal(trace.nodes["rows"]["value"], rows)
    FlowSVI(by_rows, guide, seed=0, progress=False, max_steps=20, num_particles=2, learning_rate=0.01).run(X, rows)


def sized(x):
    """The data are a minibatch of 100 rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 100, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_batches_of_several_sizes_as_arguments():
    guide = StructuredFlow(sized, {"rows": Column(4)}, SMALL, local_flow=SMALL)
    few = {"max_steps": 30, "eval_every": 10, "num_particles": 4, "learning_rate": 0.01, "compile": False}
    svi = FlowSVI(sized, guide, seed=0, progress=False, **few)
    result = svi.run_batches([X[:4], X[4:]])
    assert math.isfinite(result.elbo)
    assert result.num_skipped == 0


@pytest.mark.parametrize("vectorize", [False, True])
def test_pyros_svi_and_predictive(vectorize):
    guide = StructuredFlow(hierarchy, {"rows": Column(4)}, SMALL, local_flow=SMALL)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorize)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(X, batch_size=3) for _ in range(80)]
    assert sum(losses[-20:]) < sum(losses[:20])
    drawn = Predictive(hierarchy, guide=guide, num_samples=5)(X)
    assert drawn["z"].shape == (5, 6)


@pytest.mark.slow
def test_a_compiled_fit_is_the_plain_one():
    results = []
    for form in (False, True):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        guide = StructuredFlow(hierarchy, {"rows": Column(2)}, SMALL, local_flow=SMALL)
        svi = FlowSVI(
            hierarchy, guide, seed=0, progress=False, max_steps=50, num_particles=8, learning_rate=0.01, compile=form
        )
        results.append(svi.run(X, batch_size=3))
    assert results[1].execution == "compiled"
    assert torch.allclose(results[0].history, results[1].history, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))], ids=["copy", "pickle"]
)
def test_copies_draw_the_same_and_leave_the_original_whole(how):
    guide = StructuredFlow(hierarchy, {"rows": Column(4)})
    guide.sample_posterior(1, X)
    twin = how(guide)
    assert guide.model is hierarchy
    guide(X[:2])
    draws = []
    for each in (guide, twin):
        pyro.set_rng_seed(3)
        draws.append(each.sample_posterior(5, X)["z"])
    assert torch.equal(*draws)
    if twin._model is None:  # as pickles must be
        with pytest.raises(ValueError, match=r"new shape, and this StructuredFlow is a copy without its model"):
            twin(X[:2])
    else:
        assert twin(X[:2])["z"].shape == guide(X[:2])["z"].shape


def test_state_dict_into_a_fresh_guide():
    guide = perturbed(StructuredFlow(hierarchy, {"rows": Column(4)}), X)
    fresh = StructuredFlow(hierarchy, {"rows": Column(4)})
    fresh(X)
    fresh.load_state_dict(guide.state_dict())
    draws = []
    for each in (guide, fresh):
        pyro.set_rng_seed(3)
        draws.append(each.sample_posterior(5, X)["z"])
    assert torch.equal(*draws)


def test_the_first_part_is_an_auto_flow_over_the_globals_and_takes_its_options():
    guide = StructuredFlow(hierarchy, {"rows": Column(4)}, base="student_t", init_scale=0.5)
    guide(X)
    assert isinstance(guide[0], AutoFlow)
    assert set(guide[0].sample_posterior(3)) == {"mu"}
    assert "0.base.raw_df" in guide.state_dict()


def test_bad_encoders_get_a_sentence():
    with pytest.raises(ValueError, match=r"encoders must be a dictionary of plates' names and their encoders; got MLP"):
        StructuredFlow(hierarchy, MLP(1, (), 2))
    with pytest.raises(ValueError, match=r"encoders must be a dictionary .* got none"):
        StructuredFlow(hierarchy, {})
    with pytest.raises(ValueError, match=r"encoder must be a torch.nn.Module; got function"):
        StructuredFlow(hierarchy, {"rows": lambda x: x})
    with pytest.raises(ValueError, match=r"plates that hold latents: the model's are 'rows'; got 'row'"):
        StructuredFlow(hierarchy, {"row": Column(2)})(X)
    with pytest.raises(ValueError, match=r"encoder fails on the model's arguments: mat1 and mat2"):
        StructuredFlow(hierarchy, {"rows": MLP(3, (), 2)})(X)


def test_latents_in_the_wrong_place_get_a_sentence():
    def only_local(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="all of z stand in plates with encoders: use AmortizedFlow"):
        StructuredFlow(only_local, {"rows": Column(2)})(X)

    def two_plates(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), 2):
            pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("others", 10, 2):
            pyro.sample("w", dist.Normal(mu, 1.0))

    with pytest.raises(ValueError, match=r"'w' is local to the subsampled plate 'others'.*\{'others': encoder\}"):
        StructuredFlow(two_plates, {"rows": Column(2)})(X)

    def nested(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("features", 3), pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mu, 1.0))

    with pytest.raises(ValueError, match="one plate, and in no other; got 'z' in features and rows"):
        StructuredFlow(nested, {"rows": Column(2)})(X)

    def discrete(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="encoders must be of plates that hold latents: the model's are none"):
        StructuredFlow(discrete, {"rows": Column(2)})(X)

    def sequential(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))

    with pytest.raises(ValueError, match="site 'z_0' stands in a sequential plate"):
        StructuredFlow(sequential, {"rows": Column(2)})(X)


def test_data_of_the_wrong_size_get_a_sentence():
    def cut(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows + 10 - len(x)])

    with pytest.raises(
        ValueError, match=r"data of 6 rows, .* plate 'rows' has size 10 and subsample_size 3. Pass all 10"
    ):
        StructuredFlow(cut, {"rows": Column(2)})(X)

    def fixed(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = StructuredFlow(fixed, {"rows": Column(2)})
    guide(X[:3])
    with pytest.raises(ValueError, match=r"each of the 3 elements of plate 'rows' \(size 10\); got 2\..* cut already"):
        guide(X[:2])
    with pytest.raises(ValueError, match=r"indices that the model is given.*pass create_plates"):
        StructuredFlow(by_rows, {"rows": OfRows(2)})(X, torch.tensor([3, 1]))
