"""A flow that any usual learning rate trains, because each of its parameters has a unit of its own."""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.compiler.functorch import in_torchscript_trace, with_parameters
from pyro_nf.flows.base import Flow, Inverse, Sequential
from pyro_nf.interface.arguments import checked


class Paced(Flow):
    r"""The map of `flow`, whose parameters theta are trained as `phi = theta / unit`.

    Adam moves every parameter by about its learning rate r, however small the gradient. For a location that is a step
    of r; but a layer with 64 inputs moves its outputs by up to 64 r, and a stack of eight such layers its own by 500 r.
    By default the unit of a parameter is therefore 1 over the number of inputs that its tensor sums, and over the
    number of layers: then a step moves the whole flow by about r, and so does the noise of the gradients.

    Units are rounded to powers of two: a change of units changes no digit of the map.

    Args:
        flow: The flow, whose parameters become phi.
        units: Units of parameters by their names; those without a name here keep theirs. `None` for the default.

    Attributes:
        flow: The flow with phi for its parameters: not the map by itself.
        units: Unit of each parameter now, in the order of `flow.named_parameters()`.

    Example:
        >>> import torch
        >>> from pyro_nf.flows import stacks
        >>> from pyro_nf.flows.paced import Paced
        >>> flow = Paced(stacks.make("realnvp", 2, depth=2, hidden_dims=(64,)))
        >>> flow(torch.zeros(2)).tolist(), 1 / flow.units[-2:]
        ([0.0, 0.0], tensor([128.,   2.]))
    """

    units: Tensor

    @checked
    def __init__(self, flow: Flow, units: Mapping[str, float] | None = None) -> None:
        super().__init__(flow.event_shape, flow.context_dim)
        self.flow = flow
        self._methods = (
            _Methods(flow),
        )  # in a tuple, or it would be a part of this module, with the flow's parameters
        names = [name for name, _ in flow.named_parameters()]
        chosen = _default_units(flow) if units is None else units
        self._paces = {name: 2.0 ** round(math.log2(chosen.get(name, 1.0))) for name in names}
        self._units = dict.fromkeys(names, 1.0)
        # Saved, because phi means nothing without it.
        self.register_buffer("units", torch.ones(len(names)))
        self._change_units(self._paces)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the flow."""
        result: tuple[Tensor, Tensor] = self._apply_flow("forward_and_log_det", x, context)
        return result

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the inverse of the flow."""
        result: tuple[Tensor, Tensor] = self._apply_flow("inverse_and_log_det", y, context)
        return result

    def forward_with_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the flow, and push the score along."""
        result: tuple[Tensor, Tensor, Tensor] = self._apply_flow("forward_with_score", x, score, context)
        return result

    @contextmanager
    def unpaced(self) -> Iterator[None]:
        """Let the flow's parameters be theta in this context."""
        before = self._units
        self._change_units(dict.fromkeys(before, 1.0))
        try:
            yield
        finally:
            self._change_units(before)

    def _apply_flow(self, method: str, *args: Any) -> Any:
        if all(unit == 1 for unit in self._units.values()):
            return getattr(self.flow, method)(*args)
        # getattr and tie_weights, because torch.compile cannot go through the parameters of Pyro's modules.
        flow: Any = self.flow
        thetas = {
            f"flow.{name}": unit * functools.reduce(getattr, name.split("."), flow)
            for name, unit in self._units.items()
            if unit != 1
        }
        if in_torchscript_trace():  # which functional_call refuses, though it does the same
            with with_parameters(self._methods[0], thetas):
                return self._methods[0](method, *args)
        return torch.func.functional_call(self._methods[0], thetas, (method, *args), tie_weights=False)

    @torch.no_grad()
    def _change_units(self, units: dict[str, float]) -> None:
        for name, phi in self.flow.named_parameters():
            phi.mul_(self._units[name] / units[name])
        self._units = units
        self.units.copy_(self.units.new_tensor(list(units.values())))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The same theta, in the units that this flow has now.
        saved = state_dict.get(f"{prefix}units")
        if saved is not None and saved.shape == self.units.shape:
            for (name, unit), old in zip(self._units.items(), saved.tolist(), strict=True):
                key = f"{prefix}flow.{name}"
                if key in state_dict:
                    state_dict[key] = state_dict[key] * (old / unit)
            state_dict[f"{prefix}units"] = self.units
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextmanager
def unpaced(guide: Any) -> Iterator[None]:
    """Let every `Paced` of a guide (a module or not) train its parameters as they are, for who finds their rate."""
    with ExitStack() as stack:
        for part in guide.modules() if isinstance(guide, nn.Module) else ():
            if isinstance(part, Paced):
                stack.enter_context(part.unpaced())
        yield


class _Methods(nn.Module):
    """A flow's methods, by their names, as the forward of a module: that is what `functional_call` calls."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.flow, method)(*args)


def _default_units(flow: Flow) -> dict[str, float]:
    """Return the units in which a step of any layer's parameters moves the whole flow about as far."""
    layers = max(_num_layers(flow), 1)
    return {name: 1 / (layers * max(math.prod(param.shape[1:]), 1)) for name, param in flow.named_parameters()}


def _num_layers(flow: Flow) -> int:
    if isinstance(flow, Sequential):
        return sum(_num_layers(part) for part in flow._parts())
    if isinstance(flow, Inverse):
        return _num_layers(flow.flow)
    return int(any(True for _ in flow.parameters()))
