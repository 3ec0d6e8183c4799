"""Adam as a function of tensors, with clipping, a guard and an average: nothing leaves the device."""

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """All that changes from step to step.

    Attributes:
        params: Every parameter of the fit, flat and side by side.
        mean: Decaying average of the gradients.
        square: Decaying average of their squares.
        num_updates: Count of finite steps.
        num_skipped: Count of steps with a non-finite loss or gradient.
        run_skipped: Of those, how many came in a row until now.
        average: Mean of the parameters over the steps since the average was restarted.
        num_averaged: Count of those steps.
        usual_norm: Decaying average of the gradients' norms.
    """

    params: Tensor
    mean: Tensor
    square: Tensor
    num_updates: Tensor
    num_skipped: Tensor
    run_skipped: Tensor
    average: Tensor
    num_averaged: Tensor
    usual_norm: Tensor

    @staticmethod
    def start(params: Tensor) -> "State":
        """Return the state before the first step: tensors of their own, for a graph tells its inputs apart by that."""
        zeros = [params.new_zeros(()) for _ in range(5)]
        mean, square = torch.zeros_like(params), torch.zeros_like(params)
        return State(params, mean, square, zeros[0], zeros[1], zeros[2], params.clone(), zeros[3], zeros[4])

    def restart_average(self) -> "State":
        """Let the average begin with the next step."""
        return self._replace(num_averaged=torch.zeros_like(self.num_averaged))

    def hold(self, before: "State", free: Tensor) -> "State":
        """Return the state after a step that left the parameters where they were but for those marked `free`."""
        params = torch.where(free, self.params, before.params)
        return self._replace(params=params, average=torch.lerp(before.average, params, 1 / self.num_averaged))


# Decay of the usual norm, and how many times as long as usual a gradient may be.
_NORM_DECAY, _SPIKE = 0.95, 5.0


class GuardedAdam:
    r"""Adam with scaled and clipped gradients, that stays where it is where loss or gradient is not finite.

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `theta -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay theta)`.

    Where gradients are usually longer than `clip_norm`, all are scaled down by one factor, from the norms of the steps
    before. (To cut each to a length of its own would bias their sum: minibatches with long gradients would count less
    than others.) Only what is five times as long as usual, and longer than `clip_norm`, is cut.

    Args:
        clip_norm: Usual Euclidean norm of the whole gradient above which gradients are scaled down to it.
        weight_decay: Decoupled decay of every parameter towards 0 (AdamW).
        betas: Decay of the two averages.
        eps: Keeps the division defined.

    References:
        Kingma, Ba (2014), "Adam", arXiv:1412.6980, algorithm 1. Loshchilov, Hutter (2019), "Decoupled weight decay
        regularization", arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        clip_norm: float = 10.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.clip_norm, self.weight_decay, self.betas, self.eps = clip_norm, weight_decay, betas, eps

    def update(self, state: State, loss: Tensor, grad: Tensor, learning_rate: Tensor) -> State:
        """Return the state after a step with this gradient of `state.params`' shape."""
        norm = grad.norm()
        finite = norm.isfinite() & loss.isfinite()
        usual = torch.where(state.num_updates > 0, state.usual_norm, norm)
        scale = self.clip_norm / usual.clamp(min=self.clip_norm)
        longest = (_SPIKE * usual).clamp(min=self.clip_norm)
        grad = torch.where(finite, grad * scale * (longest / norm.clamp(min=longest)), 0.0)
        b1, b2 = self.betas
        t = state.num_updates + finite
        mean = torch.where(finite, b1 * state.mean + (1 - b1) * grad, state.mean)
        square = torch.where(finite, b2 * state.square + (1 - b2) * grad**2, state.square)
        # t is 0 until the first finite step, whose corrections are positive; before it the update is masked out.
        change = mean / (1 - b1**t) / ((square / (1 - b2**t)).sqrt() + self.eps)
        if self.weight_decay:
            change = change + self.weight_decay * state.params
        params = state.params - torch.where(finite, learning_rate * change, 0.0)
        num_averaged = state.num_averaged + 1
        return State(
            params=params,
            mean=mean,
            square=square,
            num_updates=t,
            num_skipped=state.num_skipped + ~finite,
            run_skipped=torch.where(finite, 0.0, state.run_skipped + 1),
            average=torch.lerp(state.average, params, 1 / num_averaged),
            num_averaged=num_averaged,
            usual_norm=torch.where(finite, torch.lerp(norm.clamp(max=longest), usual, _NORM_DECAY), state.usual_norm),
        )
