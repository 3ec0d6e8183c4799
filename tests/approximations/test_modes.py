"""Climbs: the modes that they find, and what is none."""

import math

import pytest
import torch

from pyro_nf.approximations.density import Density
from pyro_nf.approximations.modes import distance, find_modes, starting_points

pytestmark = pytest.mark.usefixtures("float64")


def two(x):
    """1/4 N(-4, 1) + 3/4 N(4, 1), in each of two coordinates the same."""
    terms = [math.log(w) - 0.5 * (x - loc).square().sum() - math.log(2 * math.pi) for w, loc in ((0.25, -4), (0.75, 4))]
    return torch.stack(terms).logsumexp(0)


def test_each_mode_is_found_once_with_its_scale_and_its_evidence():
    torch.manual_seed(0)
    found = find_modes(Density(two), starting_points(8, torch.zeros(2)))
    assert [mode.converged for mode in found] == [True, True]
    assert sum(mode.num_runs for mode in found) == 8
    for mode, loc, share in zip(found, (4.0, -4.0), (0.75, 0.25), strict=True):
        assert torch.allclose(mode.loc, torch.full((2,), loc), atol=1e-3)
        assert torch.allclose(mode.scale_tril, torch.eye(2), atol=1e-3)
        assert mode.elbo == pytest.approx(math.log(share), abs=1e-3)  # no Monte Carlo error: it is a normal


def test_starting_points_come_in_opposite_pairs():
    points = starting_points(5, torch.zeros(3))
    assert points.shape == (5, 3)
    assert torch.equal(points[1:4:2], -points[0:3:2])
    assert points.abs().max() <= 2


def test_a_point_on_the_way_into_a_funnel_is_no_mode():
    def funnel(x):  # no largest value: up without end as x[0] falls, along a slope that does not level off
        return -x[0] - 0.5 * (x[1:].square() * (-x[0]).exp()).sum()

    assert not any(mode.converged for mode in find_modes(Density(funnel), starting_points(2, torch.zeros(3))))


def test_distance_is_in_the_modes_standard_deviations():
    (mode, _) = find_modes(Density(two), torch.tensor([[3.0, 3.0], [-3.0, -3.0]]))
    assert distance(mode, mode.loc + torch.tensor([[2.0, 0.0]]))[0] == pytest.approx(math.sqrt(2), rel=1e-2)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, pytest.fail.Exception, ValueError])
def test_an_error_of_the_model_ends_all_climbs(error):
    calls = 0

    def ends(x):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise error("no more")
        return two(x) if bool(x.detach()[0] < 0) else 2 * two(x)  # cannot be batched

    with pytest.raises(error, match="no more"):
        find_modes(Density(ends), starting_points(8, torch.zeros(2)))
