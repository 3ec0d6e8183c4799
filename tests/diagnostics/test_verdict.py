"""Which verdict and which advice follow from which figures."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nf.diagnostics import Verdict, diagnose
from pyro_nf.diagnostics.moments import Misfit
from pyro_nf.diagnostics.regions import Region, Search
from pyro_nf.diagnostics.stein import SteinResidual
from pyro_nf.diagnostics.verdict import Evidence, Gradients, decide
from pyro_nf.diagnostics.weights import summarize

RNG = np.random.default_rng(0)


def normal_weights(variance, num_samples=10_000):
    """Log weights with a divergence of half their variance, as those of a shifted normal."""
    return summarize(variance**0.5 * RNG.standard_normal((3, num_samples)))


def long_tailed(shape, num_samples=10_000):
    return summarize(shape * RNG.exponential(size=(3, num_samples)))


def too_light():
    """Log weights of a Gumbel variable by draws of a normal."""
    noise = RNG.standard_normal((3, 10_000))
    x = 0.57 + 1.1 * noise
    return summarize(-x - np.exp(-x) + noise**2 / 2)


def misfit(shift=0.0, ratio=1.0, error=0.001, kurtosis=3.0):
    """Two coordinates, of which the second is off."""
    values = (torch.tensor([0.0, value]) for value in (shift, error, math.log(ratio), error))
    return Misfit(*values, torch.tensor([3.0, kurtosis]), 20_000.0)


def found(weights, *, shift=0.0, ratio=1.0, error=0.001, kurtosis=3.0, **others):
    return decide(Evidence(weights=weights, names=("a", "b"), misfit=misfit(shift, ratio, error, kurtosis), **others))


def gradients(size=0.0, noise=0.05, widest=("a", 1.0)):
    return Gradients(SteinResidual(size, noise), widest)


def search(missed=None, copied=False, num_modes=1, num_scattered=0):
    return Search(8, missed, copied, num_modes, num_scattered)


GOOD = normal_weights(0.01)
MISSED = Region(evidence=0.5, evidence_se=0.01, draws=0.0, draws_se=0.001)


@pytest.mark.parametrize(
    ("expected", "decision"),
    [
        ("right", found(GOOD)),
        ("right", found(GOOD, shift=0.08, ratio=1.08)),
        ("right after correction", found(GOOD, shift=0.12)),
        ("right after correction", found(GOOD, ratio=0.88)),
        ("right after correction", found(GOOD, shift=0.08, error=0.03)),  # not shown to be below a tenth
        ("right after correction", found(normal_weights(0.7))),  # 0.35 nats, though each coordinate is right
        ("right", decide(Evidence(weights=normal_weights(0.001)))),
        ("right after correction", decide(Evidence(weights=normal_weights(0.05)))),  # no mean was looked at
        ("right after correction", found(normal_weights(0.5), gradients=gradients(0.9))),
        ("not right", found(GOOD, gradients=gradients(0.9))),  # a pull that weights do not show
        ("not right", found(long_tailed(0.9))),
        ("not right", found(normal_weights(9.0))),
        ("not right", found(GOOD, search=search(MISSED))),
        ("not right", found(GOOD, search=search(num_scattered=5))),
        ("not right", found(GOOD, improper="The posterior is improper along c.")),
        ("right", found(GOOD, ratio=0.8, error=0.05, kurtosis=5000.0)),  # a heavy tail's sd is not known
        ("right after correction", found(GOOD, ratio=0.5, error=0.05, kurtosis=50.0)),
    ],
)
def test_verdicts(expected, decision):
    assert decision.verdict == expected
    assert (decision.verdict is Verdict.RIGHT) == (not decision.reasons)
    assert bool(decision.correction) == (expected == "right after correction")
    for sentence in (*decision.reasons, *decision.notes):
        assert sentence[0].isupper() or sentence.startswith("k-hat")
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("decision", "said", "unsaid"),
    [
        (found(GOOD, ratio=0.85), "its sd of b is 15% too small", "mean"),
        (found(GOOD, shift=0.12), "its mean of b is 0.12 posterior sd too low", "sd of"),
        (found(GOOD, shift=-0.12, error=0.03), "its mean of b is 0.12 +- 0.03 posterior sd too high", "sd of"),
        (found(GOOD, ratio=4.0), "its sd of b is 4 times the posterior's", "%"),
        (found(normal_weights(0.7)), "it is 0.35 nats from the posterior in all, though each mean and sd", "%"),
        # What is missing is draws, not a richer guide.
        (found(normal_weights(0.5, 120)), "There are too few draws to judge", "flexible"),
        (found(long_tailed(0.55, 100)), "too few draws", "flexible"),
        # Copies of a mode, and more than one mode that the guide covers badly.
        (found(GOOD, search=search(MISSED, copied=True)), "order the components in the model", "flexible"),
        (
            found(GOOD, search=search(MISSED)),
            'Fit again with FlowSVI(num_starts=8) and AutoFlow(base="mixture")',
            "order",
        ),
        (found(long_tailed(0.9), search=search(MISSED)), "Climbs from 8 other starts found a region", "k-hat"),
        (found(long_tailed(0.9), search=search(num_modes=3)), "several modes (3 were found)", "flexible"),
        # Improper directions.
        (
            found(GOOD, improper="The posterior is improper along c."),
            "improper along c. Along all other directions the guide is right.",
            "flexible",
        ),
        (
            found(normal_weights(9.0), gradients=gradients(widest=("b", 3e8))),
            "the posterior may be improper there",
            "flexible",
        ),
        # Tails alone, and everything.
        (
            found(too_light()),
            'base="student_t"',
            "flexible",
        ),
        (
            found(normal_weights(9.0), shift=0.4, ratio=0.66),
            "its sd of b is 34% too small, and its mean of b is 0.40 posterior sd too low. Use a more flexible guide",
            "corrected_posterior",
        ),
    ],
)
def test_one_cause_has_one_sentence_with_its_own_advice(decision, said, unsaid):
    (reason,) = decision.reasons
    assert said in reason
    assert unsaid not in reason


def test_the_number_of_draws_that_is_asked_for_is_enough():
    few = summarize(0.55 * RNG.exponential(size=(1, 100)))
    (reason,) = decide(Evidence(weights=few, option="num_proposals")).reasons
    number = int(reason.split("num_proposals=")[1].split()[0].replace("_", ""))
    assert 1 - 1 / math.log10(number) > few.khat
    assert number * few.ess_fraction > 100


def test_figures_that_could_not_be_looked_at_are_not_right():
    assert found(GOOD, shift=math.nan).verdict == "right after correction"
    assert found(GOOD, error=math.nan).verdict == "right after correction"


@pytest.mark.parametrize(("scale", "shift", "dim"), [(0.93, 0.0, 1), (1.0, 0.08, 3), (0.97, 0.0, 60), (0.85, 0.0, 2)])
def test_verdicts_do_not_depend_on_the_seed(scale, shift, dim):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(torch.full((dim,), shift), scale).to_event(1))

    verdicts = set()
    for seed in range(5):
        pyro.set_rng_seed(seed)
        verdicts.add(diagnose(model, guide, num_samples=5000, num_sets=2, num_starts=0).verdict)
    assert verdicts == {Verdict.RIGHT_AFTER_CORRECTION if scale == 0.85 else Verdict.RIGHT}


def test_a_direction_without_density_is_named_and_no_richer_flow_is_advised():
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("cell", 3), pyro.poutine.mask(mask=torch.tensor([True, True, False])):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("cell", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1.0, 1.0, 1e8])))

    (reason,) = diagnose(model, guide, num_samples=1000, num_sets=1, num_starts=0).reasons
    assert reason.startswith("The posterior is improper along z[2]:")
    assert reason.endswith("Along all other directions the guide is right.")


def test_words_are_strings_too():
    assert str(Verdict.RIGHT_AFTER_CORRECTION) == f"{Verdict.RIGHT_AFTER_CORRECTION}" == "right after correction"
    assert Verdict("not right") is Verdict.NOT_RIGHT
