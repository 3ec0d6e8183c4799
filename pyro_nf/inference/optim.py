"""Adam over a list of tensors, with clipping and a guard, as tensor arithmetic alone: nothing leaves the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GuardedAdam:
    r"""Adam with global-norm clipping, that leaves everything as it is where a gradient is not finite.

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `theta -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        params: The tensors to update, leaves that require gradients.
        clip_norm: Largest Euclidean norm of the whole gradient; a longer one is scaled down.
        betas: Decay of the two averages.
        eps: Keeps the division defined.

    Attributes:
        num_skipped: Count of steps with a non-finite loss or gradient, a tensor.
        run_skipped: Of those, how many came in a row until now, a tensor.

    References:
        Kingma, Ba (2014), "Adam", arXiv:1412.6980, algorithm 1.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        clip_norm: float = 10.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.params = list(params)
        self.clip_norm, self.betas, self.eps = clip_norm, betas, eps
        flat = self._flatten([p.detach() for p in self.params])
        self._mean, self._square = torch.zeros_like(flat), torch.zeros_like(flat)
        self._t = torch.zeros((), dtype=flat.dtype, device=flat.device)
        self.num_skipped = torch.zeros((), dtype=torch.long, device=flat.device)
        self.run_skipped = torch.zeros_like(self.num_skipped)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """All tensors that change from step to step, beside the parameters."""
        return self._t, self._mean, self._square, self.num_skipped, self.run_skipped

    @state.setter
    def state(self, state: tuple[Tensor, ...]) -> None:
        self._t, self._mean, self._square, self.num_skipped, self.run_skipped = state

    @torch.no_grad()
    def step(self, loss: Tensor, grads: Sequence[Tensor], learning_rate: Tensor | float) -> None:
        """Update the parameters, unless `loss` or the gradient is not finite."""
        grad = self._flatten(grads)
        norm = grad.norm()
        finite = norm.isfinite() & loss.isfinite()
        grad = torch.where(finite, grad * (self.clip_norm / norm.clamp(min=self.clip_norm)), 0.0)
        b1, b2 = self.betas
        t = self._t + finite
        mean = torch.where(finite, b1 * self._mean + (1 - b1) * grad, self._mean)
        square = torch.where(finite, b2 * self._square + (1 - b2) * grad**2, self._square)
        # t is 0 until the first finite step, whose corrections are positive; before it the update is masked out.
        update = mean / (1 - b1**t) / ((square / (1 - b2**t)).sqrt() + self.eps)
        update = torch.where(finite, learning_rate * update, 0.0)
        for param, change in zip(self.params, update.split([p.numel() for p in self.params]), strict=True):
            param.sub_(change.view_as(param))
        self._t, self._mean, self._square = t, mean, square
        self.num_skipped = self.num_skipped + ~finite
        self.run_skipped = torch.where(finite, 0, self.run_skipped + 1)

    @staticmethod
    def _flatten(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
