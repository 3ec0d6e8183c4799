import math
import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_nf.diagnostics import compare, diagnose
from pyro_nf.diagnostics.diagnosis import judge
from pyro_nf.diagnostics.moments import Moments
from pyro_nf.diagnostics.stein import stein_residual
from pyro_nf.diagnostics.verdict import Evidence
from pyro_nf.diagnostics.weights import summarize
from pyro_nf.guides import AutoFlow, MixtureBase
from pyro_nf.inference import FlowSVI

LOCS = torch.tensor([[-4.0, -4.0], [4.0, 4.0]])


def normal():
    pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 0.1, 3.0])).to_event(1))


def normal_guide(factor=1.0, shift=(0.0, 0.0, 0.0)):
    scale = torch.tensor([1.0, 0.1, 3.0])
    loc = torch.tensor([1.0, -2.0, 0.0]) + torch.tensor(shift) * scale
    return lambda: pyro.sample("z", dist.Normal(loc, factor * scale).to_event(1))


def two_modes():
    pyro.sample("z", dist.MixtureOfDiagNormals(LOCS, torch.ones(2, 2), torch.tensor([0.25, 0.75]).log()))


def one_mode():
    pyro.sample("z", dist.Normal(LOCS[1], 1.0).to_event(1))


def test_the_posterior_itself_passes_and_all_its_figures_say_so():
    found = diagnose(normal, normal_guide())
    assert found.reliable
    assert found.mean_shift == pytest.approx(0.0, abs=1e-6)
    assert found.sd_ratio == pytest.approx(1.0, abs=1e-6)
    assert found.stein_residual < 0.1
    assert found.stein_noise == pytest.approx((3 / 1000) ** 0.5, rel=0.2)
    assert found.missed_mass == 0.0
    assert found.num_starts == 8
    assert found.iwelbo == pytest.approx(0.0, abs=1e-5)


def test_a_shift_is_named_and_measured():
    found = diagnose(normal, normal_guide(shift=(0.0, 1.0, 0.0)))
    assert not found.reliable
    assert found.mean_shift == pytest.approx(-1.0, abs=0.1)
    assert found.stein_residual == pytest.approx(1.0, abs=0.1)
    assert found.verdict == "right after correction"
    (reason,) = found.reasons
    assert "its mean of z[1] is 1.0" in reason
    assert "posterior sd too high" in reason
    assert "the gradients pull its center by" in reason
    assert "means by corrected_posterior are right to about 0.0" in reason


def test_a_narrow_guide_is_named_and_measured():
    found = diagnose(normal, normal_guide(0.5))
    assert not found.reliable
    assert found.sd_ratio < 0.75
    assert found.verdict == "not right"
    assert re.search(r"its sd of z\[\d\] is \d\d( \+- \d+)?% too small", found.reasons[0])


def test_the_sd_of_a_heavy_tail_is_not_held_against_a_guide():
    def model():
        pyro.sample("z", dist.StudentT(3.0, torch.zeros(5), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.StudentT(2.8, torch.zeros(5), 1.0).to_event(1))

    assert diagnose(model, guide).reliable


def test_a_missed_mode_is_found_by_climbs_alone():
    found = diagnose(two_modes, one_mode)
    assert found.ess_fraction > 0.99
    assert not found.reliable
    assert found.missed_mass == pytest.approx(1 / 3 / 2, rel=0.15)  # the inner half of the other mode
    assert "region with" in found.reasons[0]
    unsearched = diagnose(two_modes, one_mode, num_starts=0)
    assert unsearched.reliable
    assert "a mode in which the guide has no draws would not be noticed" in unsearched.notes[0]
    both = AutoFlow(two_modes, base=partial(MixtureBase, num_components=2))
    both.warm_start()
    assert diagnose(two_modes, both).reliable


def test_a_missed_mode_that_is_bent_is_found_too():
    def crescents():
        z = pyro.sample("z", dist.Normal(0.0, 10.0).expand([2]).to_event(1).mask(False))
        sides = torch.stack([-0.5 * ((z[0] - 2) / 0.6) ** 2, -0.5 * ((z[0] + 2) / 0.6) ** 2]).logsumexp(0)
        pyro.factor("ring", sides - 0.5 * ((z.square().sum().sqrt() - 2) / 0.4) ** 2)

    def right():
        pyro.sample("z", dist.Normal(torch.tensor([1.8, 0.0]), torch.tensor([0.4, 0.8])).to_event(1))

    assert 0.3 < diagnose(crescents, right).missed_mass < 1.0


def test_weights_that_are_flat_outvote_khat_and_it_is_said():
    generator = torch.Generator().manual_seed(0)
    log_weights = 1e-3 * torch.randn(1, 10_000, generator=generator).double()
    log_weights[:, :5] = torch.tensor([0.5, 0.8, 1.1, 1.4, 1.7])  # few, of next to no weight, with a long tail
    found = judge(Evidence(weights=summarize(log_weights.numpy())))
    assert found.khat > found.khat_threshold
    assert found.reliable
    assert "the weights are flat" in found.notes[0]
    assert "the weights are flat" in str(found)
    log_weights[:, :5] += 4.0  # the same tail, of which one draw has a tenth of all weight
    found = judge(Evidence(weights=summarize(log_weights.numpy())))
    assert found.khat > found.khat_threshold
    assert found.verdict == "not right"
    assert not any("flat" in note for note in found.notes)


def test_bounds_are_in_order():
    found = diagnose(normal, normal_guide(0.8, (0.3, 0.0, 0.0)))
    assert found.elbo < found.iwelbo < found.log_evidence + 3 * found.log_evidence_se
    assert found.log_evidence == pytest.approx(0.0, abs=4 * found.log_evidence_se)
    assert 0 < found.iwelbo_mcse < 0.05


def test_a_hand_written_guide_of_discrete_latents_is_judged_by_its_weights():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.25))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("k", dist.Bernoulli(0.5))

    found = diagnose(model, guide)
    assert math.isnan(found.stein_residual)
    assert "site 'k' is discrete" in found.notes[0]
    expected = float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
    assert found.log_evidence == pytest.approx(expected, abs=4 * found.log_evidence_se)


def test_more_coordinates_than_climbs_take_are_noted():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(501), 1.0).to_event(1))

    found = diagnose(model, model, num_samples=500)
    assert found.reliable
    assert "up to 500 coordinates; there are 501 here" in found.notes[0]
    assert math.isnan(found.missed_mass)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="num_starts must be a whole number of at least 0; got -1"):
        diagnose(normal, normal, num_starts=-1)
    with pytest.raises(ValueError, match=r"num_samples must be a whole number of at least 100; got 1000\.5"):
        diagnose(normal, normal, num_samples=1000.5)
    with pytest.raises(ValueError, match="num_sets must be a whole number of at least 1; got True"):
        diagnose(normal, normal, num_sets=True)
    with pytest.raises(ValueError, match=r"model must be a function .* or a PyroModule; got None"):
        diagnose(None, normal)
    with pytest.raises(ValueError, match=r"guide must be a function .* or a PyroModule; got 42"):
        diagnose(normal, 42)


def test_moments_in_parts_are_those_of_the_whole(float64):
    torch.manual_seed(0)
    log_weights, points = 3 * torch.randn(1000), 5.0 + torch.randn(1000, 2)
    log_weights[:3] = -math.inf
    moments = Moments()
    for part in torch.arange(1000).split(130):
        moments.add(log_weights[part], points[part])
    found = moments.compare()
    weights = log_weights.softmax(0)[:, None]
    mean = (weights * points).sum(0)
    sd = (weights * (points - mean) ** 2).sum(0).sqrt()
    assert torch.allclose(found.shift, (mean - points.mean(0)) / sd)
    assert torch.allclose(found.log_ratio, (points.std(0, correction=0) / sd).log())
    assert torch.allclose(found.kurtosis, (weights * (points - mean) ** 4).sum(0) / sd**4)


def test_the_errors_of_moments_are_those_of_the_differences(float64):
    torch.manual_seed(0)
    found = []
    for _ in range(300):
        points = 0.3 + 1.2 * torch.randn(500, 1)
        moments = Moments()
        moments.add(-(points[:, 0] ** 2) / 2 + ((points[:, 0] - 0.3) / 1.2) ** 2 / 2, points)
        found.append(moments.compare())
    shift, shift_se, log_ratio, log_ratio_se = (torch.cat([each[i] for each in found]) for i in range(4))
    assert float(shift.mean()) == pytest.approx(-0.3, abs=0.01)
    assert float(log_ratio.mean()) == pytest.approx(math.log(1.2), abs=0.01)
    assert float(shift_se.mean() / shift.std()) == pytest.approx(1.0, abs=0.2)
    assert float(log_ratio_se.mean() / log_ratio.std()) == pytest.approx(1.0, abs=0.2)


def test_the_stein_residual_is_the_mahalanobis_distance_whatever_the_coordinates(float64):
    torch.manual_seed(0)
    root = torch.tensor([[2.0, 0.0], [5.0, 0.01]])
    points = torch.randn(200_000, 2) @ root.mT + root @ torch.tensor([0.6, 0.8])
    scores = -torch.linalg.solve(root @ root.mT, points.mT).mT
    found = stein_residual(scores)
    assert found.size == pytest.approx(1.0, abs=0.02)
    assert found.noise == pytest.approx((2 / 200_000) ** 0.5, rel=0.1)


def test_fits_are_compared_in_one_table():
    def model():
        cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), cov))

    fits = {
        name: FlowSVI(model, guide, seed=0, progress=False, max_steps=800, learning_rate=0.02).run()
        for name, guide in (("mean-field", AutoNormal(model)), ("full-rank", AutoMultivariateNormal(model)))
    }
    table = compare(fits, num_samples=2000)
    assert list(table.index) == ["full-rank", "mean-field"]
    assert table["gap"]["mean-field"] == pytest.approx(-0.5 * math.log(1 - 0.81), abs=0.1)
    assert table["gap"]["full-rank"] == pytest.approx(0.0, abs=0.02)
    assert table["reliable"].tolist() == [True, False]
    assert table["verdict"]["full-rank"] == "right"
    with pytest.raises(ValueError, match="fits must hold at least one fit"):
        compare({})


def test_a_fit_to_minibatches_cannot_be_compared():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    batches = [torch.zeros(2), torch.ones(2)]
    result = FlowSVI(model, AutoFlow(model), progress=False, max_steps=20, eval_every=10, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"fits\['a'\] must be a fit to all the data"):
        compare({"a": result.run_batches(batches)})


def test_many_modes_that_are_each_negligible_are_not_left_unsaid(float64):
    # 2^32 modes: the best one, all wells on the right, holds 0.4% of the mass, and what climbs find far less each.
    def wells():
        with pyro.plate("well", 32):
            x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0).mask(False))
            pyro.factor("energy", 0.5 * x + 6 * x**2 - x**4)

    guide = AutoFlow(wells)
    guide()
    guide.flow.flows[-1].assign(torch.full((32,), 1.75), 0.2 * torch.eye(32))
    found = diagnose(wells, guide, num_samples=1000, num_sets=2)
    assert found.verdict == "not right"
    assert "different modes where the guide has no draws" in found.reasons[0]
