from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value

from pyro_nf.diagnostics import diagnose
from pyro_nf.flows import ElementwiseAffine, stacks
from pyro_nf.guides import AutoFlow, MixtureBase
from pyro_nf.inference import FlowSVI


def two_modes(dim=2):
    locs = torch.stack([torch.full((dim,), -4.0), torch.full((dim,), 4.0)])
    pyro.sample("z", dist.MixtureOfDiagNormals(locs, torch.ones(2, dim), torch.tensor([0.25, 0.75]).log()))


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


X = torch.linspace(-1.0, 1.0, 10)


@pytest.mark.parametrize("dim", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_both_modes_are_found_with_their_weights(dim):
    model = partial(two_modes, dim)
    guide = AutoFlow(model, partial(stacks.realnvp, depth=2, hidden_dims=(16,)), base="mixture")
    result = FlowSVI(model, guide, num_starts=8, seed=0, progress=False, max_steps=300, learning_rate=0.01).run()
    draws = guide.sample_posterior(20_000)["z"]
    assert float((draws.mean(-1) > 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(draws.var(0).mean()) == pytest.approx(13.0, abs=0.6)
    assert "8 starts disagree: 2 modes, with shares 0.7" in str(result)
    assert diagnose(model, guide).ess_fraction > 0.9


def test_a_guide_over_one_normal_is_told_of_the_other_mode():
    guide = AutoFlow(two_modes, ElementwiseAffine)
    result = FlowSVI(two_modes, guide, num_starts=8, seed=0, progress=False, max_steps=20, learning_rate=0.01).run()
    assert result.starts.disagree
    assert "2 modes" in str(result)


def test_the_trace_and_log_prob_agree(float64):
    guide = AutoFlow(regression, base="mixture")
    trace = poutine.trace(guide).get_trace(X.double(), X.double())
    value = {name: trace.nodes[name]["value"] for name in ("a", "b")}
    assert torch.allclose(guide.log_prob(value, X.double(), X.double()), trace.log_prob_sum())


def test_a_mixture_integrates_to_one_and_draws_what_it_scores(float64):
    mixture = MixtureBase(1, num_components=3)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        for component, scale in zip(mixture.components, (0.5, 1.0, 2.0), strict=True):
            component.assign(4 * torch.randn(1), torch.full((1, 1), scale))
    grid = torch.linspace(-30.0, 30.0, 20_001)
    density = mixture().log_prob(grid[:, None]).exp().detach()
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=1e-9)
    draws = mixture().sample((20_000,))[:, 0]
    mean = float((density * grid).sum() * (grid[1] - grid[0]))
    assert float(draws.mean()) == pytest.approx(mean, abs=4 * float(draws.std()) / 20_000**0.5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_pyros_svi_takes_a_mixture(vectorize):
    start = init_to_value(values={"a": torch.tensor(3.0), "b": torch.tensor(1.0)})
    guide = AutoFlow(regression, ElementwiseAffine, base=partial(MixtureBase, num_components=2), init_loc_fn=start)
    loss = Trace_ELBO(num_particles=8, vectorize_particles=vectorize)
    svi = SVI(regression, guide, pyro.optim.ClippedAdam({"lr": 0.01}), loss)
    losses = [svi.step(X, X) for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 20


def test_a_base_of_ones_own():
    guide = AutoFlow(regression, base=partial(MixtureBase, num_components=3))
    guide(X, X)
    assert len(guide.base.components) == 3
    with pytest.raises(ValueError, match="base must be 'normal', 'student_t', 'mixture' or a factory"):
        AutoFlow(regression, base="mix of")
    with pytest.raises(ValueError, match="num_components must be a whole number of at least 2; got 1"):
        MixtureBase(3, num_components=1)
