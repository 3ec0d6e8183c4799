"""Which of two approximations is better, by importance weights."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.diagnostics.weights import summarize
from pyro_nf.distributions import FlowDistribution
from pyro_nf.distributions.bases import NormalBase
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.inference.staged.measure import NUM_DRAWS, gap, is_better, is_good, measure


def weights(log_w):
    return summarize(log_w.double().numpy()[None])


def test_small_differences_are_told_by_gaps_and_large_ones_by_elbos():
    torch.manual_seed(0)
    noise = torch.randn(5000)
    exact, rough = weights(0.01 * noise - 0.002), weights(0.1 * noise.flip(0))
    assert rough.elbo > exact.elbo  # by chance alone
    assert is_better(exact, rough)
    assert not is_better(rough, exact)
    # One of two modes, exactly: no gap in sight. Both, roughly: a higher ELBO.
    one, both = weights(0.001 * noise - 0.7), weights(0.3 * noise)
    assert gap(one) < gap(both)
    assert is_better(both, one)
    assert not is_better(None, one)
    assert is_better(one, None)
    assert not is_better(None, None)


def posterior(scale):
    return FlowDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), ElementwiseAffine(2, scale=scale))


def test_the_exact_posterior_is_good_and_a_narrow_one_is_not():
    torch.manual_seed(0)
    density = Density(lambda x: -0.5 * x.square().sum() - math.log(2 * math.pi) + 3.0)
    exact, known = measure(density, posterior(1.0))
    assert known.points.shape == (NUM_DRAWS, 2)
    assert torch.allclose(known.log_p, density.values(known.points))
    assert abs(exact.log_evidence - 3.0) < 1e-4
    assert is_good(exact, 1e-3)
    narrow, _ = measure(density, posterior(0.7))
    assert not is_good(narrow, 1e-3)
    assert is_better(exact, narrow)
    assert not is_good(None, 1e-3)


def test_what_is_known_of_a_draw_is_not_evaluated_again():
    asked = []

    class Counted(Density):
        def values(self, points):
            asked.append(len(points))
            return super().values(points)

    density, base = Counted(lambda x: -0.5 * x.square().sum()), NormalBase(2)
    known, found = None, []
    for weight in (0.0, 0.1):
        base.defend(weight)
        torch.manual_seed(0)
        summary, known = measure(density, FlowDistribution(base(), ElementwiseAffine(2)), known=known)
        found.append(summary)
    assert asked[0] == NUM_DRAWS
    assert asked[1] == pytest.approx(0.1 * NUM_DRAWS, rel=0.2)
    assert torch.allclose(known.log_p, density.values(known.points))
    assert found[1].ess_fraction < found[0].ess_fraction


def test_draws_without_a_density_have_no_weight_and_a_set_of_such_draws_no_summary():
    torch.manual_seed(0)
    half = Density(lambda x: -0.5 * x.square().sum() + torch.where(x[0] > 0, 0.0, math.nan))
    found, _ = measure(half, posterior(1.0))
    assert 0.45 < found.ess_fraction < 0.55
    assert not is_good(found, math.inf)
    assert measure(Density(lambda x: x.sum() - math.inf), posterior(1.0))[0] is None
