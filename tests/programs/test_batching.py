"""Models are run for many draws at once: every distribution of Pyro, and what models do with tensors."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import tensor

from pyro_nf.approximations.density import Density
from pyro_nf.diagnostics.simulation import prior
from pyro_nf.programs.batching import Batchable
from pyro_nf.programs.coordinates import model_log_density
from pyro_nf.programs.program import Program
from pyro_nf.programs.supports import bijection
from pyro_nf.programs.traces import log_prob_sum

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:class LKJCorrCholesky")]

# Classes of `pyro.distributions` that are no distributions, or have no density.
REASONS = {
    "CoalescentRateLikelihood": "a function of the rates, for pyro.factor",
    "ComposeTransformModule": "a transform",
    "ConditionalDistribution": "abstract; conditioned, it is a TransformedDistribution",
    "ConditionalTransform": "a transform",
    "ConditionalTransformModule": "a transform",
    "ConditionalTransformedDistribution": "conditioned, it is a TransformedDistribution",
    "Distribution": "abstract",
    "ExponentialFamily": "abstract",
    "LinearHMM": "Pyro has no density for it: use poutine.reparam with LinearHMMReparam",
    "TorchDistribution": "abstract",
    "TransformModule": "a transform",
}
# Why a distribution that is not discrete cannot be a latent's.
NO_PRIOR = {
    "CoalescentTimes": "its support has no bijection",
    "CoalescentTimesWithRate": "its support has no bijection",
    "Delta": "a single value",
    "Empirical": "single values",
    "GaussianScaleMixture": "Pyro does not name its support",
    "ProjectedNormal": "a sphere: use poutine.reparam with ProjectedNormalReparam",
    "GroupedNormalNormal": "its values have another shape than it says",
    "OneOneMatching": "permutations",
    "OneTwoMatching": "permutations",
    "Rejector": "Pyro does not name its support",
    "Unit": "no numbers",
    "VonMises3D": "a sphere",
}
# Why draws cannot be made, or not at once.
NO_DRAWS = {
    "CoalescentTimesWithRate": "Pyro does not draw",
    "GammaGaussianHMM": "Pyro does not draw",
    "GaussianMRF": "Pyro does not draw",
    "GroupedNormalNormal": "Pyro does not draw",
    "ImproperUniform": "Pyro does not draw",
    "LogNormalNegativeBinomial": "Pyro does not draw",
    "Rejector": "its loop looks at values, of functions that may hold the draw's",
    "VonMises3D": "Pyro does not draw",
}

D = torch.float64
ONES, V, UP = torch.ones(3, dtype=D), tensor([0.5, -0.2, 1.0], dtype=D), torch.linspace(-1.0, 1.0, 3, dtype=D)
I2, I3 = torch.eye(2, dtype=D), torch.eye(3, dtype=D)
MASK, TIMES = tensor([True, False, True]), tensor([0.0, 0.1, 0.2, 0.3], dtype=D)
SHORT, NAN = tensor([-0.9, -0.5, -0.1], dtype=D), math.nan


def mvn(t, dim=2, batch=()):
    return dist.MultivariateNormal(t * torch.ones(*batch, dim), scale_tril=(0.5 * t).exp() * torch.eye(dim))


def hmm(t):
    return mvn(t, 1), 0.5 * t * ONES[:1, None], mvn(t, 1), t.exp() * ONES[None, :2], mvn(-t)


def stable(cls):
    return lambda t: cls(tensor(1.5), t.tanh() * ONES, t.exp(), t * V)


# Distributions with parameters that depend on a number.
RECIPES = {
    "AVFMultivariateNormal": lambda t: dist.AVFMultivariateNormal(t * ONES, t.exp() * I3, torch.ones(2, 1, 3)),
    "AffineBeta": lambda t: dist.AffineBeta(t.exp(), 2.0, t - 5.0, 9.0 + t.exp()),
    "AsymmetricLaplace": lambda t: dist.AsymmetricLaplace(t * V, t.exp(), 1.3),
    "Bernoulli": lambda t: dist.Bernoulli(logits=t * V),
    "Beta": lambda t: dist.Beta(t.exp() * ONES, 2.0),
    "BetaBinomial": lambda t: dist.BetaBinomial(t.exp() * ONES, 2.0, 10),
    "Binomial": lambda t: dist.Binomial(10, logits=t * V),
    "Categorical": lambda t: dist.Categorical(logits=t * UP),
    "Cauchy": lambda t: dist.Cauchy(t * V, t.exp()),
    "Chi2": lambda t: dist.Chi2(t.exp() * ONES),
    "CoalescentTimes": lambda t: dist.CoalescentTimes(TIMES, t.exp()),
    "CoalescentTimesWithRate": lambda t: dist.CoalescentTimesWithRate(TIMES, t.exp() * ONES),
    "ContinuousBernoulli": lambda t: dist.ContinuousBernoulli(logits=t * V),
    "Delta": lambda t: dist.Delta(V, log_density=t * ONES),
    "Dirichlet": lambda t: dist.Dirichlet(t.exp() * ONES),
    "DirichletMultinomial": lambda t: dist.DirichletMultinomial(t.exp() * ONES, 10),
    "DiscreteHMM": lambda t: dist.DiscreteHMM(torch.zeros(2), t * I2, dist.Normal(t * V[:2], 1.0), duration=5),
    "Empirical": lambda t: dist.Empirical(torch.arange(3.0), t * UP),
    "ExpandedDistribution": lambda t: dist.ExpandedDistribution(dist.Normal(t, t.exp()), [3]),
    "Exponential": lambda t: dist.Exponential(t.exp() * ONES),
    "ExtendedBetaBinomial": lambda t: dist.ExtendedBetaBinomial(t.exp() * ONES, tensor(2.0), tensor(10.0)),
    "ExtendedBinomial": lambda t: dist.ExtendedBinomial(10, logits=t * V),
    "FisherSnedecor": lambda t: dist.FisherSnedecor(t.exp() * ONES, 3.0),
    "FoldedDistribution": lambda t: dist.FoldedDistribution(dist.Normal(t * V, t.exp())),
    "Gamma": lambda t: dist.Gamma(t.exp() * ONES, t.exp()),
    "GammaGaussianHMM": lambda t: dist.GammaGaussianHMM(dist.Gamma(t.exp(), t.exp()), *hmm(t), duration=2),
    "GammaPoisson": lambda t: dist.GammaPoisson(t.exp() * ONES, 1.0),
    "GaussianHMM": lambda t: dist.GaussianHMM(*hmm(t), duration=2),
    "GaussianMRF": lambda t: dist.GaussianMRF(mvn(t, 1), mvn(t, 2, (2,)), mvn(t, 2, (2,))),
    "GaussianScaleMixture": lambda t: dist.GaussianScaleMixture(t.exp() * ONES, t * V[:2], t.exp() + 1.0 + V[:2]),
    "GeneralizedPareto": lambda t: dist.GeneralizedPareto(-1.0, t.exp() * ONES, V),
    "Geometric": lambda t: dist.Geometric(logits=t * V),
    "GroupedNormalNormal": lambda t: dist.GroupedNormalNormal(t * V[:2], t.exp(), t.exp() * ONES, tensor([0, 1, 1])),
    "Gumbel": lambda t: dist.Gumbel(t * V, t.exp()),
    "HalfCauchy": lambda t: dist.HalfCauchy(t.exp() * ONES),
    "HalfNormal": lambda t: dist.HalfNormal(t.exp() * ONES),
    "ImproperUniform": lambda t: dist.ImproperUniform(dist.constraints.real, (3,), ()),
    "Independent": lambda t: dist.Independent(dist.Normal(t * V, t.exp()), 1),
    "IndependentHMM": lambda t: dist.IndependentHMM(
        dist.GaussianHMM(mvn(t, 1), t * I2[:1, :1], mvn(t, 1, (2, 1)), I2[:1, :1], mvn(t, 1, (2, 2)))
    ),
    "InverseGamma": lambda t: dist.InverseGamma(t.exp() * ONES, t.exp()),
    "Kumaraswamy": lambda t: dist.Kumaraswamy(t.exp() * ONES, 2.0),
    "LKJ": lambda t: dist.LKJ(3, t.exp()),
    "LKJCholesky": lambda t: dist.LKJCholesky(3, t.exp()),
    "LKJCorrCholesky": lambda t: dist.LKJCorrCholesky(3, t.exp()),
    "Laplace": lambda t: dist.Laplace(t * V, t.exp()),
    "LogNormal": lambda t: dist.LogNormal(t * V, t.exp()),
    "LogNormalNegativeBinomial": lambda t: dist.LogNormalNegativeBinomial(tensor(5.0), t * V, t.exp()),
    "Logistic": lambda t: dist.Logistic(t * V, t.exp()),
    "LogisticNormal": lambda t: dist.LogisticNormal(t * V, t.exp() * ONES),
    "LowRankMultivariateNormal": lambda t: dist.LowRankMultivariateNormal(t * V, t * I3[:, :1], t.exp() * ONES),
    "MaskedDistribution": lambda t: dist.MaskedDistribution(dist.Normal(t * V, t.exp()), MASK),
    "MaskedMixture": lambda t: dist.MaskedMixture(MASK, dist.Normal(t * V, 1.0), dist.Normal(t - V, t.exp())),
    "MixtureOfDiagNormals": lambda t: dist.MixtureOfDiagNormals(t * I2, t.exp() * torch.ones(2, 2), t * V[:2]),
    "MixtureOfDiagNormalsSharedCovariance": lambda t: dist.MixtureOfDiagNormalsSharedCovariance(
        t * I2, t.exp() * torch.ones(2), t * V[:2]
    ),
    "MixtureSameFamily": lambda t: dist.MixtureSameFamily(dist.Categorical(logits=t * UP), dist.Normal(t * V, t.exp())),
    "Multinomial": lambda t: dist.Multinomial(10, logits=t * UP),
    "MultivariateNormal": lambda t: mvn(t, 3, (2,)),
    "MultivariateStudentT": lambda t: dist.MultivariateStudentT(t.exp(), t * V, t.exp() * I3),
    "NanMaskedMultivariateNormal": lambda t: dist.NanMaskedMultivariateNormal(t * torch.ones(4, 3), t.exp() * I3 + 0.5),
    "NanMaskedNormal": lambda t: dist.NanMaskedNormal(t * V, t.exp()),
    "NegativeBinomial": lambda t: dist.NegativeBinomial(t.exp() * ONES, logits=t * V),
    "Normal": lambda t: dist.Normal(t * V, t.exp()),
    "OMTMultivariateNormal": lambda t: dist.OMTMultivariateNormal(t * ONES, t.exp() * I3),
    "OneHotCategorical": lambda t: dist.OneHotCategorical(logits=t * UP),
    "OneHotCategoricalStraightThrough": lambda t: dist.OneHotCategoricalStraightThrough(logits=t * UP),
    "OneOneMatching": lambda t: dist.OneOneMatching(t * I3),
    "OneTwoMatching": lambda t: dist.OneTwoMatching(t * torch.ones(4, 2).cumsum(0)),
    "OrderedLogistic": lambda t: dist.OrderedLogistic(t * V, UP * t.exp()),
    "Pareto": lambda t: dist.Pareto(0.1, t.exp() * ONES),
    "Poisson": lambda t: dist.Poisson(t.exp() * ONES),
    "ProjectedNormal": lambda t: dist.ProjectedNormal(t * ONES),
    "Rejector": lambda t: dist.Rejector(dist.Normal(t, 1.0), lambda x: -x.square() * t.exp(), torch.zeros(())),
    "RelaxedBernoulli": lambda t: dist.RelaxedBernoulli(t.exp(), logits=t * V),
    "RelaxedBernoulliStraightThrough": lambda t: dist.RelaxedBernoulliStraightThrough(t.exp(), logits=t * V),
    "RelaxedOneHotCategorical": lambda t: dist.RelaxedOneHotCategorical(t.exp(), logits=t * UP),
    "RelaxedOneHotCategoricalStraightThrough": lambda t: dist.RelaxedOneHotCategoricalStraightThrough(
        t.exp(), logits=t * UP
    ),
    "SineBivariateVonMises": lambda t: dist.SineBivariateVonMises(t * ONES, t, t.exp(), t.exp(), 0.1 * V),
    "SineSkewed": lambda t: dist.SineSkewed(dist.VonMises(t * V[:2], t.exp()).to_event(1), t.tanh() * V[:2]),
    "SkewLogistic": lambda t: dist.SkewLogistic(t * V, t.exp()),
    "SoftAsymmetricLaplace": lambda t: dist.SoftAsymmetricLaplace(t * V, t.exp()),
    "SoftLaplace": lambda t: dist.SoftLaplace(t * V, t.exp()),
    "SpanningTree": lambda t: dist.SpanningTree(t * torch.ones(6).cumsum(0)),
    "Stable": stable(dist.Stable),
    "StableWithLogProb": stable(dist.StableWithLogProb),
    "StudentT": lambda t: dist.StudentT(t.exp(), t * V, 1.0),
    "TransformedDistribution": lambda t: dist.TransformedDistribution(
        dist.Normal(t * V, t.exp()), [dist.transforms.ExpTransform()]
    ),
    "TruncatedPolyaGamma": lambda t: dist.TruncatedPolyaGamma(torch.ones(())),
    "Uniform": lambda t: dist.Uniform(t * ONES - 3.0, t + 3.0 * t.exp()),
    "Unit": lambda t: dist.Unit(t),
    "VonMises": lambda t: dist.VonMises(t * V, t.exp()),
    "VonMises3D": lambda t: dist.VonMises3D(t * ONES),
    "Weibull": lambda t: dist.Weibull(t.exp() * ONES, t.exp()),
    "Wishart": lambda t: dist.Wishart(tensor(4.0), t.exp() * I2),
    "ZeroInflatedDistribution": lambda t: dist.ZeroInflatedDistribution(dist.Poisson(t.exp() * ONES), gate_logits=t),
    "ZeroInflatedNegativeBinomial": lambda t: dist.ZeroInflatedNegativeBinomial(
        t.exp() * ONES, logits=t, gate_logits=t
    ),
    "ZeroInflatedPoisson": lambda t: dist.ZeroInflatedPoisson(t.exp() * ONES, gate_logits=t),
}
# Data, where Pyro draws none, or where some shall be missing.
DATA = {
    "CoalescentTimes": SHORT,
    "CoalescentTimesWithRate": SHORT,
    "GammaGaussianHMM": I2,
    "GaussianMRF": V[:2, None],
    "GroupedNormalNormal": V,
    "ImproperUniform": V,
    "LogNormalNegativeBinomial": tensor([0.0, 2.0, 5.0], dtype=D),
    "NanMaskedMultivariateNormal": tensor([[0.1, NAN, 1.0], [NAN] * 3, [0.3, 0.1, 0.2], [NAN, NAN, 2.0]], dtype=D),
    "NanMaskedNormal": tensor([0.1, NAN, 1.0], dtype=D),
    "SineBivariateVonMises": torch.stack([V, UP], -1),
    "Uniform": 0.5 * V,
    "Unit": torch.zeros(0, dtype=D),
    "VonMises3D": ONES / math.sqrt(3.0),
    "Wishart": I2 + 0.5,
}
# Densities with rules of ours, or rewritten: they are to be recorded, too.
RECORDED = {"CoalescentTimesWithRate", "DiscreteHMM", "GaussianScaleMixture", "GeneralizedPareto", "Multinomial"}
RECORDED |= {"GroupedNormalNormal", "NanMaskedMultivariateNormal", "NanMaskedNormal", "OrderedLogistic", "SineSkewed"}
RECORDED |= {"SineBivariateVonMises", "StableWithLogProb", "Uniform"}
POINTS = tensor([-0.7, -0.2, 0.1, 0.4, 0.6], dtype=D)


def classes():
    return {name for name in dist.__all__ if inspect.isclass(getattr(dist, name))}


def test_every_class_of_pyro_is_tried_or_has_a_reason():
    assert classes() == RECIPES.keys() | REASONS.keys()
    assert not RECIPES.keys() & REASONS.keys()


def not_recorded(function):
    raise RuntimeError("to record takes most of the time")


def whole(fn):
    return fn.to_event(len(fn.batch_shape))


def data_of(name):
    return DATA[name] if name in DATA else RECIPES[name](tensor(0.3)).sample()


def prior_bijection(name):
    """The latent's bijection by the number that its distribution depends on; `None` where it cannot be a latent's."""
    if name in NO_PRIOR:
        return None
    if RECIPES[name](tensor(0.3)).support.is_discrete:
        return None
    return lambda t: bijection({"name": "x", "fn": whole(RECIPES[name](t))})


@pytest.mark.parametrize("name", RECIPES)
def test_densities_are_batched_and_are_pyros(name, monkeypatch):
    if name not in RECORDED:
        monkeypatch.setattr("pyro_nf.approximations.density.record", not_recorded)
    data, to_support = data_of(name), prior_bijection(name)
    make = RECIPES[name]

    def model():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        if to_support is not None:
            pyro.sample("x", whole(make(t)))
        pyro.sample("y", whole(make(t)), obs=data)

    def plain(point):
        t = point[0]
        total = dist.Normal(0.0, 1.0).log_prob(t) + whole(make(t)).log_prob(data)
        if to_support is not None:
            transform = to_support(t)
            u = point[1:].reshape(transform.inverse_shape(whole(make(t)).shape()))
            x = transform(u)
            total = total + transform.log_abs_det_jacobian(u, x).sum() + whole(make(t)).log_prob(x)
        return total

    def slope(point):
        if name == "GaussianScaleMixture":  # Pyro's has no gradient
            return (plain(point + 1e-5) - plain(point - 1e-5)).reshape(1) / 2e-5
        point = point.clone().requires_grad_()
        return torch.autograd.grad(plain(point), point)[0]

    shape = whole(make(tensor(0.3))).shape()
    dim = 0 if to_support is None else to_support(tensor(0.3)).inverse_shape(shape).numel()
    points = torch.cat([POINTS[:, None], 0.5 * torch.randn(len(POINTS), dim)], 1)
    density = Density(model_log_density(model), 2**17)
    gradients, values = density.gradients(points)
    assert density.vectorized
    assert (density.work > 0) == (name in RECORDED)
    torch.testing.assert_close(values, torch.stack([plain(point) for point in points]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradients, torch.stack([slope(point) for point in points]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - NO_DRAWS.keys()))
@pytest.mark.filterwarnings("error")
def test_draws_are_batched(name):
    def model():
        pyro.sample("x", whole(RECIPES[name](pyro.sample("t", dist.Normal(0.0, 0.5)))))

    program = Program(model, prior(model))
    draws = program.bind().vmap_in_chunks(lambda p: {"x": p.guide.nodes["x"]["value"]}, 8)["x"]
    assert program.vectorized
    assert draws.shape[1:] == whole(RECIPES[name](tensor(0.3))).shape()
    if name not in ("Delta", "Unit"):
        assert (draws != draws[0]).any()


@pytest.mark.parametrize("name", sorted(NO_PRIOR.keys() - {"Delta", "Empirical", "GroupedNormalNormal", "Unit"}))
def test_a_latent_without_a_bijection_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"site 'x' has (support|a distribution that declares no)"):
        bijection({"name": "x", "fn": RECIPES[name](tensor(0.3))})


def both(function, points):
    """Values and gradients of a function under the mode: for all points at once, and one by one."""

    def run(point):
        with Batchable():
            return function(point)

    batched = torch.func.vmap(torch.func.grad_and_value(run))(points)
    singly = zip(*[torch.func.grad_and_value(run)(point) for point in points], strict=True)
    return batched, tuple(map(torch.stack, singly))


def filled(t):
    x = torch.zeros(4)
    same = [x]
    for i in range(1, 4):
        x[i] = t * i + x[i - 1]
    return (x * same[0]).sum()


def added(t):
    x = torch.ones(3)
    x += t
    x.mul_(t)
    return x.prod()


def scattered(t):
    x = t.new_zeros(3)
    x.scatter_add_(0, tensor([0, 2, 2]), t * torch.arange(3.0))
    return x.square().sum()


def copied(t):
    x = V.clone()
    x[1:] = t * V[:2]
    x[MASK] = 2.0
    return (x * t).sum()


def masked_rows(t):
    x = t * torch.ones(3, 2)
    x[MASK] = 2.0
    return x.square().sum()


def through_data(t):
    x = t.sin()
    x.data.clamp_(max=0.1)
    return x * t


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        ctx.save_for_backward(x, x.exp())
        return x.exp() * factor, x

    @staticmethod
    def backward(ctx, first, second):
        x, exp = ctx.saved_tensors
        assert ctx.needs_input_grad == (True, False)
        return first * exp * ctx.factor + second * x / x, None


def old_style(t):
    one, other = OldStyle.apply(t, 3.0)
    return one * other


WRITES = [filled, added, scattered, copied, masked_rows, through_data, old_style]


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_what_a_model_does_with_tensors_is_batched(function):
    data = V.clone()
    batched, singly = both(function, POINTS)
    torch.testing.assert_close(batched, singly)
    assert torch.equal(V, data)


def seen_by_a_view(t):
    x = torch.zeros(3)
    view = x[1:]
    x[1] = t
    return view.sum()


def written_into_data(t):
    V[0] = t
    return V.sum()


@pytest.mark.parametrize("function", [seen_by_a_view, written_into_data])
def test_what_others_hold_is_not_replaced(function):
    held = V.clone()
    with Batchable(), pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(POINTS)
    assert torch.equal(V, held)


def test_the_rewrites_last_no_longer_than_the_mode():
    before = [dist.NanMaskedNormal.log_prob, torch.autograd.Function.apply, dist.VonMises.sample]
    with Batchable():
        assert dist.NanMaskedNormal.log_prob is not before[0]
        with pytest.raises(ZeroDivisionError), Batchable():
            raise ZeroDivisionError
        assert dist.NanMaskedNormal.log_prob is not before[0]
    assert [dist.NanMaskedNormal.log_prob, torch.autograd.Function.apply, dist.VonMises.sample] == before


class Linear(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](2, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0 * ONES[0], ONES[0]).expand([1, 2]).to_event(2))

    def forward(self):
        pyro.sample("y", dist.Normal(self.layer(I2).squeeze(-1), 1.0).to_event(1), obs=V[:2])


def reads(number):
    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(beta * number(beta), 1.0).to_event(1), obs=V[:2])

    return model


WEIGHT = torch.nn.Parameter(tensor(2.0))


@pytest.mark.parametrize(
    ("model", "batched", "recorded"),
    [
        (Linear(), True, True),
        (reads(lambda _: tensor(2.0).item()), True, True),
        (reads(lambda _: float(V.mean())), True, True),
        (reads(lambda _: int(V.abs().max())), True, True),
        (reads(lambda _: (V * 2).tolist()[0]), True, True),
        (reads(lambda _: 2.0 if (V > 0).any() else 3.0), True, True),
        (reads(lambda _: [1.0, 2.0, 3.0][tensor([0, 1]).sum()]), True, True),
        (reads(lambda _: (WEIGHT * 2).item()), True, False),  # may be trained
        (reads(lambda _: torch.rand(()).item()), False, False),  # another number for each draw
        (reads(lambda beta: beta.detach().sum().item()), False, False),
    ],
)
def test_numbers_that_do_not_depend_on_the_draw_stop_nothing(model, batched, recorded):
    if isinstance(model, PyroModule):
        pyro.poutine.trace(model.double()).get_trace()  # which makes its parameters
    density = Density(model_log_density(model), 2**17)
    points = torch.randn(5, 2)
    gradients, _ = density.gradients(points)
    assert density.vectorized == batched
    assert (density.work > 0) == recorded
    assert gradients.isfinite().all()


@pytest.mark.parametrize("alpha", [0.7, 0.96, 1.0, 1.03, 1.8])
@pytest.mark.parametrize("skew", [-0.6, 0.0, 0.9])
def test_stable_densities_near_their_holes_are_pyros(alpha, skew):
    z = tensor([-4.0, -0.01, 0.0, 0.02, 0.3, 7.0]) - skew * math.tan(math.pi / 2 * alpha) * (abs(alpha - 1) > 0.05)
    stable = dist.Stable(tensor(alpha), tensor(skew))
    wanted = stable.log_prob(z)
    with Batchable():
        torch.testing.assert_close(torch.func.vmap(stable.log_prob)(z), wanted, rtol=1e-9, atol=1e-9)
        if alpha != 1.0:
            other = dist.Stable(tensor(alpha), tensor(skew), coords="S")
            shifted = z + skew * math.tan(math.pi / 2 * alpha)
            torch.testing.assert_close(other.log_prob(shifted), wanted, rtol=1e-8, atol=1e-8)


def test_draws_of_stable_near_their_hole_are_pyros():
    pyro.set_rng_seed(0)
    stable = dist.Stable(tensor([0.995, 1.5]), tensor(0.5), coords="S")
    wanted = stable.rsample((3,))
    pyro.set_rng_seed(0)
    with Batchable():
        torch.testing.assert_close(stable.rsample((3,)), wanted)


@pytest.mark.filterwarnings("ignore:SineBivariateVonMises bimodal")
def test_a_sine_model_is_normalized_at_any_concentration_that_pyro_takes():
    grid = torch.linspace(-math.pi, math.pi, 401)[:-1]
    angles = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    with Batchable():
        for a, b, c in [(0.01, 0.02, 0.0), (3.0, 2.0, 5.0), (200.0, 100.0, -50.0)]:  # the second has two modes
            density = dist.SineBivariateVonMises(0.0, 1.0, a, b, c, validate_args=False).log_prob(angles).exp()
            assert float(density.sum() * (2 * math.pi / 400) ** 2) == pytest.approx(1.0, abs=1e-6)
        narrow = dist.SineBivariateVonMises(0.0, 0.0, tensor(9000.0), tensor(9000.0), tensor(0.0))
        assert float(narrow.log_prob(torch.zeros(2))) == pytest.approx(math.log(9000 / (2 * math.pi)), abs=1e-3)
        refused = torch.func.vmap(
            lambda a: dist.SineBivariateVonMises(0.0, 0.0, a, a, tensor(0.0)).log_prob(torch.zeros(2))
        )(tensor([1.0, 20_000.0]))
    assert refused.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", ["NanMaskedNormal", "NanMaskedMultivariateNormal"])
def test_missing_data_inside_plates_masks_and_events(name):
    """The plates' scale and mask apply as for other distributions."""
    data = DATA[name]

    def model():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        fn = RECIPES[name](t)
        with pyro.plate("rows", len(data)), pyro.poutine.mask(mask=torch.arange(len(data)) > 0):
            pyro.sample("y", fn, obs=data)
        pyro.sample("z", fn.to_event(1), obs=data)

    density = Density(model_log_density(model), 2**17)
    gradients, values = density.gradients(POINTS[:, None])
    assert density.vectorized
    assert gradients.isfinite().all()
    for t, value in zip(POINTS, values, strict=True):
        rows = RECIPES[name](t).log_prob(data)
        assert float(value) == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(t) + rows[1:].sum() + rows.sum()))


def test_an_interval_whose_bound_is_infinite_for_some_entries():
    support = dist.constraints.interval(-1.0, tensor([2.0, math.inf]))
    transform = bijection({"name": "x", "fn": dist.ImproperUniform(support, (2,), ())})
    u = torch.randn(5, 2, requires_grad=True)
    x = transform(u)
    assert support.check(x).all()
    torch.testing.assert_close(transform.inv(x), u)
    (slopes,) = torch.autograd.grad(x.sum(), u)
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, x), slopes.log())


class Asking(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) * float(self.loc.max() > -100.0)


@pytest.mark.parametrize(
    ("fn", "who"),
    [
        (lambda z: Asking(z, 1.0).expand([2]).to_event(1), "Asking at site 'y'"),
        (lambda z: dist.Rejector(dist.Normal(z, 1.0), lambda x: -(x + z).square(), tensor(0.0)), "pyro's Rejector"),
        (lambda z: dist.Normal(1.0 if z > 0 else 2.0, 1.0), "the model"),
    ],
)
def test_who_cannot_be_batched_is_named(fn, who):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", fn(z), obs=torch.zeros(2) if who[0] == "A" else tensor(0.0))

    program = Program(model, prior(model))
    with pytest.warns(UserWarning, match=f"{who}.* cannot be batched over draws.* runs them one by one"):
        program.bind().vmap_in_chunks(lambda p: {"log_p": log_prob_sum(p.model)}, 3)
    assert not program.vectorized
