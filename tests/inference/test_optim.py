"""Adam against torch's own, and what the guard and the average do."""

import pytest
import torch

from pyro_nf.inference.optim import GuardedAdam, State

pytestmark = pytest.mark.usefixtures("float64")


def gradients(number=30):
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(0))


def run(adam, grads, losses=None, rate=0.03):
    states = [State.start(torch.arange(5.0))]
    for i, grad in enumerate(grads):
        loss = torch.tensor(1.0) if losses is None else losses[i]
        states.append(adam.update(states[-1], loss, grad, torch.tensor(rate)))
    return states


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adamw(weight_decay):
    param = torch.arange(5.0).requires_grad_()
    reference = torch.optim.AdamW([param], lr=0.03, weight_decay=weight_decay)
    for grad in gradients():
        param.grad = grad.clone()
        reference.step()
    state = run(GuardedAdam(clip_norm=1e9, weight_decay=weight_decay), gradients())[-1]
    torch.testing.assert_close(state.params, param.detach())


def test_long_gradients_are_scaled_down_and_short_ones_left():
    long, short = torch.full((1, 5), 100.0), torch.full((1, 5), 0.1)
    adam = GuardedAdam(clip_norm=1.0)
    assert run(adam, long)[-1].mean.norm().isclose(torch.tensor(0.1))
    torch.testing.assert_close(run(adam, short)[-1].mean, 0.1 * short[0])


def test_a_spike_is_cut_to_five_times_the_usual_norm():
    usual = torch.zeros(5).index_fill(0, torch.tensor(0), 3.0)
    before, after = run(GuardedAdam(clip_norm=1.0), torch.stack([usual, usual, 1e9 * usual]))[-2:]
    step = (after.mean - 0.9 * before.mean) / 0.1  # the gradient that was taken in
    assert step.norm().isclose(torch.tensor(5.0))  # scaled by 1 / 3, as the others
    assert after.usual_norm < 4.0


def test_gradients_of_which_few_are_long_keep_their_mean():
    # Nine in ten are -1, one is +9 and more: to clip each would leave a mean below zero.
    generator = torch.Generator().manual_seed(0)
    long = torch.rand(4000, 1, generator=generator) < 0.1
    grads = 1000 * torch.where(long, 9.0, -1.0).double().expand(-1, 5)
    adam, state, total = GuardedAdam(clip_norm=10.0), State.start(torch.zeros(5)), 0.0
    for grad in grads:
        new = adam.update(state, torch.tensor(1.0), grad, torch.tensor(0.0))
        taken = (new.mean - 0.9 * state.mean) / 0.1 / 10.0
        total, state = total + taken, new
    clipped = (grads / grads.norm(dim=1, keepdim=True)).mean()
    assert (total / 4000).abs().max() < 0.25 * clipped.abs()


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where):
    grads, losses = gradients(3), torch.ones(3)
    (grads if where == "gradient" else losses)[1] = torch.nan
    states = run(GuardedAdam(), grads, losses)
    for name in ("params", "mean", "square", "num_updates"):
        assert getattr(states[1], name).equal(getattr(states[2], name))
    assert [int(state.num_skipped) for state in states] == [0, 0, 1, 1]
    assert [int(state.run_skipped) for state in states] == [0, 0, 1, 0]


def test_the_average_is_that_of_the_steps_since_its_start():
    adam = GuardedAdam()
    states = run(adam, gradients(4))
    torch.testing.assert_close(states[-1].average, torch.stack([s.params for s in states[1:]]).mean(0))
    after = adam.update(states[-1].restart_average(), torch.tensor(1.0), gradients(1)[0], torch.tensor(0.1))
    torch.testing.assert_close(after.average, after.params)
