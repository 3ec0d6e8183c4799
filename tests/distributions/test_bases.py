"""The normal base, with and without a part that is wider."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.distributions.bases import NormalBase
from pyro_nf.guides import AutoFlow

pytestmark = pytest.mark.usefixtures("float64")


def model():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_a_normal_base_is_normal_until_it_is_defended_and_again_after():
    base = NormalBase(3)
    x = torch.randn(5, 3)
    wanted = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(x)
    assert torch.equal(base().log_prob(x), wanted)
    base.defend(0.1)
    assert not torch.allclose(base().log_prob(x), wanted)
    base.defend(0.0)
    assert torch.equal(base().log_prob(x), wanted)


def test_the_density_is_that_of_the_mixture_and_its_draws_have_its_moments():
    torch.manual_seed(0)
    base = NormalBase(3)
    base.defend(0.4)
    x = 3 * torch.randn(2, 5, 3)
    wide = dist.Normal(torch.zeros(3), 1.2).to_event(1)
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    wanted = (0.6 * normal.log_prob(x).exp() + 0.4 * wide.log_prob(x).exp()).log()
    assert torch.allclose(base().log_prob(x), wanted)
    draws = base().rsample((200_000,))
    assert torch.allclose(draws.mean(0), torch.zeros(3), atol=0.02)
    assert torch.allclose(draws.square().mean(0), torch.tensor(0.6 + 0.4 * 1.2**2), rtol=0.02)
    assert torch.allclose(draws.pow(4).mean(0), torch.tensor(0.6 * 3 + 0.4 * 3 * 1.2**4), rtol=0.1)
    assert base().expand((2,)).rsample((4,)).shape == (4, 2, 3)


def test_a_defended_guide_scores_its_draws_and_survives_its_state():
    guide = AutoFlow(model)
    guide()
    guide.base.defend(0.2)
    y, log_q = guide.get_posterior().rsample_and_log_prob((6,))
    assert torch.allclose(guide.get_posterior().log_prob(y), log_q)
    late = AutoFlow(model)
    late.load_state_dict(guide.state_dict())  # before its first call
    late()
    assert torch.allclose(late.get_posterior().log_prob(y), log_q)
    other = AutoFlow(model)
    other()
    other.load_state_dict(guide.state_dict())
    assert torch.allclose(other.get_posterior().log_prob(y), log_q)
