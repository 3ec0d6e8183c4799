import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList

from pyro_nf.flows import stacks
from pyro_nf.guides import AmortizedFlow, AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.networks import MLP
from pyro_nf.objectives import ELBO

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
    kwargs = {"max_steps": 600, "num_particles": 8, "learning_rate": 0.02, "eval_particles": 100}
    FlowSVI(local, guide, seed=0, progress=False, **kwargs).run(DATA, batch_size=20)
    draws = guide.sample_posterior(4000, DATA)["z"]
    assert draws.shape == (4000, 40, 2)
    assert torch.allclose(draws.mean(0), DATA / 2, atol=0.2)
    assert torch.allclose(draws.std(0), torch.full((40, 2), 0.5**0.5), atol=0.1)


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


def test_global_and_local_latents_together():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, expose=["scale"])))
    guide.append(AmortizedFlow(poutine.block(model, expose=["z"]), MLP(2, (8,), 4), "planar"))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ELBO(num_particles=4))
    losses = [svi.step(DATA) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])


class Lopsided(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return torch.zeros(self.shape)


def test_bad_input_gets_a_sentence():
    flow = stacks.make("realnvp", 2, context_dim=5)
    with pytest.raises(ValueError, match="encoder must return contexts of the flow's width context_dim=5; got width 4"):
        AmortizedFlow(local, MLP(2, (), 4), flow)(DATA)
    with pytest.raises(ValueError, match=r"encoder must return a tensor of shape \(batch, width\); got \(3,\)"):
        AmortizedFlow(local, Lopsided((3,)))(DATA)
    with pytest.raises(ValueError, match="encoder must return one context for each of the 40 elements of plate 'data'"):
        AmortizedFlow(local, Lopsided((3, 2)))(DATA)
    with pytest.raises(ValueError, match="flow must be one of"):
        AmortizedFlow(local, MLP(2, (), 4), "spiral")

    def mixed(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w, 1.0))

    with pytest.raises(ValueError, match="'w' in no plate, 'z' in data"):
        AmortizedFlow(mixed, MLP(2, (), 4))(DATA)

    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'k' is discrete"):
        AmortizedFlow(discrete, MLP(2, (), 4))(DATA)
