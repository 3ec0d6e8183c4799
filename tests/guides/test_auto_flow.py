import copy
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import biject_to

from pyro_nf.diagnostics import diagnose
from pyro_nf.flows import Planar, stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -2.0]) + 0.3


def regression(x, y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(intercept + x @ beta, sigma), obs=y)


def many_supports():
    pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    pyro.sample("share", dist.Beta(2.0, 3.0))
    with pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("loc", dist.Normal(torch.zeros(4), 1.0).to_event(1))


@pytest.mark.parametrize("name", stacks.names())
def test_it_starts_as_auto_normal(name, float64):
    x, y = X.double(), Y.double()
    ours, theirs = AutoFlow(regression, name), AutoNormal(regression)
    theirs(x, y)
    value = ours(x, y)
    sites = theirs.prototype_trace.nodes
    unconstrained = {f"{site}_unconstrained": biject_to(sites[site]["fn"].support).inv(v) for site, v in value.items()}
    trace = poutine.trace(poutine.condition(theirs, data=unconstrained)).get_trace(x, y)
    assert torch.allclose(ours.log_prob(value, x, y), trace.log_prob_sum(), atol=1e-8)


def test_first_loss_with_a_far_intercept_is_auto_normals():
    x, y = X, Y + 1000.0

    def first_loss(guide_class):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return ELBO(num_particles=2000).loss(regression, guide_class(regression), x, y)

    # Two averages of 2,000 draws with a spread of a fifth: each within half a percent, one time in three beyond.
    assert first_loss(AutoFlow) <= first_loss(AutoNormal) * 1.03


def test_four_couplings_reach_every_coordinate():
    def target():
        pyro.sample("z", dist.Normal(torch.full((4,), 5.0), 0.1).to_event(1))

    guide = AutoFlow(target, functools.partial(stacks.make, "realnvp", depth=4))
    FlowSVI(target, guide, seed=0, progress=False, max_steps=1500).run()
    assert torch.allclose(guide.sample_posterior(4000)["z"].mean(0), torch.full((4,), 5.0), atol=0.02)


def test_the_couplings_alone_reach_every_coordinate_too():
    # Without the guide's affine layer, which could do it by itself.
    flow = stacks.make("realnvp", 4, depth=4)

    def target():
        pyro.sample("z", dist.Normal(torch.full((4,), 5.0), 0.1).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), [flow]))

    FlowSVI(target, guide, seed=0, progress=False, max_steps=3000).run()
    draws = flow(torch.randn(4000, 4)).detach()
    assert torch.allclose(draws.mean(0), torch.full((4,), 5.0), atol=0.02)


def test_maf_parameters_are_registered_and_move():
    guide = AutoFlow(regression, "maf")
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X, Y)
    before = [p.detach().clone() for p in guide.flow.flows[0].parameters()]
    svi.step(X, Y)
    svi.step(X, Y)
    names = [name for name in pyro.get_param_store() if ".network." in name]
    assert len(names) == len(list(guide.flow.flows[0].parameters())) == len(before)
    moved = [bool((a != b).any()) for a, b in zip(before, guide.flow.flows[0].parameters(), strict=True)]
    # Masked-out weights aside, every tensor moves.
    assert all(moved)


@pytest.mark.parametrize("vectorize", [False, True])
def test_pyros_svi_and_trace_elbo(vectorize):
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 10):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    guide = AutoFlow(model)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=vectorize)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(torch.linspace(0.0, 2.0, 10)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_predictive_both_ways():
    guide = AutoFlow(regression)
    guide(X, Y)
    drawn = Predictive(regression, guide=guide, num_samples=6)(X)
    assert drawn["y"].shape == (6, 30)

    def flat(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoFlow(flat)
    guide(torch.ones(10))
    drawn = Predictive(flat, guide=guide, num_samples=6, parallel=True)()
    assert drawn["y"].shape == (6, 10)
    assert len(drawn["mu"].unique()) == 6


def test_in_an_auto_guide_list():
    guide = AutoGuideList(regression)
    guide.append(AutoFlow(poutine.block(regression, expose=["beta", "intercept"])))
    guide.append(AutoNormal(poutine.block(regression, expose=["sigma"])))
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=4))
    losses = [svi.step(X, Y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert set(guide(X, Y)) == {"beta", "intercept", "sigma"}


def test_neutra():
    def model():
        a = pyro.sample("a", dist.Normal(1.0, 2.0))
        pyro.sample("b", dist.LogNormal(a, 0.5))

    guide = AutoFlow(model)
    FlowSVI(model, guide, seed=0, progress=False, max_steps=300).run()
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    with torch.no_grad():
        draws = neutra.transform_sample(mcmc.get_samples()["a_shared_latent"])
    assert draws["b"].shape == (100,)
    assert float((draws["b"].log() - draws["a"]).std()) == pytest.approx(0.5, abs=0.15)


def test_every_support_and_plate(float64):
    guide = AutoFlow(many_supports, init_scale=0.5)
    draws = guide.sample_posterior(50)
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"probs": (50, 3), "corr": (50, 3, 3), "share": (50,), "rate": (50, 3, 2), "loc": (50, 3, 2, 4)}
    assert torch.allclose(draws["probs"].sum(-1), torch.ones(50))
    trace = poutine.trace(guide).get_trace()
    value = {name: trace.nodes[name]["value"] for name in shapes}
    assert torch.allclose(guide.log_prob(value), trace.log_prob_sum())
    assert guide.log_prob(draws).shape == (50,)
    assert torch.isfinite(guide.log_prob(draws)).all()
    assert {k: tuple(v.shape) for k, v in guide.median().items()} == {k: s[1:] for k, s in shapes.items()}
    assert guide.quantiles([0.1, 0.5, 0.9])["rate"].shape == (3, 3, 2)


def test_the_evidence_of_a_prior_is_one():
    guide = AutoFlow(many_supports)
    FlowSVI(many_supports, guide, seed=0, progress=False, max_steps=400).run()
    found = diagnose(many_supports, guide, num_samples=4000)
    # The reported error takes the weights for normal; early in a fit they are skewed.
    assert abs(found.log_evidence) < 4 * found.log_evidence_se + 0.01
    assert found.log_evidence_se < 0.1


def test_median_and_quantiles_of_a_known_posterior():
    def model():
        pyro.sample("x", dist.LogNormal(1.0, 0.5))

    guide = AutoFlow(model, init_loc_fn=init_to_value(values={"x": torch.tensor(1.0).exp()}), init_scale=0.5)
    low, high = guide.quantiles([0.1, 0.9])["x"]
    truth = dist.LogNormal(1.0, 0.5).icdf(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(torch.stack([low, guide.median()["x"], high]), truth, rtol=0.05)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))], ids=["copy", "pickle"]
)
def test_copies_draw_the_same_and_leave_the_original_whole(how):
    guide = AutoFlow(regression, Planar(4))
    guide.sample_posterior(1, X, Y)  # a call under Pyro's handlers would leave weak references on the parameters
    twin = how(guide)
    assert guide.model is not None
    draws = []
    for each in (guide, twin):
        pyro.set_rng_seed(3)
        draws.append(each.sample_posterior(5, X, Y)["beta"])
    assert torch.equal(*draws)


def test_two_guides_have_parameters_of_their_own():
    first, second = AutoFlow(regression), AutoFlow(regression)
    SVI(regression, first, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(X, Y)
    second(X, Y)
    moved = first.flow.flows[-1].affine.params.loc
    assert (moved != second.flow.flows[-1].affine.params.loc).any()
    assert len(pyro.get_param_store()) == 2 * len(first.state_dict())


def local_model(x):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def discrete_model():
    pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("k", dist.Poisson(0.5))


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"flow must be one of .* got 'realnpv'; did you mean 'realnvp'"):
        AutoFlow(regression, "realnpv")
    with pytest.raises(ValueError, match="flow must be a name, a Flow or a factory"):
        AutoFlow(regression, 3)
    with pytest.raises(ValueError, match=r"flow must be over the model's 4 unconstrained latent .* \(3,\)"):
        AutoFlow(regression, Planar(3))(X, Y)
    with pytest.raises(ValueError, match="init_scale must be a finite number greater than 0; got -1"):
        AutoFlow(regression, init_scale=-1.0)
    with pytest.raises(ValueError, match="AutoFlow found no latent variables"):
        AutoFlow(no_latents)()
    with pytest.raises(ValueError, match="site 'k' is discrete, and Poisson has no finite support"):
        AutoFlow(discrete_model)()
    with pytest.raises(ValueError, match=r"'z' is local to the subsampled plate 'data'.*AmortizedFlow"):
        AutoFlow(local_model)(torch.zeros(10))
    with pytest.raises(ValueError, match="latents must hold every latent site; sigma missing"):
        AutoFlow(regression).log_prob({"beta": torch.zeros(2), "intercept": torch.zeros(())}, X, Y)
    with pytest.raises(RuntimeError, match="call the guide, or fit it, first"):
        AutoFlow(regression).get_posterior()
