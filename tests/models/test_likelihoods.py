import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.models import DLGM, BernoulliLikelihood, CategoricalLikelihood, LogisticMixtureLikelihood, NormalLikelihood
from pyro_nf.models.likelihoods import DiscretizedLogistic

HEADS = {
    "bernoulli": (BernoulliLikelihood(), torch.tensor([0.0, 1.0, 1.0])),
    "normal": (NormalLikelihood(), torch.tensor([-0.3, 2.0, 0.7])),
    "categorical": (CategoricalLikelihood(4), torch.tensor([0.0, 3.0, 1.0])),
    "logistic mixture": (LogisticMixtureLikelihood(2, None), torch.tensor([-0.3, 2.0, 0.7])),
    "levels": (LogisticMixtureLikelihood(2, 16), torch.tensor([0.0, 15.0, 6.0])),
}
every_head = pytest.mark.parametrize(("head", "x"), HEADS.values(), ids=HEADS)


def sigmoid(y):
    return 1 / (1 + math.exp(-y))


def by_hand(name, params, x):
    """The log density of one value, from its parameters one by one."""
    if name == "bernoulli":
        return math.log(sigmoid(params[0] if x else -params[0]))
    if name == "normal":
        scale = math.log1p(math.exp(params[1])) + 1e-3
        return -0.5 * ((x - params[0]) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    if name == "categorical":
        return params[int(x)] - math.log(sum(map(math.exp, params)))
    weights = [math.exp(logit) for logit in params[:2]]
    total = 0.0
    for weight, loc, raw in zip(weights, params[2:4], params[4:6], strict=True):
        scale = math.exp(raw / (1 + abs(raw) / 7))
        if name == "levels":
            loc, scale = 7.5 * (1 + loc), 7.5 * scale
            upper = 1.0 if x == 15 else sigmoid((x + 0.5 - loc) / scale)
            lower = 0.0 if x == 0 else sigmoid((x - 0.5 - loc) / scale)
            total += weight * (upper - lower)
        else:
            y = (x - loc) / scale
            total += weight * math.exp(-y) / (scale * (1 + math.exp(-y)) ** 2)
    return math.log(total / sum(weights))


@pytest.mark.parametrize("name", HEADS)
def test_the_log_density_is_that_of_the_formula(name, float64):
    head, x = HEADS[name]
    outputs = torch.randn(head.num_params, 3)
    expected = sum(by_hand(name, outputs[:, i].tolist(), float(x[i])) for i in range(3))
    assert float(head(outputs.flatten()).log_prob(x.double())) == pytest.approx(expected, abs=1e-10)


@every_head
def test_batches_draws_and_vmap(head, x):
    outputs = torch.randn(5, 2, head.num_params * 3)
    found = head(outputs)
    assert (found.batch_shape, found.event_shape) == ((5, 2), (3,))
    draws = found.sample((4,))
    assert draws.shape == (4, 5, 2, 3)
    assert found.log_prob(draws).shape == (4, 5, 2)
    assert found.support.check(draws.to(x)).all()
    with pyro.validation_enabled(False):
        batched = torch.func.vmap(lambda part: head(part).log_prob(x))(outputs)
    assert torch.allclose(batched, found.log_prob(x), atol=1e-5)


def test_discrete_heads_sum_to_one(float64):
    for head, size in ((BernoulliLikelihood(), 2), (CategoricalLikelihood(5), 5), (LogisticMixtureLikelihood(3, 9), 9)):
        levels = torch.arange(float(size))[:, None]
        total = head(2 * torch.randn(100, 1, head.num_params)).log_prob(levels).exp().sum(-1)
        assert torch.allclose(total, torch.ones(100), atol=1e-12)


def test_a_continuous_mixture_integrates_to_one(float64):
    x = torch.linspace(-60.0, 60.0, 200_001)[:, None]
    density = LogisticMixtureLikelihood(3, None)(torch.randn(9)).log_prob(x).exp()
    assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("loc", [-1e4, 0.0, 7.3, 255.0, 1e4])
@pytest.mark.parametrize("scale", [0.05, 1.0, 300.0])
def test_a_logistic_of_levels_is_finite_far_out_and_has_finite_gradients(loc, scale):
    loc, scale = torch.tensor(loc, requires_grad=True), torch.tensor(scale, requires_grad=True)
    log_prob = DiscretizedLogistic(loc, scale, 256).log_prob(torch.arange(256.0))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert loc.grad.isfinite()
    assert scale.grad.isfinite()


def test_draws_of_levels_have_their_frequencies():
    found = DiscretizedLogistic(torch.tensor(2.2), torch.tensor(1.5), 6)
    frequency = found.sample((100_000,)).long().bincount(minlength=6) / 100_000
    assert torch.allclose(frequency, found.log_prob(torch.arange(6.0)).exp(), atol=0.007)


@every_head
def test_a_model_has_as_many_outputs_as_its_head_takes(head, x):
    model = DLGM(3, (2,), (4,), likelihood=head)
    assert model.networks[0].layers[-1].out_features == 3 * head.num_params
    trace = poutine.trace(model).get_trace(x.expand(5, 3))
    assert trace.log_prob_sum().isfinite()


def test_values_outside_the_levels_are_refused():
    with pytest.raises(ValueError, match="support"):
        dist.Independent(DiscretizedLogistic(torch.zeros(2), torch.ones(2), 4, True), 1).log_prob(
            torch.tensor([0.0, 4])
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(CategoricalLikelihood, 1), "num_classes must be a whole number of at least 2; got 1"),
        (functools.partial(LogisticMixtureLikelihood, 0), "num_components must be a whole number of at least 1; got 0"),
        (functools.partial(LogisticMixtureLikelihood, 2, 1), "num_levels must be a whole number of at least 2; got 1"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
