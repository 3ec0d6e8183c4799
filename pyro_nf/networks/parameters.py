"""Parameters that are a flow's own, or functions of a context."""

from collections.abc import Mapping

from torch import Tensor, nn

from pyro_nf.interface.arguments import Count, checked


@checked
def freeze(module: nn.Module, *names: str) -> None:
    """Turn parameters of a module into buffers, all or those of these names: Pyro warns of untrained parameters."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if not names or name in names:
                delattr(part, name)
                part.register_buffer(name, value.detach())


@checked
def start_at_zero(*layers: nn.Module | None) -> None:
    """Set all parameters of these layers to zero."""
    for layer in layers:
        for tensor in layer.parameters() if layer is not None else ():
            nn.init.zeros_(tensor)


class ContextParameters(nn.Module):
    r"""Named tensors `theta_k + V_k c`: trainable on their own, shifted by a linear map of the context if there is one.

    The maps `V_k` start at zero. This one module is how every flow without a network of its own becomes conditional.

    Args:
        initial: Name and starting value of each tensor.
        context_dim: Width of the context; 0 for none.

    Shapes:
        `context: (*batch, context_dim)` -> a tuple of tensors, `(*shape_k)` without and `(*batch, *shape_k)` with a
        context, in the order of `initial`.

    Example:
        >>> import torch
        >>> from pyro_nf.networks import ContextParameters
        >>> loc, scale = ContextParameters({"loc": torch.zeros(3), "scale": torch.ones(3)}, context_dim=2)(
        ...     torch.zeros(5, 2)
        ... )
        >>> loc.shape
        torch.Size([5, 3])
    """

    @checked
    def __init__(self, initial: Mapping[str, Tensor], context_dim: Count = 0) -> None:
        super().__init__()
        self._names = tuple(initial)
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.from_context = None
        if context_dim > 0:
            self.from_context = nn.Linear(context_dim, sum(v.numel() for v in initial.values()), bias=False)
            start_at_zero(self.from_context)

    def forward(self, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the tensors for this context."""
        # getattr, because get_parameter refuses the plain tensors that torch.func.functional_call puts in their place.
        own: tuple[Tensor, ...] = tuple(getattr(self, name) for name in self._names)
        if self.from_context is None:
            return own
        shifts = self.from_context(context).split([p.numel() for p in own], -1)
        return tuple(p + shift.unflatten(-1, p.shape) for p, shift in zip(own, shifts, strict=True))
