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


def test_long_gradients_are_clipped_and_short_ones_left():
    long, short = torch.full((1, 5), 100.0), torch.full((1, 5), 0.1)
    adam = GuardedAdam(clip_norm=1.0)
    assert run(adam, long)[-1].mean.norm().isclose(torch.tensor(0.1))
    torch.testing.assert_close(run(adam, short)[-1].mean, 0.1 * short[0])


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
