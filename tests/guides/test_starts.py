from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -2.0]) + 1000.0


def regression(x, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1000.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + x @ beta, 1.0), obs=y)


def exact():
    design = torch.cat([torch.ones(30, 1), X], 1).double()
    precision = design.T @ design + torch.diag(torch.tensor([1e-6, 0.04, 0.04], dtype=torch.float64))
    cov = precision.inverse()
    return cov @ design.T @ Y.double(), cov


def test_a_normal_posterior_is_found_at_once_however_far_it_is(float64):
    guide = AutoFlow(regression)
    starts = guide.warm_start(X.double(), Y.double())
    loc, cov = exact()
    affine = guide.flow.flows[-1]
    found = affine(torch.cat([torch.zeros(1, 3), torch.eye(3)])).detach()
    assert torch.allclose(found[0], loc, rtol=1e-4)
    scale_tril = (found[1:] - found[0]).mT
    assert torch.allclose(scale_tril @ scale_tril.mT, cov, rtol=1e-3, atol=1e-8)
    assert len(starts.modes) == 1
    assert starts.modes[0].num_runs == 8
    assert "8 starts agree on one mode" in str(starts)


def test_a_fit_from_there_is_done_soon():
    guide = AutoFlow(regression, partial(stacks.realnvp, depth=2, hidden_dims=(16,)))
    result = FlowSVI(regression, guide, num_starts=2, seed=0, progress=False, learning_rate=0.003).run(X, Y)
    assert result.converged
    assert result.steps < 2000
    assert float(guide.median(X, Y)["intercept"]) == pytest.approx(1000.0, abs=0.5)


def test_the_modes_of_an_unbounded_density_are_rejected(float64):
    sigma, y = (value.double() for value in eight_schools.data())
    guide = AutoFlow(eight_schools.centered)
    guide(sigma, y)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    starts = guide.warm_start(sigma, y)
    for mode in starts.modes:
        assert mode.elbo > starts.elbo
    if not starts.modes:
        assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
        assert "none is better" in str(starts)
    assert torch.isfinite(guide.log_prob(guide.sample_posterior(100, sigma, y), sigma, y)).all()


def test_a_subsampled_plate_starts_from_one_minibatch():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 30, subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(w, 1.0), obs=Y[rows])

    guide = AutoFlow(model)
    guide.warm_start(num_starts=2)
    assert float(guide.median()["w"]) == pytest.approx(float(Y.mean()), abs=10.0)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="num_starts must be a whole number of at least 1; got 0"):
        AutoFlow(regression).warm_start(X, Y, num_starts=0)
    with pytest.raises(ValueError, match="num_starts must be 0 for a guide without warm_start; got a AutoNormal"):
        FlowSVI(regression, AutoNormal(regression), num_starts=3)
    with pytest.raises(ValueError, match="num_starts must be a whole number of at least 0; got -1"):
        FlowSVI(regression, AutoFlow(regression), num_starts=-1)

    def large():
        pyro.sample("z", dist.Normal(torch.zeros(1001), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"warm_start takes up to 1000 coordinates.* has 1001"):
        AutoFlow(large).warm_start()
