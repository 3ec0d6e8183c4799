"""A flag of a module that is saved with it, and read without asking a device."""

from typing import Any

import torch
from torch import Tensor, nn


class Switch(nn.Module):
    """A flag in a state dict: off at first.

    The buffer is what is saved; what runs reads Python's copy of it, because a step must not wait for a device.
    """

    on: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.tensor(0.0))
        self._is_on = False

    def __bool__(self) -> bool:
        return self._is_on

    def set(self, on: bool) -> None:
        """Turn it on or off."""
        self.on.fill_(on)
        self._is_on = on

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_on = bool(self.on)
