"""A run of a model in which what is computed twice from the same tensors is computed once.

A loop over the steps of a chain computes for each step what is the same for all: the transition probabilities at all
values of a latent, say. Under `Shared` the second computation returns the first one's tensor. So a step costs what is
its own, and a recorded graph of a thousand steps is hardly longer than that of ten.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_nf.programs.rows import Row

# Functions of tensors that depend on nothing but their arguments, and change none of them.
# fmt: off
_PURE = frozenset((
    "__add__", "__and__", "__eq__", "__ge__", "__getitem__", "__gt__", "__invert__", "__le__", "__lt__",
    "__matmul__", "__mul__", "__ne__", "__neg__", "__or__", "__pow__", "__radd__", "__rmatmul__", "__rmul__",
    "__rpow__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__", "abs", "add", "all", "amax", "amin", "any",
    "arange", "bool", "broadcast_tensors", "broadcast_to", "cat", "clamp", "contiguous", "cos", "cumprod", "cumsum",
    "diagonal", "digamma", "div", "double", "einsum", "eq", "exp", "expand", "expand_as", "expm1", "eye", "flatten",
    "flip", "float", "full", "full_like", "gather", "ge", "gt", "index_select", "int", "isfinite", "isnan", "le",
    "lgamma", "linspace", "log", "log1p", "log_softmax", "logaddexp", "logical_and", "logical_not", "logical_or",
    "logsigmoid", "logsumexp", "long", "lt", "matmul", "maximum", "mean", "minimum", "movedim", "mul", "ne", "neg",
    "new_full", "new_ones", "new_zeros", "one_hot", "ones", "ones_like", "permute", "pow", "prod", "reciprocal",
    "relu", "reshape", "roll", "rsqrt", "sigmoid", "sin", "softmax", "softplus", "sqrt", "square", "squeeze",
    "stack", "sub", "sum", "tanh", "to", "transpose", "tril", "triu", "true_divide", "type_as", "unsqueeze", "view",
    "where", "xlogy", "zeros", "zeros_like",
))
# fmt: on


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
# Numbers in a tensor of one draw, at most: half a gigabyte.
_MAX_NUMBERS = 2**26


class InPlaceError(Exception):
    """A model writes into a tensor that stands for others: it has to run without `Shared`."""


class TooManyValuesError(Exception):
    """A tensor would hold so many numbers."""


class Shared(TorchFunctionMode):
    """Return for pure functions of the same tensors the same result, kept as long as this lives.

    Raises:
        InPlaceError: If a tensor that was returned more than once is written to.
        TooManyValuesError: If a tensor would be too large.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Any, Any] = {}
        self._kept: list[Any] = []
        self._twice: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name in _PURE or func == _DATA) and "out" not in kwargs:
            key = self._key((func, args, kwargs))
            if key is not None:
                if key in self._results:
                    result = self._results[key]
                    self._twice.update(
                        id(part) for part in (result if isinstance(result, (tuple, list)) else (result,))
                    )
                    return result
                _check_size(args)
                result = func(*args, **kwargs)
                if name == "__getitem__" and type(args[1]) is int:
                    result._row = Row(args[0], args[1])
                self._results[key] = result
                self._kept.append((args, kwargs))  # an `id` is one only while its tensor lives
                return result
        elif _writes(name) or "out" in kwargs:
            target = kwargs.get("out", args[0] if args else None)
            if id(target) in self._twice:
                raise InPlaceError
        return func(*args, **kwargs)

    def _key(self, value: Any) -> Any:
        """Return what tells a call from others, `None` for one with arguments of other kinds."""
        try:
            return self._described(value)
        except TypeError:
            return None

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Tensor, id(value), value._version
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(self._described, value))
        if isinstance(value, dict):
            return dict, tuple((name, self._described(item)) for name, item in value.items())
        if isinstance(value, slice):
            return slice, self._described((value.start, value.stop, value.step))
        if value is None or value is ... or callable(value):
            return value
        if isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return type(value), value
        raise TypeError


def _check_size(args: Any) -> None:
    """Refuse tensors that only all values of many latents together make so large."""
    shapes = [value.shape for value in args if isinstance(value, Tensor)] if len(args) > 1 else []
    if len(shapes) > 1:
        try:
            number = math.prod(torch.broadcast_shapes(*shapes))
        except RuntimeError:  # of functions that do not broadcast
            return
        if number > _MAX_NUMBERS:
            raise TooManyValuesError(number)


def _writes(name: str) -> bool:
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
