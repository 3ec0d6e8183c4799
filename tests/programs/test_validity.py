"""Data and parameters against Pyro's own constraints."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_nf.approximations.density import Density
from pyro_nf.diagnostics import diagnose
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.staged.fit import fit_in_stages
from pyro_nf.inference.watch import Watch
from pyro_nf.programs.coordinates import model_log_density
from pyro_nf.programs.data_checks import check_data
from pyro_nf.programs.program import Program
from pyro_nf.programs.traces import in_words, log_prob_sum, run_model

T = torch.tensor


def first_run(model):
    """Let a model be looked at, which raises where its data or parameters are wrong."""
    return Program(model, AutoNormal(model)).bind().spec


def observing(likelihood, y, mask=None):
    def model():
        z = pyro.sample("z", dist.LogNormal(0.0, 0.1))
        with pyro.plate("rows", len(y)), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", likelihood(z), obs=y)

    return model


ROWS = T([[0.5, 0.5], [0.9, 0.3]])
OUTSIDE = {
    "negative count": (dist.Poisson, T([1.0, -1.0]), "1 value outside the support of Poisson, whole numbers of at "),
    "half a count": (dist.Poisson, T([1.5, 1.0]), "1 value outside .* least 0 .the first is 1.5"),
    "more than all": (lambda z: dist.Binomial(T([3.0, 4.0]), z / 9), T([3.0, 5.0]), "1 value outside .*the first is 5"),
    "class 3 of 3": (lambda z: dist.Categorical(torch.ones(3)), T([0, 3]), "whole numbers from 0 to 2 .the first is 3"),
    "Bernoulli 2": (lambda z: dist.Bernoulli(z / 9), T([0.0, 2.0]), "Bernoulli, 0 or 1 .the first is 2"),
    "no simplex": (lambda z: dist.Dirichlet(z * torch.ones(2)), ROWS, "sum 1 .the first is .0.8999"),
    "negative time": (dist.Exponential, T([1.0, -2.0]), "1 value outside the support of Exponential, numbers of at "),
    "events": (lambda z: dist.LogNormal(z.expand(2), 1.0).to_event(1), ROWS - 0.4, "1 value outside .*LogNormal"),
    "NaN": (lambda z: dist.Normal(z, 1.0), T([1.0, math.nan]), "hold 1 NaN"),
    "infinity": (lambda z: dist.Normal(z, 1.0), T([1.0, -math.inf]), "hold 1 infinite value .the first is -inf"),
    "infinite time": (dist.Exponential, T([1.0, math.inf]), "hold 1 infinite value"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_their_support_are_refused_unless_they_are_masked(name):
    likelihood, y, message = OUTSIDE[name]
    model = observing(likelihood, y)
    with pytest.raises(ValueError, match=f"the data of site 'y' hold .*{message.removeprefix('hold ')}"):
        first_run(model)
    broken = run_model(model, poutine.trace(lambda: pyro.sample("z", dist.LogNormal(0.0, 0.1))).get_trace())
    if name != "more than all":  # whose bound is a tensor, which could depend on latents
        with pytest.raises(ValueError, match="data of site 'y'"):
            check_data(broken)
    kept = T([False, False]) if name == "events" else (T([True, False]) if name != "half a count" else T([False, True]))
    hidden = observing(likelihood, y, mask=kept)
    density = Density(model_log_density(hidden))
    first_run(hidden)
    gradients, values = density.gradients(torch.zeros(3, 1))
    assert bool(values.isfinite().all())
    assert bool(gradients.isfinite().all())


def test_a_mask_of_the_distribution_counts_and_what_its_user_does_not_validate_is_not_checked():
    y = T([0.0, 2.0])
    for likelihood in (
        lambda z: dist.Bernoulli(z / 9).mask(T([True, False])),
        lambda z: dist.Bernoulli(z / 9, validate_args=False),
        lambda z: dist.Bernoulli(z.expand(2) / 9, validate_args=False).expand([2]),
        lambda z: dist.NanMaskedNormal(z, 1.0),
    ):
        model = observing(likelihood, y)
        first_run(model)


@pytest.mark.parametrize("value", [T(math.inf), T(-1.0), T(math.nan), -1.0])
def test_a_single_number_outside_its_support_is_refused(value):
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Exponential(rate), obs=value)

    with pytest.raises(ValueError, match="the data of site 'y' hold 1 "):
        first_run(model)


def test_nan_is_data_of_a_nan_masked_distribution():
    model = observing(lambda z: dist.NanMaskedNormal(z, 1.0), T([0.0, math.nan]))
    first_run(model)


def test_a_support_that_depends_on_latents_cuts_draws_off():
    def likelihood(z):
        return dist.Pareto(0.5 * z, 1.0)  # of which log_prob is finite below its scale

    y = T([0.5, 3.0])
    model = observing(likelihood, y)
    first_run(model)
    points = T([[-0.1], [0.1]])
    assert model_log_density(model)(points[0]).isfinite()
    gradients, values = Density(model_log_density(model)).gradients(points)
    assert values.isneginf().tolist() == [False, True]
    assert gradients.isfinite().all(-1).tolist() == [True, False]


def test_data_of_known_shapes_are_checked_at_each_run_and_all_rows_of_a_subsampled_plate():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=min(3, len(y))) as rows:
            pyro.sample("y", dist.Poisson(rate), obs=y[rows])

    for size in (3, 100):
        y = torch.ones(size)
        program = Program(model, AutoNormal(model)).bind(y)
        state = torch.random.get_rng_state()
        program.spec  # noqa: B018 - a first run
        used = torch.random.get_rng_state()
        program.check_data()
        assert torch.equal(torch.random.get_rng_state(), used)
        assert not torch.equal(state, used)
        y[-1] = -1.0
        with pytest.raises(ValueError, match="the data of site 'y' hold 1 value outside the support of Poisson"):
            program.check_data()


def test_a_fit_refuses_data_that_went_bad_since_the_last_one():
    model = observing(dist.Exponential, y := T([1.0, 2.0]))
    svi = FlowSVI(model, AutoNormal(model), max_steps=1, learning_rate=0.01, progress=False, compile=False)
    svi.run()
    y[0] = -1.0
    with pytest.raises(ValueError, match="outside the support of Exponential"):
        svi.run()


def test_covariates_that_are_nan_are_told_from_data():
    x = T([1.0, math.nan, 2.0, math.nan])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=torch.zeros(4))

    with pytest.raises(ValueError, match="site 'y': its loc is NaN for 2 of 4 entries, whatever the draw"):
        first_run(model)


def test_a_parameter_that_is_wrong_for_every_draw_is_refused():
    model = observing(lambda z: dist.Normal(z, T([1.0, -1.0])), torch.zeros(2))
    with pytest.raises(ValueError, match="site 'y': its scale is not positive for 1 of 2 entries, whatever the draw"):
        first_run(model)


LEAVING = {
    "concentration is not positive": lambda z: dist.Gamma(z, 1.0),
    "scale is not positive": lambda z: dist.Normal(0.0, z),
    "probs is not from 0 to 1": lambda z: dist.Bernoulli(1 - z),
    "df is not positive": lambda z: dist.StudentT(z).mask(T(True)),
    "rate is not positive": lambda z: dist.TransformedDistribution(dist.Exponential(z), []),
    "scale is not positive ": lambda z: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.stack([z, z.new_tensor(1.0)]))
    ),
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_draw_whose_parameter_leaves_its_constraint_has_no_density(name):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", LEAVING[name](z), obs=T([0.0, 1.0]) if "probs" in name else T([0.2, 0.7]))

    gradients, values = Density(model_log_density(model)).gradients(T([[0.5], [-0.5], [0.9]]))
    assert values.isneginf().tolist() == [False, True, False]
    assert gradients.isfinite().all(-1).tolist() == [True, False, True]
    program = Program(model, lambda: pyro.sample("z", dist.Normal(0.3, 0.3))).bind()
    found = program.vmap_traces(
        lambda p: {"p": log_prob_sum(p.model), "z": p.model.nodes["z"]["value"]}, program.draw(200)
    )
    wrong = (found["z"] <= 0) | ((found["z"] > 1) if "probs" in name else torch.tensor(False))
    assert torch.equal(found["p"].isneginf(), wrong)
    assert program.program.vectorized
    words = in_words(program.without_density(1000))
    assert words.startswith(f"draws have no density: site 'y': its {name.strip()} in 1")


def test_a_dirichlet_whose_concentration_has_an_entry_that_is_not_positive():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Dirichlet(z), obs=T([0.2, 0.8]))

    values = Density(model_log_density(model)).values(T([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]]))
    assert values.isneginf().tolist() == [False, True, True]


def test_latents_of_a_hand_written_guide_outside_their_support_have_no_density():
    def model():
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    program = Program(model, lambda: pyro.sample("z", dist.Normal(1.0, 1.0)))
    assert "site 'z': its value is outside the support of Gamma" in in_words(program.bind().without_density(1000))
    diagnosis = diagnose(model, program.guide, num_samples=500, num_sets=1, num_starts=0)
    assert not diagnosis.reliable


def test_draws_that_are_valid_to_rounding_have_a_density():
    def model():
        with pyro.plate("rows", 3):
            pyro.sample("shares", dist.Dirichlet(torch.ones(300)))
        pyro.sample("scales", dist.HalfCauchy(torch.ones(2)).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(20, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(20), scale_tril=2.0 * corr), obs=torch.zeros(20))

    program = Program(model, AutoFlow(model))
    assert not program.bind().without_density(200)


def gamma_with_a_free_concentration():
    a = 1.5 + pyro.sample("a", dist.Normal(0.0, 1.5))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Gamma(a, 1.0), obs=T([0.02, 0.1, 0.3]))


def test_a_fit_that_rests_on_draws_without_density_says_so_and_diagnose_with_the_same_words():
    guide = AutoNormal(gamma_with_a_free_concentration, init_scale=1.0)
    options = {"learning_rate": 0.05, "max_steps": 60, "num_particles": 64, "compile": False}
    result = FlowSVI(gamma_with_a_free_concentration, guide, seed=0, progress=False, **options).run()
    sentence = "site 'y': its concentration is not positive in"
    assert not result.converged
    assert f"draws have no density: {sentence}" in result.stop_reason
    wide = AutoFlow(gamma_with_a_free_concentration, init_scale=1.0)
    diagnosis = diagnose(gamma_with_a_free_concentration, wide, num_samples=500, num_sets=1, num_starts=0)
    assert not diagnosis.reliable
    assert any(sentence in reason for reason in diagnosis.reasons)
    assert result.num_skipped == 0  # the other draws of a step count
    assert bool(result.history.isfinite().all())


def dropping(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(torch.nn.functional.dropout(z.expand(len(y))), 1.0), obs=y)


def indexing(y):
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y), subsample=torch.randperm(len(y))[:5]) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def jittering(y):
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y + 0.1 * torch.randn(len(y)))


@pytest.mark.parametrize(
    ("model", "words", "refused"),
    [
        (indexing, "plate 'rows' has random indices", "plate 'rows' is subsampled by indices that the model was given"),
        (dropping, "density is random", "density is random"),
        (jittering, "density is random", "density is random"),
    ],
)
def test_a_density_that_is_random_is_fitted_in_one_stage_and_not_weighed(model, words, refused):
    y = torch.linspace(0, 3, 20)
    guide = AutoFlow(model)
    program = Program(model, guide).bind(y)
    assert words in program.own_randomness()
    assert fit_in_stages(program, guide, FlowSVI(model, guide).options, Watch()) is None
    result = FlowSVI(model, guide, learning_rate=0.01, max_steps=5, progress=False, compile=False).run(y)
    assert math.isfinite(result.elbo)
    with pytest.raises(ValueError, match=refused):
        diagnose(model, guide, y)
