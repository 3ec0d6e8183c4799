"""Every support of a continuous site: exactly known targets, recovered through an AutoFlow."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.programs.supports import bijection

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart, which repairs it

GAMMA = dist.Gamma(3.0, 2.0)
NORMAL = dist.Normal(1.0, 2.0)
WISHART = dist.Wishart(torch.tensor(6.0), torch.eye(2))


def lower(matrix):
    rows, columns = torch.tril_indices(*matrix.shape[-2:])
    return matrix[..., rows, columns]


def cholesky_factor_log_prob(factor):
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    order = torch.arange(factor.shape[-1], 0, -1)
    return WISHART.log_prob(factor @ factor.mT) + (order * diagonal.log()).sum(-1) + 2 * math.log(2)


def fill(entries, dim, mirror=False, unit=False):
    offset = -1 if unit else 0
    rows, columns = torch.tril_indices(dim, dim, offset)
    matrix = entries.new_zeros(*entries.shape[:-1], dim, dim)
    matrix[..., rows, columns] = entries
    return matrix + matrix.tril(-1).mT if mirror else matrix + torch.eye(dim) * unit


def lkj_factor(n):
    """Draws of LKJCholesky(3, 2), from partial correlations: torch's own sampler is wrong beyond two dimensions."""
    first, second = 2 * dist.Beta(2.5, 2.5).sample((2, n)) - 1
    partial = 2 * dist.Beta(2.0, 2.0).sample((n,)) - 1
    rest, zero = (1 - second.square()).sqrt(), torch.zeros(n)
    entries = [
        zero + 1, zero, zero,
        first, (1 - first.square()).sqrt(), zero,
        second, partial * rest, (1 - partial.square()).sqrt() * rest,
    ]  # fmt: skip
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def squared(factor):
    return factor @ factor.mT


# {support: (shape of a value, its log density up to a constant, n independent draws)}
TARGETS = {
    "real": (constraints.real, (), NORMAL.log_prob, lambda n: NORMAL.sample((n,))),
    "positive": (constraints.positive, (), GAMMA.log_prob, lambda n: GAMMA.sample((n,))),
    "nonnegative": (constraints.nonnegative, (), GAMMA.log_prob, lambda n: GAMMA.sample((n,))),
    "softplus_positive": (constraints.softplus_positive, (), GAMMA.log_prob, lambda n: GAMMA.sample((n,))),
    "greater_than": (
        constraints.greater_than(2.0),
        (),
        lambda x: GAMMA.log_prob(x - 2),
        lambda n: GAMMA.sample((n,)) + 2,
    ),
    "greater_than_eq": (
        constraints.greater_than_eq(2.0),
        (),
        lambda x: GAMMA.log_prob(x - 2),
        lambda n: GAMMA.sample((n,)) + 2,
    ),
    "less_than": (constraints.less_than(2.0), (), lambda x: GAMMA.log_prob(2 - x), lambda n: 2 - GAMMA.sample((n,))),
    "interval to infinity": (
        constraints.interval(torch.tensor(2.0), torch.tensor(math.inf)),
        (),
        lambda x: GAMMA.log_prob(x - 2),
        lambda n: GAMMA.sample((n,)) + 2,
    ),
    "unit_interval": (
        constraints.unit_interval,
        (),
        dist.Beta(2.0, 3.0).log_prob,
        lambda n: dist.Beta(2.0, 3.0).sample((n,)),
    ),
    "interval": (constraints.interval(-1.0, 3.0), (), lambda x: 0 * x, lambda n: 4 * torch.rand(n) - 1),
    "half_open_interval": (
        constraints.half_open_interval(-1.0, 3.0),
        (),
        lambda x: 0 * x,
        lambda n: 4 * torch.rand(n) - 1,
    ),
    "simplex": (
        constraints.simplex,
        (3,),
        dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).log_prob,
        lambda n: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((n,)),
    ),
    "ordered_vector": (
        constraints.ordered_vector,
        (2,),
        lambda x: -0.5 * x.square().sum(-1),
        lambda n: torch.randn(n, 2).sort(-1)[0],  # means -.56419 and .56419
    ),
    "positive_ordered_vector": (
        constraints.positive_ordered_vector,
        (2,),
        lambda x: GAMMA.log_prob(x).sum(-1),
        lambda n: GAMMA.sample((n, 2)).sort(-1)[0],
    ),
    "corr_cholesky": (
        constraints.corr_cholesky,
        (3, 3),
        dist.LKJCholesky(3, 2.0).log_prob,
        lkj_factor,
    ),
    "corr_matrix": (
        constraints.corr_matrix,
        (3, 3),
        lambda x: torch.logdet(x),  # LKJ(2)
        lambda n: squared(lkj_factor(n)),
    ),
    "positive_definite": (constraints.positive_definite, (2, 2), WISHART.log_prob, lambda n: WISHART.sample((n,))),
    "positive_semidefinite": (
        constraints.positive_semidefinite,
        (2, 2),
        WISHART.log_prob,
        lambda n: WISHART.sample((n,)),
    ),
    "lower_cholesky": (
        constraints.lower_cholesky,
        (2, 2),
        cholesky_factor_log_prob,
        lambda n: torch.linalg.cholesky(WISHART.sample((n,))),
    ),
    "softplus_lower_cholesky": (
        constraints.softplus_lower_cholesky,
        (2, 2),
        cholesky_factor_log_prob,
        lambda n: torch.linalg.cholesky(WISHART.sample((n,))),
    ),
    "unit_lower_cholesky": (
        constraints.unit_lower_cholesky,
        (2, 2),
        lambda x: NORMAL.log_prob(x[..., 1, 0]),
        lambda n: fill(NORMAL.sample((n, 1)), 2, unit=True),
    ),
    "lower_triangular": (
        constraints.lower_triangular,
        (2, 2),
        lambda x: NORMAL.log_prob(lower(x)).sum(-1),
        lambda n: fill(NORMAL.sample((n, 3)), 2),
    ),
    "symmetric": (
        constraints.symmetric,
        (2, 2),
        lambda x: NORMAL.log_prob(lower(x)).sum(-1),
        lambda n: fill(NORMAL.sample((n, 3)), 2, mirror=True),
    ),
    "square": (
        constraints.square,
        (2, 2),
        lambda x: NORMAL.log_prob(x).sum((-2, -1)),
        lambda n: NORMAL.sample((n, 2, 2)),
    ),
    "independent": (
        constraints.independent(constraints.positive, 1),
        (2,),
        lambda x: GAMMA.log_prob(x).sum(-1),
        lambda n: GAMMA.sample((n, 2)),
    ),
    "cat": (
        constraints.independent(constraints.cat([constraints.real, constraints.positive], -1, [1, 2]), 1),
        (3,),
        lambda x: NORMAL.log_prob(x[..., 0]) + GAMMA.log_prob(x[..., 1:]).sum(-1),
        lambda n: torch.cat([NORMAL.sample((n, 1)), GAMMA.sample((n, 2))], -1),
    ),
    "stack": (
        constraints.stack([constraints.real, constraints.positive], -1),
        (2,),
        lambda x: NORMAL.log_prob(x[..., 0]) + GAMMA.log_prob(x[..., 1]),
        lambda n: torch.stack([NORMAL.sample((n,)), GAMMA.sample((n,))], -1),
    ),
}
# Fitted together: one flow over sites that are independent of each other.
GROUPS = [
    ["real", "positive", "nonnegative", "softplus_positive"],
    ["greater_than", "greater_than_eq", "less_than", "interval to infinity"],
    ["unit_interval", "interval", "half_open_interval", "simplex"],
    ["ordered_vector", "positive_ordered_vector", "corr_cholesky"],
    ["corr_matrix", "positive_definite", "positive_semidefinite"],
    ["lower_cholesky", "softplus_lower_cholesky", "unit_lower_cholesky", "lower_triangular"],
    ["symmetric", "square", "independent"],
    ["cat", "stack"],
]
NUM_DRAWS = 10_000


def improper(name):
    support, shape, log_prob, _ = TARGETS[name]
    value = pyro.sample(name, dist.ImproperUniform(support, (), shape))
    pyro.factor(f"{name}_density", log_prob(value))


def errors(draws, reference):
    """Errors of mean and standard deviation in Monte Carlo standard errors of as many independent draws."""
    draws, reference = (x.reshape(len(x), -1).double() for x in (draws, reference))
    sd = reference.std(0)
    free = sd > 1e-6  # not the zeros and ones of a matrix
    draws, reference, sd = draws[:, free], reference[:, free], sd[free]
    kurtosis = ((reference - reference.mean(0)) / sd).pow(4).mean(0)
    noise = math.sqrt(1 / len(draws) + 1 / len(reference))
    mean = (draws.mean(0) - reference.mean(0)) / (sd * noise)
    spread = (draws.std(0) - sd) / (sd * (kurtosis - 1).sqrt() / 2 * noise)
    return float(mean.abs().max()), float(spread.abs().max())


def fit_and_compare(names, **options):
    def model():
        for name in names:
            improper(name)

    guide = AutoFlow(model)
    FlowSVI(model, guide, seed=0, progress=False, **options).run()
    draws = guide.sample_posterior(NUM_DRAWS)
    return {name: errors(draws[name], TARGETS[name][3](400_000)) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_raw_draws_have_the_targets_mean_and_sd_within_three_mcse(names):
    found = fit_and_compare(names, max_steps=3000)
    print(found)
    assert all(max(pair) < 3 for pair in found.values()), found


@pytest.mark.slow
def test_conjugate_posteriors_are_recovered_within_three_mcse():
    outcomes, events, successes = torch.tensor([0] * 3 + [2] * 5), torch.tensor([2.0, 4.0, 1.0]), torch.tensor(7.0)
    known = {
        "probs": dist.Dirichlet(1.0 + outcomes.bincount()),
        "rate": dist.Gamma(2 + events.sum(), 1.0 + len(events)),
        "share": dist.Beta(2 + successes, 3 + 10 - successes),
        "angle": dist.VonMises(1.0, 2.0),
    }

    def model():
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("trials", 8):  # of Multinomial's density vmap makes nothing
            pyro.sample("outcomes", dist.Categorical(probs), obs=outcomes)
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("days", 3):
            pyro.sample("events", dist.Poisson(rate), obs=events)
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        pyro.sample("successes", dist.Binomial(10, share), obs=successes)
        pyro.sample("angle", dist.VonMises(1.0, 2.0))

    guide = AutoFlow(model)
    FlowSVI(model, guide, seed=0, progress=False, max_steps=3000).run()
    draws = guide.sample_posterior(NUM_DRAWS)
    found = {name: errors(draws[name], fn.sample((400_000,))) for name, fn in known.items()}
    print(found)
    assert all(max(pair) < 3 for pair in found.values()), found


def free_entries(name, value):
    """As many entries of a value as determine it, those that its density counts."""
    if name == "simplex":
        return value[..., :-1]
    if name == "square" or value.dim() < 2:
        return value.reshape(-1)
    offset = -1 if name in ("corr_matrix", "corr_cholesky", "unit_lower_cholesky") else 0
    rows, columns = torch.tril_indices(*value.shape[-2:], offset)
    return value[..., rows, columns]


@pytest.mark.parametrize("name", TARGETS)
def test_the_bijection_stays_in_the_support_and_states_its_log_determinant(name, float64):
    support, shape, _, _ = TARGETS[name]
    transform = bijection({"name": name, "fn": dist.ImproperUniform(support, (), shape)})
    x = torch.randn(transform.inverse_shape(shape))
    value = transform(x)
    assert value.shape == shape
    assert support.check(value).all()
    assert torch.allclose(transform.inv(value), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: free_entries(name, transform(x)), x)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]
    assert torch.allclose(transform.log_abs_det_jacobian(x, value).sum(), expected, atol=1e-8)
    batch = torch.randn(4, 3, *x.shape)
    batched = torch.func.vmap(torch.func.vmap(transform))(batch)
    assert torch.allclose(transform(batch), batched)
    assert torch.allclose(
        transform.log_abs_det_jacobian(batch, batched)[1, 2].sum(),
        transform.log_abs_det_jacobian(batch[1, 2], batched[1, 2]).sum(),
    )


def test_improper_priors_of_many_supports_start_and_fit():
    names = ["ordered_vector", "positive_definite"]
    found = fit_and_compare(names, max_steps=150, learning_rate=0.02, num_particles=32, compile=False)
    # In 150 steps to within a quarter of a standard deviation.
    assert all(mean < 25 for mean, _ in found.values()), found


@pytest.mark.parametrize(
    "fn",
    [
        dist.VonMises(3.0, 0.5),
        dist.VonMises(torch.zeros(2), 1.0).to_event(1),
        dist.SineSkewed(dist.VonMises(torch.zeros(2), 1.0).to_event(1), torch.tensor([0.3, 0.1])),
    ],
)
def test_angles_come_from_one_turn_of_the_circle(fn):
    # On the whole line, which torch calls their support, a periodic density has no integral and the ELBO no bound.
    def model():
        pyro.sample("angle", fn)

    draws = AutoFlow(model, init_scale=5.0).sample_posterior(1000)["angle"]
    assert float(draws.abs().max()) <= math.pi + 1e-6
    assert float(draws.max() - draws.min()) > 6.0


def test_mixtures_and_pareto():
    def model():
        components = dist.Gamma(torch.tensor([1.0, 5.0]), 1.0)
        pyro.sample("mixture", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
        pyro.sample("excess", dist.Pareto(1.0, 3.0))

    guide = AutoFlow(model)
    draws = guide.sample_posterior(100)
    assert (draws["mixture"] > 0).all()
    assert torch.isfinite(guide.log_prob(draws)).all()


def test_bad_input_gets_a_sentence():
    def spherical():
        pyro.sample("direction", dist.ProjectedNormal(torch.ones(2)))

    def moving():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(0.0, top))

    def fickle():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z < 0.05:
            pyro.sample("sometimes", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="models with fixed sites; 'sometimes' comes and goes"):
        AutoFlow(fickle)()
    with pytest.raises(ValueError, match=r"'direction' has support Sphere.*ProjectedNormalReparam"):
        AutoFlow(spherical)()
    with pytest.raises(ValueError, match="support is fixed; that of 'z' depends on other latents"):
        AutoFlow(moving)()
