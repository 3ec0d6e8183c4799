"""The model that is fitted is the one that was given, whichever the guide was made of."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.reparam import LocScaleReparam

from pyro_nf.approximations.pairs import paired_density
from pyro_nf.diagnostics import corrected_posterior, diagnose
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AmortizedFlow, AutoFlow, StructuredFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.programs.program import Program

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])
SINGLE = {"learning_rate": 0.05, "max_steps": 250, "num_particles": 32, "eval_particles": 100, "compile": False}
FEW = SINGLE | {"learning_rate": 1e-4, "max_steps": 2}


def model(y, shift=0.0, sd=5.0):
    mu = pyro.sample("mu", dist.Normal(0.0, sd))
    with pyro.plate("d", len(y)):
        pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)


def affine(dim):
    return ElementwiseAffine(dim)


def moments(guide):
    draws = guide.sample_posterior(20_000, Y)["mu"]
    return [float(draws.mean()), float(draws.std())]


def exact(precision, weighted_sum):
    return pytest.approx([weighted_sum / precision, precision**-0.5], abs=0.03)


GIVEN = {
    "scale": (poutine.scale(model, 0.1), exact(0.1 * 5.04, 0.1 * 9.0)),
    "other": (lambda y: model(y, shift=-3.0), exact(5.04, 24.0)),
    "prior": (lambda y: model(y, sd=0.5), exact(9.0, 9.0)),
    "mask of some": (
        lambda y: poutine.condition(model_of_y, {"y": y})(torch.tensor([True, True, False, False, False])),
        exact(2.04, 3.0),
    ),
}


def model_of_y(mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("d", 5), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(mu, 1.0))


@pytest.mark.parametrize("name", ["scale", "other", "prior", "mask of some"])
def test_stages_fit_the_given_model(name):
    given, truth = GIVEN[name]
    guide = AutoFlow(model)
    result = FlowSVI(given, guide, seed=0, progress=False).run(Y)
    assert result.converged
    assert [stage.name for stage in result.stages] == ["normal"]
    assert moments(guide) == truth
    found = diagnose(given, guide, Y, num_samples=1000, num_sets=1, num_starts=2)
    assert found.elbo == pytest.approx(result.elbo, abs=0.02)
    assert found.log_evidence - found.elbo < 0.01


def test_a_warm_start_and_a_single_stage_fit_the_given_model():
    given, truth = GIVEN["scale"]
    guide = AutoFlow(model, affine)
    result = FlowSVI(given, guide, num_starts=2, seed=0, progress=False, **FEW).run(Y)
    assert result.starts.modes[0].loc == pytest.approx(9 / 5.04, abs=0.01)
    assert float(result.starts.modes[0].scale_tril) == pytest.approx(0.504**-0.5, abs=0.01)
    assert moments(guide) == truth


def test_latents_in_another_order_are_matched_by_name():
    def one():
        pyro.sample("a", dist.Normal(torch.tensor([1.0, 2.0]), 0.1).to_event(1))
        pyro.sample("b", dist.LogNormal(3.0, 0.1))
        pyro.sample("c", dist.LogNormal(torch.zeros(2), 0.2).to_event(1))

    def other():
        pyro.sample("c", dist.LogNormal(torch.zeros(2), 0.2).to_event(1))
        pyro.sample("b", dist.LogNormal(3.0, 0.1))
        pyro.sample("a", dist.Normal(torch.tensor([1.0, 2.0]), 0.1).to_event(1))

    guide = AutoFlow(one)
    guide()
    points = torch.randn(3, 5)
    paired = paired_density(Program(other, guide).bind())
    torch.testing.assert_close(paired.values(points), guide.density().values(points))
    FlowSVI(other, guide, seed=0, progress=False).run()
    draws = guide.sample_posterior(2000)
    torch.testing.assert_close(draws["a"].mean(0), torch.tensor([1.0, 2.0]), atol=0.02, rtol=0)
    assert float(draws["b"].log().mean()) == pytest.approx(3.0, abs=0.02)


def of_support(y):
    mu = pyro.sample("mu", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)


def of_bounds(y):
    mu = pyro.sample("mu", dist.Uniform(-1.0, y.max()))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)


def of_shape(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)


def of_more(y):
    model(y + pyro.sample("nu", dist.Normal(0.0, 1.0)))


def of_none(y):
    pyro.sample("nu", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("options", [{}, FEW, FEW | {"num_starts": 2}], ids=["stages", "single", "starts"])
@pytest.mark.parametrize(
    ("own", "given", "said"),
    [
        (model, poutine.condition(model, {"mu": torch.tensor(0.0)}), "no latent variables"),
        (
            of_more,
            poutine.condition(of_more, {"mu": torch.tensor(0.0)}),
            "the guide samples 'mu', which the model observes",
        ),
        (of_more, model, "the guide samples 'nu', which the model does not"),
        (model, of_none, "guide has no site for the model's latent 'nu'"),
        (model, of_support, r"'mu' has the support Real\(\) in the guide and GreaterThan.* in the model"),
        (model, of_bounds, r"'mu' has the support Real\(\) in the guide and Interval.* in the model"),
        (model, of_shape, "'mu' has 1 event dimensions in the model and 0 in the guide"),
        (
            model,
            poutine.reparam(model, {"mu": LocScaleReparam(0.0)}),
            "guide has no site for the model's latent 'mu_decentered'",
        ),
    ],
    ids=["condition", "condition of one", "fewer", "others", "support", "bounds", "shape", "reparam"],
)
def test_a_model_with_other_latents_is_refused(own, given, said, options):
    with pytest.raises(ValueError, match=said):
        FlowSVI(given, AutoFlow(own), progress=False, **options).run(Y)


def test_an_intervention_leaves_a_latent_its_prior():
    given = poutine.do(of_more, {"mu": torch.tensor(0.0)})
    guide = AutoFlow(of_more)
    assert FlowSVI(given, guide, seed=0, progress=False).run(Y).converged
    assert moments(guide) == pytest.approx([0.0, 5.0], abs=0.1)
    # y - nu ~ N(0, 1), nu ~ N(0, 1), as the model has y + nu for its data
    nu = guide.sample_posterior(20_000, Y)["nu"]
    assert [float(nu.mean()), float(nu.std())] == pytest.approx([-9 / 6, 6**-0.5], abs=0.03)


def test_bounds_that_data_have_moved_are_refused():
    guide = AutoFlow(of_bounds)
    guide(Y)
    with pytest.raises(ValueError, match=r"'mu' has the support Interval.* in the guide and Interval.* in the model"):
        FlowSVI(of_bounds, guide, progress=False).run(Y + 1)


def local(y, shift=0.0):
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + shift, 1.0).expand([len(y)]), obs=y)


def both(y, shift=0.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("d", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 0.1))
        pyro.sample("y", dist.Normal(z + shift, 1.0), obs=y)


class Rows(torch.nn.Linear):
    def forward(self, y):
        return super().forward(y[:, None])


def listed(own):
    guide = AutoGuideList(own)
    guide.append(AutoFlow(own, affine))
    return guide


@pytest.mark.parametrize(
    ("own", "make", "site"),
    [
        (local, lambda own: AmortizedFlow(own, Rows(1, 2), None), "z"),
        (both, lambda own: StructuredFlow(own, {"d": Rows(1, 2)}, affine), "mu"),
        (model, listed, "mu"),
    ],
    ids=["amortized", "structured", "list"],
)
def test_other_guides_fit_the_given_model(own, make, site):
    guide = make(own)
    options = SINGLE | {"learning_rate": 0.2, "max_steps": 60, "num_particles": 8}
    FlowSVI(lambda y: own(y, shift=10.0), guide, seed=0, progress=False, **options).run(Y)
    draws = torch.stack([guide(Y)[site].detach().mean() for _ in range(50)])
    assert float(draws.mean()) < -1.0  # of the guide's own model it would be above 0.5


def test_diagnosis_and_correction_are_of_the_given_model():
    given, _ = GIVEN["other"]
    guide = AutoFlow(model, init_scale=0.6, init_loc_fn=lambda site: torch.tensor(24 / 5.04))
    guide(Y)
    found = diagnose(given, guide, Y, num_samples=2000, num_sets=1, num_starts=2)
    evidence = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 25.0).log_prob(Y + 3)
    assert found.log_evidence == pytest.approx(float(evidence), abs=0.05)
    draws = corrected_posterior(given, guide, Y, num_samples=4000)
    draws = draws["mu"] if isinstance(draws, dict) else draws.draws["mu"]
    assert float(draws.mean()) == pytest.approx(24 / 5.04, abs=0.05)
    assert math.isclose(float(draws.std()), 5.04**-0.5, rel_tol=0.1)
