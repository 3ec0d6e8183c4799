"""Distributions made of a base and a flow, sampled and scored in one pass."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints

from pyro_nf.flows import Flow


class FlowDistribution(TorchDistribution):
    r"""The law of `y = f(x)`, x from a base distribution, f a flow: `log q(y) = log base(x) - log |det dy/dx|`.

    Nothing is cached: `log_prob` inverts the flow under its current parameters, for any value. A draw and its density
    together cost one forward pass: `rsample_and_log_prob`.

    Args:
        base: Distribution whose event shape is the flow's.
        flow: The flow.
        context: `(*batch, context_dim)`; `None` for a flow without context.

    Shapes:
        `batch_shape` is the broadcast of the base's and the context's, `event_shape` the flow's.

    Raises:
        ValueError: If the shapes of base, flow and context do not fit.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_nf.distributions import FlowDistribution
        >>> from pyro_nf.flows import stacks
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> q = FlowDistribution(base, stacks.make("realnvp", 3))
        >>> y, log_prob = q.rsample_and_log_prob((5,))
        >>> bool(torch.allclose(q.log_prob(y), log_prob))
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        base: TorchDistributionMixin,
        flow: Flow,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if base.event_shape != flow.event_shape:
            raise ValueError(
                f"base must have the flow's event shape {tuple(flow.event_shape)}; "
                f"got {tuple(base.event_shape)} (to_event() turns batch dimensions into event dimensions)"
            )
        context_shape = torch.Size() if context is None else context.shape[:-1]
        batch_shape = torch.broadcast_shapes(base.batch_shape, context_shape)
        self.base, self.flow, self.context = base.expand(batch_shape), flow, context
        flow.check_inputs(torch.empty(base.event_shape, device="meta"), context)
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients to the parameters: as the base's do."""
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^n."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        """Return the same distribution with a larger batch shape, whose draws are independent."""
        return FlowDistribution(self.base.expand(batch_shape), self.flow, self.context, validate_args=False)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Return draws `(*sample_shape, *batch, *event)` and their log densities, from one pass of the flow."""
        x = self.base.rsample(torch.Size(sample_shape))
        y, log_det = self.flow.forward_and_log_det(x, self.context)
        return y, self.base.log_prob(x) - log_det

    def rsample_and_score(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Return draws `(*sample_shape, *batch, *event)`, their log densities, and the gradient of these by the draws.

        The score, `d log q(y) / dy`, comes along with the forward pass, and carries no gradient to the parameters.
        """
        x = self.base.rsample(torch.Size(sample_shape))
        base_score = torch.func.grad(lambda x: self.base.log_prob(x).sum())(x.detach()).detach()
        y, log_det, score = self.flow.forward_with_score(x, base_score, self.context)
        return y, self.base.log_prob(x) - log_det, score

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, *event)` without gradients."""
        x = self.base.sample(torch.Size(sample_shape))
        return self.flow.forward_and_log_det(x, self.context)[0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws `(*sample_shape, *batch, *event)` with gradients to the parameters."""
        x = self.base.rsample(torch.Size(sample_shape))
        return self.flow.forward_and_log_det(x, self.context)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at any `value: (*shape, *batch, *event)`, by the flow's inverse."""
        self.flow.check_inputs(value, self.context)
        x, log_det = self.flow.inverse_and_log_det(value, self.context)
        log_prob: Tensor = self.base.log_prob(x) + log_det
        return log_prob


class ScoredDraw(TorchDistribution):
    """A distribution for one `pyro.sample` statement of a guide, that scores its own draw without an inverse.

    Pyro draws and scores in two calls. This object lives for one call of the guide, between the two, and carries the
    density of the draw it made; any other value (replayed, detached, conditioned) is scored by `posterior.log_prob`.
    Like Pyro's `Delta`, it states the density under the parameters that made the draw.

    Args:
        posterior: The distribution to draw from.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, posterior: FlowDistribution) -> None:
        super().__init__(posterior.batch_shape, posterior.event_shape, validate_args=False)
        self.posterior = posterior
        self._draw: tuple[Tensor, Tensor] | None = None

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: as the posterior's do."""
        return self.posterior.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """All of R^n."""
        return self.posterior.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScoredDraw":
        """Return a fresh one over the expanded posterior."""
        return ScoredDraw(self.posterior.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, and remember the density."""
        self._draw = self.posterior.rsample_and_log_prob(sample_shape)
        return self._draw[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the density of the draw, or of any other value."""
        if self._draw is not None and value is self._draw[0]:
            return self._draw[1]
        return self.posterior.log_prob(value)
