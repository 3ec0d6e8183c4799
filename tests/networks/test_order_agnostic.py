"""MADE over many orders: each order's densities, their average, and digits."""

import math

import pytest
import torch
from pyro.distributions import Bernoulli
from torch import Tensor

from pyro_nf.models import load_digits
from pyro_nf.networks import OrderAgnosticMADE


def bernoulli(params: Tensor) -> Bernoulli:
    return Bernoulli(logits=params[..., 0])


def randomised(dim: int, hidden_dims: tuple[int, ...] = (9, 7), **options: int) -> OrderAgnosticMADE:
    network = OrderAgnosticMADE(dim, 1, hidden_dims, num_masks=4, **options).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p))
    return network.requires_grad_(False)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("mask", range(4))
def test_under_each_mask_outputs_see_exactly_the_inputs_before(mask: int, context_dim: int) -> None:
    network = randomised(5, (15, 16), context_dim=context_dim)
    network.activation = torch.nn.Tanh()  # no unit is dead
    context = torch.randn(context_dim, dtype=torch.float64) if context_dim else None
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context, mask), x)[:, 0]
    order = network.degrees_0[mask]
    assert torch.equal(jacobian != 0, order[:, None] > order)


@pytest.mark.parametrize("dim", [1, 4])
def test_probabilities_sum_to_one_for_each_order_and_their_average(dim: int) -> None:
    network = randomised(dim)
    points = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * dim).reshape(-1, dim)
    for mask in range(4):
        scores = bernoulli(network(points, mask=mask)).log_prob(points).sum(-1)
        assert math.isclose(float(scores.exp().sum()), 1.0, rel_tol=1e-12)
    each = torch.stack([bernoulli(network(points, mask=mask)).log_prob(points).sum(-1) for mask in range(4)])
    average = network.eval().log_prob(points, bernoulli)
    torch.testing.assert_close(average.exp(), each.exp().mean(0))


def test_training_scores_one_random_order_at_a_time() -> None:
    network = randomised(4)
    x = torch.bernoulli(torch.full((3, 4), 0.5, dtype=torch.float64))
    each = [bernoulli(network(x, mask=mask)).log_prob(x).sum(-1) for mask in range(4)]
    drawn = [network.log_prob(x, bernoulli) for _ in range(40)]
    seen = {k for one in drawn for k, score in enumerate(each) if torch.equal(one, score)}
    assert seen == {0, 1, 2, 3}


def test_masks_are_part_of_the_state() -> None:
    one, other = randomised(4), OrderAgnosticMADE(4, 1, (9, 7), num_masks=4, seed=1).double()
    other.load_state_dict(one.state_dict())
    x = torch.ones(2, 4, dtype=torch.float64)
    assert torch.equal(one.eval().log_prob(x, bernoulli), other.eval().log_prob(x, bernoulli))


def test_on_digits_averaging_orders_beats_the_average_order() -> None:
    train, test = load_digits()
    network = OrderAgnosticMADE(64, 1, (200,))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        loss = -network.log_prob(train[torch.randint(len(train), (100,))], bernoulli).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        single = [bernoulli(network(test, mask=m)).log_prob(test).sum(-1).mean() for m in range(network.num_masks)]
        average = network.eval().log_prob(test, bernoulli).mean()
    assert float(average) > float(torch.stack(single).mean()) + 0.5


@pytest.mark.parametrize("hidden_dims", [(), (3,)])
def test_hidden_dims_must_hold_every_degree(hidden_dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hidden_dims must hold at least one width, each >= 4 for dim=5"):
        OrderAgnosticMADE(5, 1, hidden_dims)


def test_there_must_be_a_mask() -> None:
    with pytest.raises(ValueError, match="num_masks must be a whole number of at least 1; got 0"):
        OrderAgnosticMADE(5, 1, (8,), num_masks=0)
