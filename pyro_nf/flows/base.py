"""The contract that every flow keeps, and the two ways to combine flows."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nf.interface.arguments import Count, Size, checked


class Flow(TransformModule):
    r"""An invertible map of R^n with trainable parameters, and the log-determinants of both directions.

    A subclass implements two methods, `forward_and_log_det` and `inverse_and_log_det`; everything that torch and Pyro
    expect of a transform derives from them. `forward` runs from the base distribution to the posterior. A subclass
    must map onto all of R^n, keep the dtype and device of its input, register every parameter, and hold no cache: the
    same input always gives the value under the *current* parameters.

    Args:
        event_shape: Shape of one point: `(dim,)` for vectors, `(channels, height, width)` for images.
        context_dim: Width of the context that the parameters are functions of; 0 if they are the flow's own.

    Shapes:
        `x, y: (*batch, *event_shape)`; `context: (*batch, context_dim)`, broadcastable; log-determinants: `(*batch,)`.
    """

    bijective = True

    @checked
    def __init__(self, event_shape: Sequence[Size], context_dim: Count = 0) -> None:
        super().__init__()
        if not event_shape:
            raise ValueError(
                f"event_shape of a {type(self).__name__} must have a size, such as (3,); got {event_shape}"
            )
        self.event_shape = torch.Size(event_shape)
        self.context_dim = context_dim
        self.domain = self.codomain = constraints.independent(constraints.real, len(self.event_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return `y = f(x)` and `log |det dy/dx|`."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return `x = f^{-1}(y)` and `log |det dx/dy|`."""
        raise NotImplementedError

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return `y = f(x)`, `log |det dy/dx|`, and the score of y: `d log q(y) / dy`, given `d log q(x) / dx`.

        With J = dy/dx the score is `J^{-T} (d log q(x) / dx - d log |det J| / dx)`, and carries no gradient to the
        parameters. Here it comes from the inverse; a flow that can do with less overrides this.

        References:
            Vaitl, Nicoli, Nakajima, Kessel (2022), "Gradients should stay on path", arXiv:2207.08219, section 4.
        """
        y, log_det = self.forward_and_log_det(x, context)
        with torch.no_grad():
            result: Any = torch.func.vjp(lambda y: self.inverse_and_log_det(y, context), y.detach())
            (_, inverse_log_det), pull = result
            (pushed,) = pull((score, torch.ones_like(inverse_log_det)))
        return y, log_det, pushed

    def condition(self, context: Tensor) -> "Flow":
        """Return this flow, bound to `context`, as a flow (and torch transform) without context."""
        return _Conditioned(self, context)

    def check_inputs(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise a `ValueError` unless `x` and `context` have the shapes that this flow takes."""
        if x.shape[x.dim() - len(self.event_shape) :] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} takes points of shape (*batch, {', '.join(map(str, self.event_shape))}); "
                f"got {tuple(x.shape)}"
            )
        width = None if context is None else context.shape[-1]
        if width != (self.context_dim or None):
            raise ValueError(
                f"{type(self).__name__} has context_dim={self.context_dim}; got "
                + ("no context" if context is None else f"a context of width {width}")
            )

    # torch.distributions.Transform, derived from the two methods above.

    @property
    def sign(self) -> int:
        """The sign of a scalar map's derivative: a flow has none."""
        # Not the NotImplementedError of torch, through which hasattr(flow, "sign") fails, and torch.jit.trace with it.
        raise AttributeError(f"{type(self).__name__} has no attribute 'sign'")

    def _call(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        self.check_inputs(y)
        return self.inverse_and_log_det(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `log |det dy/dx|` at `x`; `y` is not used."""
        self.check_inputs(x)
        return self.forward_and_log_det(x)[1]

    def with_cache(self, cache_size: int = 1) -> "Flow":
        """Return the flow itself: it never caches."""
        return self

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of `f(x)` for `x` of this shape."""
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of `f^{-1}(y)` for `y` of this shape."""
        return torch.Size(shape)


class Sequential(Flow):
    """Flows one after another: `y = f_n(... f_2(f_1(x)))`.

    Args:
        *flows: At least one flow, all over the same event shape, in the order in which `forward` applies them. Those
            with a context must agree on its width; those without ignore it.

    Raises:
        ValueError: If there is no flow, or their shapes or contexts disagree.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import Sequential
        >>> from pyro_nf.flows import Planar
        >>> flow = Sequential(Planar(3), Planar(3))
        >>> y, log_det = flow.forward_and_log_det(torch.zeros(5, 3))
        >>> log_det.shape
        torch.Size([5])
    """

    @checked
    def __init__(self, *flows: Flow) -> None:
        if not flows:
            raise ValueError("Sequential takes at least one flow; got none")
        shapes = {tuple(flow.event_shape) for flow in flows}
        widths = {flow.context_dim for flow in flows if flow.context_dim > 0}
        if len(shapes) > 1 or len(widths) > 1:
            raise ValueError(
                "Sequential takes flows of one event_shape and one context_dim (or none); got "
                + ", ".join(f"{type(f).__name__}{tuple(f.event_shape)} with context_dim={f.context_dim}" for f in flows)
            )
        super().__init__(flows[0].event_shape, max(widths, default=0))
        self.flows = nn.ModuleList(flows)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply every flow in turn and sum the log-determinants."""
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for flow in self._parts():
            x, log_det = flow.forward_and_log_det(x, context if flow.context_dim else None)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo every flow, last first, and sum the log-determinants."""
        total = torch.zeros((), dtype=y.dtype, device=y.device)
        for flow in reversed(self._parts()):
            y, log_det = flow.inverse_and_log_det(y, context if flow.context_dim else None)
            total = total + log_det
        return y, total

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply every flow in turn, and push the score along."""
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for flow in self._parts():
            x, log_det, score = flow.forward_with_score(x, score, context if flow.context_dim else None)
            total = total + log_det
        return x, total, score

    def _parts(self) -> list[Any]:
        return list(self.flows)


class Inverse(Flow):
    """A flow with its directions swapped, still a module with registered parameters.

    IAF samples in one pass and inverts in many; `Inverse` of it is MAF, which scores in one pass.

    Args:
        flow: The flow to swap.
    """

    @checked
    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.event_shape, flow.context_dim)
        self.flow = flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the inverse of the flow."""
        return self.flow.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the flow itself."""
        return self.flow.forward_and_log_det(y, context)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `log |det dy/dx|`, computed from `y` in the swapped flow's own direction."""
        return -self.flow.log_abs_det_jacobian(y, x)


class _Conditioned(Flow):
    """A flow bound to one context."""

    context: Tensor

    def __init__(self, flow: Flow, context: Tensor) -> None:
        if context.shape[-1] != flow.context_dim:
            raise ValueError(
                f"condition() of a {type(flow).__name__} with context_dim={flow.context_dim} takes a context of that "
                f"width; got {tuple(context.shape)}"
            )
        super().__init__(flow.event_shape)
        self.flow = flow
        self.register_buffer("context", context, persistent=False)  # moves along with the flow

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(y, self.context)
