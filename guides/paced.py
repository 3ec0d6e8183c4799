"""A flow that any usual learning rate trains, because each parameter is in a unit of its own."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nf.flows import Flow, Inverse, Sequential


class Paced(Flow):
    r"""The map of `flow`, whose parameters theta are trained as `phi = theta / unit`.

    Adam moves every parameter by about its learning rate r, however small its gradient. What is good for a location
    moves the outputs of a layer with 64 inputs by 64 r, and those of a stack of eight by 500 r. Therefore the unit of a
    parameter is 1 over the number of layers, and over the number of inputs that its tensor sums: then a step moves the
    whole flow by about r. Units are powers of two, so that changing them changes no digit of the map.

    Args:
        flow: The flow, whose parameters become phi.

    Attributes:
        flow: The flow with phi for its parameters: not the map by itself.
        units: Unit of each parameter, in the order of `flow.named_parameters()`.
    """

    units: Tensor

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.event_shape, flow.context_dim)
        self.flow = flow
        self._paces = _paces(flow)
        self._units = dict.fromkeys(self._paces, 1.0)
        # Saved, because phi means nothing without it.
        self.register_buffer("units", torch.ones(len(self._units)))
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
        """Let the flow's parameters be theta meanwhile, for who knows their learning rate."""
        self._change_units(dict.fromkeys(self._paces, 1.0))
        try:
            yield
        finally:
            self._change_units(self._paces)

    def _apply_flow(self, method: str, *args: Any) -> Any:
        if all(unit == 1 for unit in self._units.values()):
            return getattr(self.flow, method)(*args)
        thetas = {f"flow.{name}": self._units[name] * phi for name, phi in self.flow.named_parameters()}
        return torch.func.functional_call(_Methods(self.flow), thetas, (method, *args))

    @torch.no_grad()
    def _change_units(self, units: dict[str, float]) -> None:
        for name, phi in self.flow.named_parameters():
            phi.mul_(self._units[name] / units[name])
        self._units = dict(units)
        self.units.copy_(self.units.new_tensor(list(units.values())))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The same theta, in the units that this flow has now.
        saved = state_dict.pop(f"{prefix}units", None)
        if saved is not None and saved.shape == self.units.shape:
            for (name, unit), old in zip(self._units.items(), saved.tolist(), strict=True):
                key = f"{prefix}flow.{name}"
                if key in state_dict:
                    state_dict[key] = state_dict[key] * (old / unit)
            state_dict[f"{prefix}units"] = self.units
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Methods(nn.Module):
    """A flow's methods by their names, as the forward of a module: the one that `functional_call` calls."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.flow, method)(*args)


def _paces(flow: Flow) -> dict[str, float]:
    """Return the unit of each parameter in which a step of any layer moves the whole flow as far."""
    layers = max(_num_layers(flow), 1)
    summed = {name: math.prod(param.shape[1:]) for name, param in flow.named_parameters()}
    return {name: 2.0 ** -round(math.log2(max(count, 1) * layers)) for name, count in summed.items()}


def _num_layers(flow: Flow) -> int:
    if isinstance(flow, Sequential):
        return sum(map(_num_layers, flow.flows))
    if isinstance(flow, Inverse):
        return _num_layers(flow.flow)
    return int(any(True for _ in flow.parameters()))
