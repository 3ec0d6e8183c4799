import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nf.flows import stacks
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.inference.elbo import ELBO
from pyro_nf.models.benchmarks import energies


def by_hand(name, z1, z2):
    """The formulas of table 1, number by number."""
    w1 = math.sin(2 * math.pi * z1 / 4)
    w2 = 3 * math.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + math.exp(-(z1 - 1) / 0.3))

    def bell(x, scale):
        return math.exp(-0.5 * (x / scale) ** 2)

    if name == "U1":
        ring = 0.5 * ((math.hypot(z1, z2) - 2) / 0.4) ** 2
        return ring - math.log(bell(z1 - 2, 0.6) + bell(z1 + 2, 0.6))
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    if name == "U3":
        return -math.log(bell(z2 - w1, 0.35) + bell(z2 - w1 + w2, 0.35))
    return -math.log(bell(z2 - w1, 0.4) + bell(z2 - w1 + w3, 0.35))


@pytest.mark.parametrize("name", energies.ENERGIES)
def test_an_energy_is_that_of_the_papers_table(name, float64):
    z = torch.tensor([[0.3, -0.7], [-1.9, 0.4], [1.1, -1.6], [2.5, -2.0]])
    expected = [by_hand(name, *point) for point in z.tolist()]
    assert torch.allclose(energies.ENERGIES[name](z), torch.tensor(expected), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "log_evidence"),
    # U2 in closed form: 8 in z1 times a normal's integral in z2. The others by a grid of 4,000 x 4,000.
    [("U1", 1.877502), ("U2", math.log(8 * 0.4 * math.sqrt(2 * math.pi))), ("U3", 2.641705), ("U4", 2.684568)],
)
def test_the_grid_gives_the_log_evidence(name, log_evidence):
    grid = energies.energy_grid(energies.ENERGIES[name], 400)
    assert math.isclose(grid.log_evidence, log_evidence, abs_tol=1e-5)
    assert math.isclose(float(grid.density.sum()) * grid.cell, 1.0, rel_tol=1e-9)


def test_no_energy_is_infinite_far_from_its_wells():
    z = torch.tensor([[1000.0, -1000.0], [0.0, 0.0]], requires_grad=True)
    for potential in energies.ENERGIES.values():
        (gradient,) = torch.autograd.grad(potential(z)[0], z)
        assert potential(z).isfinite().all()
        assert gradient.isfinite().all()


def test_the_models_evidence_is_the_integral_over_the_square(float64):
    """A weight of 64 p(z) and a uniform draw make an unbiased estimate of Z."""
    model = partial(energies.energy, energies.u2)
    corner = energies.box()
    z = dist.Uniform(-corner, corner).sample((200_000,))
    trace = poutine.trace(poutine.condition(model, data={"z": z[0]})).get_trace(corner)
    assert torch.allclose(trace.log_prob_sum(), -energies.u2(z[0]))
    weights = 64 * torch.exp(-energies.u2(z))
    error = weights.std() / len(z) ** 0.5
    assert abs(weights.mean() - math.exp(energies.energy_grid(energies.u2, 200).log_evidence)) < 4 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_data(dtype):
    model = partial(energies.energy, energies.u4)
    assert poutine.trace(model).get_trace(energies.box(dtype)).nodes["z"]["value"].dtype == dtype
    trace = poutine.trace(energies.sine).get_trace(*energies.sine_data(dtype))
    assert trace.nodes["f"]["value"].dtype == trace.nodes["y"]["value"].dtype == dtype


def test_a_guide_keeps_to_the_square_and_its_density_is_normalised_there():
    model = partial(energies.energy, energies.u1)
    guide = AutoFlow(model, partial(stacks.make, "planar", depth=2), init_scale=1.0)
    draws = guide.sample_posterior(1000, energies.box())["z"]
    assert draws.abs().max() < energies.HALF_WIDTH
    grid = energies.energy_grid(energies.u1, 200)
    with torch.no_grad():
        density = guide.log_prob({"z": grid.points.float().flatten(0, 1)}, energies.box()).exp()
    assert math.isclose(float(density.sum()) * grid.cell, 1.0, rel_tol=1e-3)


@pytest.mark.slow
def test_a_short_fit_comes_near_the_grids_evidence():
    model = partial(energies.energy, energies.u2)
    guide = AutoFlow(model, partial(stacks.make, "spline_coupling", depth=2, hidden_dims=(16,)), init_scale=1.0)
    svi = FlowSVI(
        model,
        guide,
        objective=ELBO(sticking_the_landing=False),
        num_particles=64,
        learning_rate=0.01,
        max_steps=400,
        seed=0,
        progress=False,
    )
    result = svi.run(energies.box())
    assert abs(energies.energy_grid(energies.u2, 400).log_evidence - result.elbo) < 0.15


def test_the_sines_posterior_has_three_modes_and_half_a_one():
    grid = energies.sine_grid(*energies.sine_data())
    frequency, density = grid.points[:, 0], grid.density
    peaks = (density[1:-1] > density[:-2]) & (density[1:-1] > density[2:]) & (density[1:-1] > 1.0)
    assert torch.allclose(frequency[1:-1][peaks], torch.tensor([0.6, 1.2, 1.8]).double(), atol=0.01)
    near_zero = float(density[frequency < 0.15].sum() * grid.cell)
    at_a_mode = float(density[(frequency > 0.45) & (frequency < 0.75)].sum() * grid.cell)
    assert math.isclose(2 * near_zero, at_a_mode, rel_tol=1e-6)


def test_the_sines_log_density_is_that_of_the_model(float64):
    t, y = energies.sine_data()
    f = torch.tensor(0.7)
    trace = poutine.trace(poutine.condition(energies.sine, data={"f": f})).get_trace(t, y)
    grid = energies.sine_grid(t, y, 20)
    expected = -0.5 * torch.sin(2 * math.pi * f * t).square().sum() / 0.125 - 1.5 * math.log(2 * math.pi * 0.125)
    assert torch.allclose(trace.log_prob_sum(), expected - math.log(2))
    here = torch.isclose(grid.points[:, 0], torch.tensor(0.75))
    at_point = math.log(float(grid.density[here])) + grid.log_evidence
    f = torch.tensor(0.75)
    trace = poutine.trace(poutine.condition(energies.sine, data={"f": f})).get_trace(t, y)
    assert math.isclose(at_point, float(trace.log_prob_sum()), rel_tol=1e-9)
