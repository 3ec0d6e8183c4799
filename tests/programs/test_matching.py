"""Guides that are not of their model: as Pyro's ELBOs warn or raise, and no diagnosis of them."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as auto
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_nf.diagnostics import calibrate, corrected_posterior, diagnose, local_evidence, to_arviz
from pyro_nf.flows import ElementwiseAffine
from pyro_nf.guides import AmortizedFlow, AutoFlow, StructuredFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.programs.matching import require_match, require_weights, warn_of_mismatches
from pyro_nf.programs.program import Program

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 0.5])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def right(y):
    pyro.sample("mu", dist.Normal(y.mean(), 0.6))
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


def with_latent(y):
    pyro.sample("typo", dist.Normal(0.0, 1.0))
    right(y)


def with_discrete_latent(y):
    pyro.sample("typo", dist.Bernoulli(0.5))
    right(y)


def with_data(y):
    right(y)
    pyro.sample("y", dist.Normal(torch.zeros(5), 1.0).to_event(1))


def with_observed_data(y):
    right(y)
    pyro.sample("y", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=y)


def with_own_data(y):
    right(y)
    pyro.sample("typo", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))


WRONG = {
    with_latent: "the guide samples 'typo', which the model does not",
    with_discrete_latent: "the guide samples 'typo', which the model does not",
    with_data: "the guide samples 'y', which the model observes",
    with_observed_data: "the guide observes 'y', and a guide has no data",
    with_own_data: "the guide observes 'typo', and a guide has no data",
}


def with_mark(y):
    pyro.sample("mu", dist.Normal(y.mean(), 0.6), infer={"is_auxiliary": True})
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


def with_plate(y):
    pyro.sample("mu", dist.Normal(y.mean(), 0.6))
    with pyro.plate("another", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


HARMLESS = {with_mark: "the guide marks 'mu' as auxiliary", with_plate: "the guide has plate 'another'"}


def pyro_says(guide):
    """What Pyro's own ELBO says of the pair: a warning or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).loss(model, guide, Y)
        except (RuntimeError, ValueError) as error:
            return [str(error)]
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("guide", WRONG, ids=lambda guide: guide.__name__)
def test_what_spoils_weights_is_warned_of_and_not_diagnosed(guide):
    assert pyro_says(guide)
    with pytest.warns(UserWarning, match=WRONG[guide]):
        ELBO(num_particles=4).loss(model, guide, Y)
    for verb in (diagnose, corrected_posterior, to_arviz, local_evidence):
        with pytest.raises(ValueError, match=f"guide and model do not match: {WRONG[guide]}"):
            verb(model, guide, Y, progress=False)


@pytest.mark.parametrize("guide", HARMLESS, ids=lambda guide: guide.__name__)
def test_what_weights_do_not_mind_is_warned_of(guide):
    assert pyro_says(guide)
    program = Program(model, guide)
    with pytest.warns(UserWarning, match=HARMLESS[guide]):
        warn_of_mismatches(program.bind(Y))
    require_weights(program.bind(Y))


def test_each_objective_says_it_once_and_a_fit_too():
    objective = ELBO(num_particles=4)
    with pytest.warns(UserWarning, match="which the model does not"):
        objective.loss(model, with_latent, Y)
    objective.loss(model, with_latent, Y)

    def trained(y):
        pyro.sample("typo", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
        right(y)

    options = {"max_steps": 2, "eval_every": 1, "learning_rate": 0.01, "num_particles": 2, "eval_particles": 2}
    with pytest.warns(UserWarning, match="which the model does not") as caught:
        FlowSVI(model, trained, **options, compile=False, progress=False).run(Y)
    assert len(caught) == 1


def sampled(name, fn, rows=None):
    """`right`, but for one site."""

    def guide(y):
        for each, usual in (("mu", dist.Normal(y.mean(), 0.6)), ("z", dist.Normal(y, 0.7))):
            with pyro.plate("rows", rows or len(y)) if each == "z" else poutine.trace():
                pyro.sample(each, fn if each == name else usual)

    return guide


def of_param(y):
    pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


def of_deterministic(y):
    pyro.deterministic("mu", y.mean())
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


def of_observed(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0), obs=y.mean())
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(y, 0.7))


def of_other_dimension(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), dim=-2):
        pyro.sample("z", dist.Normal(y[:, None], 0.7))


def of_another_plate(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("others", 4):
        pyro.sample("z", dist.Normal(0.0, 0.7))


def of_events(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(y, 0.7).to_event(1))


def of_factor(y):
    right(y)
    pyro.factor("log_det", torch.tensor(0.5))


CLASHES = {
    "a vector for a number": (sampled("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1)), "'mu' has 0 event dim"),
    "several for one": (sampled("mu", dist.Normal(torch.zeros(3), 1.0)), r"'mu' has shape \(\) in .* and \(3,\)"),
    "a plate of another size": (
        sampled("z", dist.Normal(0.0, 1.0), rows=4),
        "plate 'rows' has size 5 in the model and 4",
    ),
    "another plate of another size": (of_another_plate, r"'z' has shape \(5,\) in the model and \(4,\)"),
    "a plate of another dimension": (of_other_dimension, r"'z' has shape \(5,\) in the model and \(5, 1\)"),
    "events for a plate": (of_events, "'z' has 0 event dimensions in the model and 1 in the guide"),
    "a parameter": (of_param, "'mu' is a latent of the model and a pyro.param in the guide"),
    "a deterministic": (of_deterministic, "'mu' is a latent of the model and a pyro.deterministic in the guide"),
    "an observation": (of_observed, "'mu' is a latent of the model and observed in the guide"),
    "an unclear factor": (of_factor, r"pyro.factor\('log_det', ...\) must say whether"),
}


@pytest.mark.parametrize(("guide", "sentence"), CLASHES.values(), ids=CLASHES)
def test_values_that_cannot_be_the_models_are_refused_by_all(guide, sentence):
    assert pyro_says(guide)
    with pytest.raises(ValueError, match=sentence):
        ELBO(num_particles=4).loss(model, guide, Y)
    with pytest.raises(ValueError, match=sentence):
        FlowSVI(model, guide, progress=False).run(Y)
    with pytest.raises(ValueError, match=sentence):
        diagnose(model, guide, Y)


def test_a_plate_of_one_name_and_two_sizes_does_not_take_a_part_of_the_models():
    def free(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="plate 'rows' has size 6 in the model and 5 in the guide"):
        diagnose(free, right, Y)


def test_an_error_of_the_models_own_stays_what_it_is():
    def broken(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu * torch.ones(2) @ torch.ones(3), 1.0), obs=y)

    with pytest.raises(RuntimeError):
        ELBO(num_particles=4).loss(broken, lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)), Y)


def test_calibrate_does_not_rank_draws_of_another_models_guide():
    def fit(simulated):
        return lambda: with_latent(Y)

    with pytest.raises(ValueError, match=r"fit failed in all 20 .* the guide samples 'typo'"):
        calibrate(model, fit, Y, num_simulations=20, num_samples=100, seed=0)


def auxiliary(fn, latent):
    """A guide that draws an auxiliary variable, and mu from it."""

    def guide(y):
        value = pyro.sample("aux", fn, infer={"is_auxiliary": True})
        pyro.sample("mu", latent(value))
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y, 0.7))

    return guide


def test_auxiliary_variables_of_which_latents_are_made_are_right():
    image = auxiliary(dist.Normal(0.0, 1.0), lambda a: dist.Delta(2 * a, log_density=torch.tensor(-math.log(2.0))))
    masked = auxiliary(dist.Normal(0.0, 1.0).mask(False), lambda a: dist.Normal(a, 1.0))
    for guide in (image, masked):
        warn_of_mismatches(Program(model, guide).bind(Y))
        require_weights(Program(model, guide).bind(Y))


@pytest.mark.parametrize("fn", [dist.Normal(0.0, 1.0), dist.Uniform(0.0, 3.0), dist.Bernoulli(0.5)])
def test_a_density_of_more_variables_than_the_model_has_is_not_one_of_its_posterior(fn):
    guide = auxiliary(fn, lambda a: dist.Normal(2.0 + a, 0.6))
    assert not pyro_says(guide)
    program = Program(model, guide)
    warn_of_mismatches(program.bind(Y))
    require_match(program.bind(Y))  # draws are draws, whatever their density
    with pytest.raises(ValueError, match="no importance weights: the guide draws auxiliary variables, 'aux'"):
        diagnose(model, guide, Y)


def test_a_point_estimate_has_no_weights():
    guide = auto.AutoDelta(model)
    ELBO(num_particles=2).loss(model, guide, Y)
    for verb in (diagnose, corrected_posterior, to_arviz):
        with pytest.raises(ValueError, match="one value of 'mu', 'z' and no density, as a point estimate has"):
            verb(model, guide, Y)


def test_a_point_estimate_of_some_latents_has_none_either():
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoDelta(poutine.block(model, expose=["mu"])))
    guide.append(auto.AutoNormal(poutine.block(model, expose=["z"])))
    with pytest.raises(ValueError, match="one value of some of 'mu', 'z' and no density"):
        diagnose(model, guide, Y)


def test_a_plate_whose_indices_are_given_is_subsampled_too():
    def part(y, rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y), subsample=rows):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def guide(y, rows):
        pyro.sample("mu", dist.Normal(y.mean(), 0.4))

    diagnose(part, guide, Y, torch.arange(5), num_samples=100, num_sets=1, num_starts=0)
    with pytest.raises(ValueError, match="plate 'rows' is subsampled by indices that the model was given"):
        diagnose(part, guide, Y, torch.arange(2))


def with_deterministic(y):
    pyro.deterministic("twice", 2 * y)
    right(y)


def listed(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=["mu"])))
    guide.append(AutoFlow(poutine.block(model, expose=["z"]), ElementwiseAffine))
    return guide


GUIDES = {
    "by hand": lambda model: right,
    "with a deterministic": lambda model: with_deterministic,
    "AutoFlow": AutoFlow,
    "Student-t": lambda model: AutoFlow(model, base="student_t"),
    "mixture": lambda model: AutoFlow(model, base="mixture"),
    "StructuredFlow": lambda model: StructuredFlow(model, {"rows": Rows(torch.nn.Linear(1, 4))}),
    "AutoGuideList": listed,
    "AutoNormal": auto.AutoNormal,
    "AutoIAFNormal": lambda model: auto.AutoIAFNormal(model, hidden_dim=[8]),
    "AutoLowRank": auto.AutoLowRankMultivariateNormal,
    "AutoStructured": auto.AutoStructured,
    "AutoGaussian": auto.AutoGaussian,
}


class Rows(torch.nn.Module):
    """An encoder of numbers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, y):
        return self.inner(y[:, None])


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_guides_that_are_right_pass_without_a_word(make):
    program = Program(model, make(model))
    warn_of_mismatches(program.bind(Y))
    require_weights(program.bind(Y))


def test_amortized_guides_pass_without_a_word():
    def local(y):
        with pyro.plate("rows", len(y)):
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(w[:, 0], 1.0), obs=y)

    program = Program(local, AmortizedFlow(local, Rows(torch.nn.Linear(1, 4))))
    warn_of_mismatches(program.bind(Y))
    require_weights(program.bind(Y))
