import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList

from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.networks import MLP

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(2)) * 2


def local(x, batch_size=None):
    """z_n ~ N(0, I), x_n ~ N(z_n, I): the posterior is N(x_n / 2, I / 2)."""
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])


def two_sites(x):
    with pyro.plate("data", len(x)):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, scale[..., None]).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["planar", "realnvp", "iaf"])
def test_the_exact_posterior_is_found_from_minibatches(name):
    guide = AmortizedFlow(local, MLP(2, (), 2), functools.partial(stacks.make, name, depth=2))
    kwargs = {"max_steps": 300, "num_particles": 8, "learning_rate": 0.05, "eval_particles": 50, "eval_every": 50}
    FlowSVI(local, guide, seed=0, progress=False, **kwargs).run(DATA, batch_size=20)
    draws = guide.sample_posterior(4000, DATA)["z"]
    assert draws.shape == (4000, 40, 2)
    assert torch.allclose(draws.mean(0), DATA / 2, atol=0.2)
    assert torch.allclose(draws.std(0), torch.full((40, 2), 0.5**0.5), atol=0.1)


def test_without_a_flow_it_is_the_mean_field_guide():
    guide = AmortizedFlow(local, MLP(2, (), 2), None)
    guide(DATA)
    for param in guide.flow.parameters():
        param.data.normal_()
    posterior = guide.get_posterior(DATA)
    points = torch.randn(2, 40, 2)
    base = dist.Normal(*_loc_and_scale(guide, posterior)).to_event(1)
    assert torch.allclose(posterior.log_prob(points), base.log_prob(points), atol=1e-4)


def _loc_and_scale(guide, posterior):
    (affine,) = guide.flow.flows
    loc, _ = affine.forward_and_log_det(torch.zeros(40, 2), posterior.context)
    return loc, affine.forward_and_log_det(torch.ones(40, 2), posterior.context)[0] - loc


@pytest.mark.parametrize(("affine", "correlates"), [("last", False), ("first", True)])
def test_a_rotation_adds_to_an_affine_layer_that_comes_first_and_nothing_to_one_that_comes_last(affine, correlates):
    guide = AmortizedFlow(local, MLP(2, (), 2), "householder", affine=affine)
    guide(DATA)
    for param in guide.flow.parameters():
        param.data.normal_()
    draws = guide.sample_posterior(4000, DATA)["z"]
    correlation = torch.stack([draws[:, n].T.corrcoef()[0, 1] for n in range(len(DATA))])
    assert bool((correlation.abs() > 0.5).any()) == correlates


def test_any_minibatch_size():
    guide = AmortizedFlow(local, MLP(2, (8,), 4))
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for size in (10, 3, None, 10, 1):
        assert torch.isfinite(torch.tensor(svi.step(DATA, batch_size=size)))
        assert guide(DATA, batch_size=size)["z"].shape == (size or 40, 2)
    for part in (DATA[:7], DATA[:25]):
        svi.step(part)
        assert guide(part)["z"].shape == (len(part), 2)
    assert len([name for name in pyro.get_param_store() if "encoder" in name]) == 4


def test_guide_and_model_see_the_same_subsample_and_its_scale():
    guide = AmortizedFlow(local, MLP(2, (8,), 4))
    guide_trace = poutine.trace(guide).get_trace(DATA, batch_size=5)
    model_trace = poutine.trace(poutine.replay(local, guide_trace)).get_trace(DATA, batch_size=5)
    assert torch.equal(guide_trace.nodes["data"]["value"], model_trace.nodes["data"]["value"])
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["x"]["scale"] == 8.0


def test_several_sites_of_several_supports_and_their_density(float64):
    x = DATA.double()
    guide = AmortizedFlow(two_sites, MLP(2, (8,), 4))
    trace = poutine.trace(guide).get_trace(x)
    value = {name: trace.nodes[name]["value"] for name in ("loc", "scale")}
    assert (value["scale"] > 0).all()
    assert torch.allclose(guide.log_prob(value, x), trace.log_prob_sum())
    draws = guide.sample_posterior(6, x)
    assert (draws["loc"].shape, draws["scale"].shape) == ((6, 40, 2), (6, 40))
    assert guide.log_prob(draws, x).shape == (6,)
    assert guide.median(x)["scale"].shape == (40,)


@pytest.mark.parametrize("name", stacks.names())
def test_the_parameters_of_every_flow_are_functions_of_the_data(name):
    guide = AmortizedFlow(local, MLP(2, (), 4), functools.partial(stacks.make, name, depth=1))
    guide(DATA)
    for param in guide.flow.parameters():
        param.data.add_(0.3 * torch.randn_like(param))
    posterior = guide.get_posterior(DATA[:2])
    inner, draw = guide.flow.flows[0], torch.randn(2)
    one, other = inner.forward_and_log_det(draw.expand(2, 2), posterior.context)[0]
    assert (one - other).abs().max() > 1e-3
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [param.detach().clone() for param in guide.encoder.parameters()]
    assert torch.isfinite(torch.tensor(svi.step(DATA, batch_size=5)))
    assert all((old != new).any() for old, new in zip(before, guide.encoder.parameters(), strict=True))


def images(x, batch_size=None):
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Normal(z.sum(-1)[:, None, None, None], 1.0).expand(x[rows].shape).to_event(3), obs=x[rows]
        )


def test_a_convolutional_encoder_of_images():
    x = torch.randn(12, 2, 8, 8)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5)
    )
    guide = AmortizedFlow(images, encoder)
    result = FlowSVI(images, guide, seed=0, progress=False, max_steps=10, num_particles=2, learning_rate=0.01).run(
        x, batch_size=4
    )
    assert result.num_skipped == 0
    assert guide.sample_posterior(7, x)["z"].shape == (7, 12, 3)


def labelled(x, prior, label, batch_size=None):
    with pyro.plate("data", len(x), subsample_size=batch_size, dim=-2) as rows:
        z = pyro.sample("z", dist.Normal(prior[:1], 1.0))
        pyro.sample("x", dist.Normal(z + label[rows, None], 1.0), obs=x[rows])


class OfSeveral(torch.nn.Module):
    """An encoder of several arguments, one of them given by keyword, one no datum."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.seen = None

    def forward(self, x, prior, label):
        self.seen = x, prior, label
        return self.linear(torch.cat([x, label[:, None]], -1))


def test_an_encoder_of_several_arguments_in_a_plate_further_left():
    label, prior = torch.arange(40.0), torch.zeros(3)
    guide = AmortizedFlow(labelled, OfSeveral())
    trace = poutine.trace(guide).get_trace(DATA, prior, label=label, batch_size=5)
    rows = trace.nodes["data"]["value"]
    x, given, cut_label = guide.encoder.seen
    assert torch.equal(x, DATA[rows])
    assert torch.equal(cut_label, label[rows])
    assert given is prior
    assert trace.nodes["z"]["value"].shape == (5, 1)
    replayed = poutine.trace(poutine.replay(labelled, trace)).get_trace(DATA, prior, label=label, batch_size=5)
    assert torch.isfinite(replayed.log_prob_sum())
    whole = poutine.trace(guide).get_trace(DATA, prior, label=label)
    value = {"z": whole.nodes["z"]["value"]}
    assert torch.allclose(guide.log_prob(value, DATA, prior, label=label), whole.log_prob_sum())


def test_an_outer_plate_of_particles_and_predictive():
    guide = AmortizedFlow(local, MLP(2, (8,), 4))
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for size in (10, None):
        assert torch.isfinite(torch.tensor(svi.step(DATA, batch_size=size)))
    drawn = Predictive(local, guide=guide, num_samples=6)(DATA)
    assert drawn["z"].shape == drawn["x"].shape == (6, 40, 2)


def test_minibatches_as_keyword_arguments():
    def model(x):
        with pyro.plate("data", 40, len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AmortizedFlow(model, MLP(2, (), 4))
    few = {"max_steps": 20, "eval_every": 10, "num_particles": 2, "learning_rate": 0.01, "compile": False}
    batches = [{"x": DATA[:10]}, {"x": DATA[10:16]}]
    assert FlowSVI(model, guide, seed=0, progress=False, **few).run_batches(batches).num_skipped == 0


def test_setting_up_reads_no_more_rows_than_the_subsample():
    sizes = []

    class Counted(MLP):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    AmortizedFlow(local, Counted(2, (), 4))(DATA, batch_size=5)
    assert set(sizes) == {5}


def test_global_and_local_latents_together():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, expose=["scale"]), functools.partial(stacks.realnvp, depth=2)))
    planar = functools.partial(stacks.planar, depth=2)
    guide.append(AmortizedFlow(poutine.block(model, expose=["z"]), MLP(2, (8,), 4), planar))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ELBO(num_particles=4))
    losses = [svi.step(DATA) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])


class Lopsided(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return torch.zeros(self.shape)


class Tupled(torch.nn.Module):
    def forward(self, x):
        return x, x


class Wavering(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 2 if len(x) == 40 else 3)


def test_bad_input_gets_a_sentence():
    flow = stacks.make("realnvp", 2, context_dim=5)
    with pytest.raises(
        ValueError, match=r"encoder must return contexts of the flow's width context_dim=5; got width 4"
    ):
        AmortizedFlow(local, MLP(2, (), 4), flow)(DATA)
    with pytest.raises(ValueError, match=r"encoder must return a tensor of shape \(batch, width\); got \(3,\)"):
        AmortizedFlow(local, Lopsided((3,)))(DATA)
    with pytest.raises(
        ValueError, match=r"encoder must return one context for each of the 40 elements of plate 'data'"
    ):
        AmortizedFlow(local, Lopsided((3, 2)))(DATA)
    with pytest.raises(ValueError, match=r"encoder must return a tensor of shape \(batch, width\); got tuple"):
        AmortizedFlow(local, Tupled())(DATA)
    with pytest.raises(ValueError, match=r"encoder must be a torch.nn.Module; got function"):
        AmortizedFlow(local, lambda x: x)
    with pytest.raises(ValueError, match=r"encoder fails on the model's arguments: mat1 and mat2"):
        AmortizedFlow(local, MLP(3, (), 4))(DATA)
    with pytest.raises(ValueError, match=r"encoder fails on the model's arguments: .* missing 1 required positional"):
        AmortizedFlow(local, torch.nn.Linear(2, 4))(x=DATA)
    guide = AmortizedFlow(local, Wavering())
    guide(DATA)
    with pytest.raises(ValueError, match="of the flow's width context_dim=2; got width 3"):
        guide(DATA[:7])
    with pytest.raises(ValueError, match="flow must be one of"):
        AmortizedFlow(local, MLP(2, (), 4), "spiral")
    with pytest.raises(ValueError, match="affine must be 'last' or 'first'; got 'middle'"):
        AmortizedFlow(local, MLP(2, (), 4), affine="middle")

    def mixed(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w, 1.0))

    with pytest.raises(ValueError, match="'w' in no plate, 'z' in data"):
        AmortizedFlow(mixed, MLP(2, (), 4))(DATA)

    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="AmortizedFlow found discrete latents alone"):
        AmortizedFlow(discrete, MLP(2, (), 4))(DATA)
